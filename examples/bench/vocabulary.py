"""How much of a model its unused vocabulary is, and what dropping it costs in tokens.

    python examples/bench/vocabulary.py --out docs/bench/vocabulary

Tokens are counted in the parts of the domain that `prune` counts them in. What stays at each
threshold is measured on the whole held-out part: tokens per byte as against the whole vocabulary,
whether every word of kept tokens encodes as before, and whether every document decodes as before.
No model is run.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import results
from results import Rows

AT_ONCE = 64  # documents tokenised in one call


def main(argv: Sequence[str] | None = None) -> None:
    """Make the rows that are missing, then the table of all."""
    from llm_narrow import __version__, domains, models, vocabulary
    from llm_narrow.blocks import pack
    from llm_narrow.trimming import PARTS
    from llm_narrow.vocabulary_rows import vocabulary_axes

    args = parse(argv)
    console = results.console_of()
    loaded = models.load(args.model)
    domain = domains.load(args.domain)
    named = dict(loaded.model.named_parameters())
    size = loaded.model.get_input_embeddings().weight.shape[0]
    about = {
        "llm_narrow": __version__,
        "model": loaded.name,
        "model_sha256": loaded.sha256,
        "parameters": sum(p.numel() for p in named.values()),
        "rows": size,
        "parameters_of_a_row": sum(named[n].numel() for n in vocabulary_axes(loaded.model)) // size,
        "domain": domain.name,
        "counted_sha256": {part: domain.sha256[part] for part in PARTS},
        "held_out_sha256": domain.sha256["held_out"],
        "multiple": args.multiple,
        "length": args.length,
        "sample_tokens": args.held_out_tokens,
        "seed": args.seed,
    }
    rows = Rows(args.out, about, fresh=args.fresh)
    thresholds = [int(part) for part in args.thresholds.split(",")]
    missing = [t for t in thresholds if str(t) not in rows.done]
    if missing:
        parts = [pack(domain, part, loaded.tokenizer, length=args.length) for part in PARTS]
        counted = sum(vocabulary.counts(part, loaded.tokenizer) for part in parts)
    for threshold in missing:
        row = cut(loaded, domain, counted, threshold, args)
        rows.add(str(threshold), {"threshold": threshold, **row})
        console.print(f"threshold {threshold}: {row['kept']:,} of {size:,} tokens stay")
    found = [rows.done[str(t)] for t in thresholds]
    results.write(args.out, about, found, page(found, about))
    console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, complete."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/vocabulary")
    parser.add_argument("--thresholds", default="1,2,5,10", help="how often a token has to come up")
    parser.add_argument("--multiple", type=int, default=64, help="that the rows are filled up to")
    parser.add_argument("--held-out-tokens", type=int, default=32768,
                        help="of which blocks are translated")  # fmt: skip
    return parser.parse_args(argv)


def cut(loaded: Any, domain: Any, counted: Any, threshold: int, args: Any) -> dict[str, Any]:
    """One row: what stays at the threshold, and what that does to the held-out part."""
    from llm_narrow import vocabulary
    from llm_narrow.blocks import pack
    from llm_narrow.vocabulary_rows import named_ids, translated

    old = loaded.tokenizer
    used = vocabulary.used(counted, threshold)
    closed = vocabulary.closure(old, used, named=named_ids(loaded.model))
    keep = vocabulary.filled(old, closed, counted, multiple=args.multiple)
    new, ids = vocabulary.trimmed(old, keep)
    sample = pack(domain, "held_out", old, length=args.length)
    sample = sample.take(args.held_out_tokens, seed=args.seed)
    again = translated(sample, old, new, ids)
    return {
        "used": int(used.sum()),
        "closed": int(closed.sum()),
        "kept": int(keep.sum()),
        **compared([d.text for d in domain.documents["held_out"]], old, new, keep, ids),
        "longest_block": again.tokens.shape[1],
        "bytes_of_blocks_equal": int(again.sizes.sum()) == int(sample.sizes.sum()),
    }


def compared(texts: Sequence[str], old: Any, new: Any, keep: Any, ids: Any) -> dict[str, Any]:
    """Both tokenizers on the same texts, word by word, where words are what is never joined."""
    stays, renamed = keep.numpy(), ids.numpy()
    sums = dict.fromkeys(("bytes", "tokens_before", "tokens", "words", "words_of_kept",
                          "documents", "documents_decoded_alike"), 0)  # fmt: skip
    alike = True
    readers = [t.backend_tokenizer for t in (old, new)]
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        pairs = zip(*(r.encode_batch(some, add_special_tokens=False) for r in readers), strict=True)
        for text, (before, after) in zip(some, pairs, strict=True):
            was, now = np.array(before.ids), np.array(after.ids)
            word_was, word_now = np.array(before.word_ids), np.array(after.word_ids)
            gone = np.zeros(1 + word_was.max(initial=-1), bool)
            gone[word_was[~stays[was]]] = True
            alike &= np.array_equal(renamed[was[~gone[word_was]]], now[~gone[word_now]])
            sums["bytes"] += len(text.encode())
            sums["tokens_before"] += len(was)
            sums["tokens"] += len(now)
            sums["words"] += len(gone)
            sums["words_of_kept"] += int((~gone).sum())
            sums["documents"] += 1
            sums["documents_decoded_alike"] += old.decode(was) == new.decode(now)
    return {**sums, "words_of_kept_alike": bool(alike)}


def page(found: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table, and what holds for all of it."""
    head = ("seen at least", "tokens used", "+ what they need", "tokens that stay",
            "parameters saved", "of all", "held-out tokens per byte", "more tokens",
            f"longest block of {about['length']}")  # fmt: skip
    lines = []
    for row in found:
        saved = (about["rows"] - row["kept"]) * about["parameters_of_a_row"]
        lines.append((
            f"{row['threshold']}", f"{row['used']:,}", f"{row['closed']:,}", f"{row['kept']:,}",
            f"{saved / 1e6:.2f}M", f"{saved / about['parameters']:.1%}",
            f"{row['tokens'] / row['bytes']:.4f}",
            f"{row['tokens'] / row['tokens_before'] - 1:+.2%}", f"{row['longest_block']}",
        ))  # fmt: skip
    one = found[0]
    words = " · ".join(f"{row['words_of_kept']:,}" for row in found)
    checks = (
        all(row["words_of_kept_alike"] for row in found),
        all(row["documents_decoded_alike"] == row["documents"] for row in found),
        all(row["bytes_of_blocks_equal"] for row in found),
    )
    told = [
        f"{about['model']}, {about['rows']:,} rows of {about['parameters_of_a_row']} parameters, "
        f"{about['parameters']:,} in all. Domain {about['domain']}: counted in "
        f"{' and '.join(about['counted_sha256'])}, measured on all {one['documents']:,} held-out "
        f"documents ({one['bytes'] / 1e6:.1f} MB, "
        f"{one['tokens_before'] / one['bytes']:.4f} tokens per byte with the whole vocabulary).",
        f"Words of kept tokens only: {words} of {one['words']:,}. All of them encode as before: "
        f"{_said(checks[0])}. All documents decode as before: {_said(checks[1])}. Translated "
        f"blocks have their bytes: {_said(checks[2])}.",
    ]
    return results.table(head, lines) + "\n" + "\n".join(told) + "\n"


def _said(true: bool) -> str:
    return "yes" if true else "**no**"


if __name__ == "__main__":
    results.told(main)
