"""The vocabulary as units: which tokens a domain needs, and a tokenizer that knows no others.

Why text made of kept tokens encodes as before. BPE joins, again and again, the adjacent pair of
lowest rank, leftmost first. Take a word that ends as the tokens t1 … tn. Nothing was ever joined
across the border between two of them, so within each the joins were, one by one, those that BPE
makes of its characters alone. `closure` replays these and keeps every symbol that comes up, and
`trimmed` keeps, in their order, all joins of kept symbols. So at every step the trimmed tokenizer
sees the pairs that there were, less some that were not chosen then, and chooses the same one.

Unigram takes the segmentation of highest score, which it stays with some of its rivals gone. The
penalty of an unknown character follows from the lowest score of all pieces, so that piece stays.
"""

import copy
import heapq
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from . import blocks as packing
from .blocks import Blocks
from .errors import BadInput, problems

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # tokens that spell any character
TALK = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]


def size(tokenizer: Any) -> int:
    """One more than the highest id that the tokenizer gives."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def counts(text: Blocks | Iterable[str], tokenizer: Any) -> Tensor:
    """How often each token comes up in the text, (size(tokenizer),) int64.

    Give the training part of a domain, never the held-out one: what stays would be chosen by what
    it is measured on. Raises BadInput for no text, and for blocks of another tokenizer.
    """
    total = size(tokenizer)
    found = torch.zeros(total, dtype=torch.int64)
    if isinstance(text, Blocks):
        if text.sizes.any():
            found = text.tokens.flatten().long().bincount(minlength=total)
    else:
        for own in packing.tokenised([t for t in text if t], tokenizer):
            found += torch.from_numpy(own.ids).long().bincount(minlength=total)
    if len(found) > total:
        raise BadInput(
            f"The blocks hold token {len(found) - 1}, and the ids of the tokenizer end at "
            f"{total - 1}. Give blocks of this tokenizer."
        )
    if not found.any():
        raise BadInput("The domain has no text to count tokens in. Give it some.")
    return found


def used(counted: Tensor, threshold: int = 1) -> Tensor:
    """Which tokens came up at least `threshold` times, bool.

    Raises BadInput for a threshold below 1 and for one that leaves nothing.
    """
    highest = int(counted.max())
    if not 1 <= threshold <= highest:
        raise BadInput(
            f"The threshold of the vocabulary must be from 1 to {highest:,}, the count of the most "
            f"frequent token, got {threshold:,}. Lower it or give more text."
        )
    return counted >= threshold


def closure(
    tokenizer: Any, wanted: Tensor, *, keep_special: bool = True, named: Iterable[int] = ()
) -> Tensor:
    """What has to stay if the wanted tokens (a mask or ids) do, (size(tokenizer),) bool.

    With them stay every symbol that they are joined from; every single character, or the bytes
    where these can spell any character; the special tokens, the text of the chat template, and
    `named`, the ids that the model's configs name. Added tokens that nothing names stay unless
    `keep_special` is False. Raises BadInput for ids out of range and for a tokenizer that cannot
    be trimmed.
    """
    tokens = _read(tokenizer)
    keep = _mask(tokens, wanted)
    needed = {*_always(tokens, tokenizer), *_talk(tokenizer), *named}
    if keep_special:
        needed.update(tokens.added)
    return _closed(tokens, keep | _mask(tokens, torch.tensor(sorted(needed))))


def filled(
    tokenizer: Any, keep: Tensor, counted: Tensor, *, multiple: int = 64, least: int = 0
) -> Tensor:
    """A closure with further tokens up to a whole multiple and to `least`, most frequent first.

    So no row is a dummy. Of equally frequent ones lower ids, learnt earlier by BPE, come first.
    """
    tokens = _read(tokenizer)
    keep = _mask(tokens, keep)
    room = -(-max(int(keep.sum()), least) // multiple) * multiple - int(keep.sum())
    for index in counted.argsort(descending=True, stable=True).tolist():
        if room == 0:
            break
        if keep[index] or index not in tokens.texts or index in tokens.added:
            continue
        symbols = tokens.symbols(index)
        missing = [] if symbols is None else [i for i in {index, *symbols} if not keep[i]]
        if 0 < len(missing) <= room:
            keep[missing] = True
            room -= len(missing)
    return keep


def trimmed(tokenizer: Any, keep: Tensor) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """A tokenizer of the kept tokens only, and old id -> new id (size(tokenizer),), -1 if gone.

    `keep` is a mask or ids, as from `closure`. New ids are compact and in the old order. Text made
    of kept tokens encodes as before, any other text into tokens that decode to the same. Special
    tokens, chat template and settings are those of the old one. Raises BadInput where a token that
    has to stay would go, and for a tokenizer that cannot be trimmed.
    """
    tokens = _read(tokenizer)
    keep = _mask(tokens, keep)
    _refuse_open(tokens, tokenizer, keep)
    new_ids = keep.long().cumsum(0).sub(1).masked_fill(~keep, -1)
    content = _rewritten(tokens, new_ids)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        config = Path(place) / "tokenizer_config.json"
        settings = json.loads(config.read_text("utf-8"))
        settings.pop("added_tokens_decoder", None)
        # Classes of one architecture would make the tokenizer anew by rules of their own.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(settings), "utf-8")
        (Path(place) / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        new: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            place, local_files_only=True
        )
    new.name_or_path = tokenizer.name_or_path
    expected = {text: int(new_ids[i]) for i, text in tokens.texts.items() if keep[i]}
    if new.get_vocab() != expected:
        raise BadInput(
            f"The tokenizer of {tokens.name} has gaps between its ids, or added tokens out of "
            "order: its ids cannot be made compact. Leave its vocabulary as it is."
        )
    return new, new_ids


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer as read: its JSON, its tokens, and for BPE what each pair of them makes."""

    name: str
    content: dict[str, Any]
    ids: dict[str, int]
    texts: dict[int, str]
    added: frozenset[int]
    pairs: dict[tuple[int, int], tuple[int, int]]  # (left, right) -> (rank, joined)
    makers: dict[int, list[tuple[int, int]]]  # joined -> its pairs

    def symbols(self, index: int) -> set[int] | None:
        """All symbols that come up while the token is joined; None if no text is joined to it."""
        if self.content["model"]["type"] == "Unigram":
            return set()
        start = [self.ids.get(letter) for letter in self.texts[index]]
        known = [i for i in start if i is not None]
        if len(known) < len(start):
            return None
        ended, joined = _joins(known, self.pairs)
        return {*known, *joined} if ended == [index] else None


def _joins(
    symbols: list[int], pairs: dict[tuple[int, int], tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """What BPE makes of a word: the tokens it ends as, and every join on the way, in order.

    By the rules of the `tokenizers` library, including that a pair which changed while it waited
    is still joined if it now makes the same token.
    """
    own: list[int | None] = list(symbols)
    before, after = list(range(-1, len(own) - 1)), list(range(1, len(own) + 1))
    waiting: list[tuple[int, int, int]] = []  # rank, position, joined

    def consider(at: int) -> None:
        if at >= 0 and after[at] < len(own):
            found = pairs.get((own[at], own[after[at]]))  # type: ignore[arg-type]
            if found is not None:
                heapq.heappush(waiting, (found[0], at, found[1]))

    for at in range(len(own) - 1):
        consider(at)
    made = []
    while waiting:
        _, at, joined = heapq.heappop(waiting)
        right = after[at]
        if own[at] is None or right >= len(own):
            continue
        now = pairs.get((own[at], own[right]))  # type: ignore[arg-type]
        if now is None or now[1] != joined:
            continue
        own[at], own[right] = joined, None
        after[at] = after[right]
        if after[at] < len(own):
            before[after[at]] = at
        made.append(joined)
        consider(before[at])
        consider(at)
    return [i for i in own if i is not None], made


def _read(tokenizer: Any) -> _Tokens:
    """The tokenizer taken apart. Raises BadInput, with the reason, if it cannot be trimmed."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"The tokenizer of {name} is not a fast one, whose file could be rewritten. "
            "Save it once with a tokenizer.json."
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    wrong = None
    if model["type"] not in ("BPE", "Unigram"):
        wrong = f"it is a {model['type']} tokenizer, and only BPE and Unigram ones can be"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        wrong = "its tokens carry marks of where in a word they stand"
    elif model.get("dropout"):
        wrong = "it drops joins at random (dropout), so that no text has one encoding"
    if wrong:
        raise BadInput(
            f"The tokenizer of {name} cannot be trimmed: {wrong}. Leave its vocabulary as it is."
        )
    ids = tokenizer.get_vocab()
    pairs, makers = {}, dict[int, list[tuple[int, int]]]()
    for rank, (left, right) in enumerate(model.get("merges", ())):
        pair = ids[left], ids[right]
        pairs[pair] = rank, ids[left + right]
        makers.setdefault(ids[left + right], []).append(pair)
    added = frozenset(tokenizer.backend_tokenizer.get_added_tokens_decoder())
    return _Tokens(name, content, ids, {i: t for t, i in ids.items()}, added, pairs, makers)


def _mask(tokens: _Tokens, wanted: Tensor) -> Tensor:
    """A mask or ids as a mask over the vocabulary, always a copy; BadInput for ids beyond it."""
    total = 1 + max(tokens.texts)
    ids = wanted.nonzero().flatten() if wanted.dtype == torch.bool else wanted.long()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < total:
        outside = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise BadInput(
            f"Token id {outside} is out of range: those of the tokenizer of {tokens.name} go from "
            f"0 to {total - 1}."
        )
    mask = torch.zeros(total, dtype=torch.bool).index_fill_(0, ids, True)
    mask[[i for i in ids.tolist() if i not in tokens.texts]] = False  # numbers that are no token
    return mask


def _closed(tokens: _Tokens, keep: Tensor) -> Tensor:
    """`keep` with all that its tokens are joined from."""
    keep = keep.clone()
    waiting = keep.nonzero().flatten().tolist()
    while waiting:
        index = waiting.pop()
        symbols = tokens.symbols(index)
        if symbols is None:
            # It comes from no text, or only as a whole word: whatever could make it stays.
            symbols = {part for pair in tokens.makers.get(index, ()) for part in pair}
        for symbol in symbols:
            if not keep[symbol]:
                keep[symbol] = True
                waiting.append(symbol)
    return keep


def _always(tokens: _Tokens, tokenizer: Any) -> dict[int, str]:
    """The tokens without which the tokenizer would not be what it is, and why each has to stay."""
    content, model = tokens.content, tokens.content["model"]
    found: dict[int, str] = {}
    spelled = bool(model.get("byte_fallback")) and tokens.ids.keys() >= BYTES
    letters = BYTES | _written(content) if spelled else {t for t in tokens.ids if len(t) == 1}
    for text, index in tokens.ids.items():
        # Of characters that have no token of their own, every token that has them.
        if text in letters or not (spelled or index in tokens.added or letters.issuperset(text)):
            found[index] = "spells what no other token does"
    if model["type"] == "Unigram":
        lowest = min(model["vocab"], key=lambda piece: piece[1])
        found[tokens.ids[lowest[0]]] = "has the lowest score, which that of unknown text follows"
        if model.get("unk_id") is not None:
            found[model["unk_id"]] = "is the unknown token"
    elif model.get("unk_token") in tokens.ids:
        found[tokens.ids[model["unk_token"]]] = "is the unknown token"
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    for index, entry in tokenizer.backend_tokenizer.get_added_tokens_decoder().items():
        if entry.single_word:  # it may keep another added token from being found
            found[index] = "is an added token of whole words"
        if entry.content in template:
            found[index] = "is in the chat template"

    def put_in(index: int) -> int:
        found[index] = "is put in by the tokenizer itself"
        return index

    _processed(content["post_processor"], put_in)
    if content.get("padding"):
        put_in(content["padding"]["pad_id"])
    for role, value in tokenizer.special_tokens_map.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if str(text) in tokens.ids:
                found[tokens.ids[str(text)]] = f"is the {role}"
    return found


def _written(node: Any) -> frozenset[str]:
    """The characters that normalizer, pre-tokenizer and decoder write, as ▁ for a space.

    Bytes do not decode back to what these stand for.
    """
    parts = [node[name] for name in ("normalizer", "pre_tokenizer", "decoder")]
    letters: set[str] = set()
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            keys = ("content", "prepend", "replacement")
            letters.update(c for k in keys if isinstance(part.get(k), str) for c in part[k])
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part)
    return frozenset(letters)


def _talk(tokenizer: Any) -> set[int]:
    """The tokens of what the chat template puts around messages."""
    if not tokenizer.chat_template:
        return set()
    with suppress(Exception):  # a template is a program, and may refuse an empty message
        text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        return set(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    return set()


def _refuse_open(tokens: _Tokens, tokenizer: Any, keep: Tensor) -> None:
    """Raise BadInput where something goes that has to stay."""
    found = [
        f"{tokens.texts[index]!r} ({index}) {why}; keep it"
        for index, why in sorted(_always(tokens, tokenizer).items())
        if not keep[index]
    ]
    parts = (_closed(tokens, keep) & ~keep).nonzero().flatten().tolist()
    found += [
        f"{tokens.texts[index]!r} ({index}) is part of a token that stays; keep it too (`closure`)"
        for index in parts
    ]
    if found:
        more = [f"… and {len(found) - 8} more"] if len(found) > 8 else []
        raise problems(f"The vocabulary kept of {tokens.name}", [*found[:8], *more])


def _rewritten(tokens: _Tokens, new_ids: Tensor) -> dict[str, Any]:
    """The JSON of the tokenizer with the kept tokens only, under their new ids."""
    ids = new_ids.tolist()
    content = copy.deepcopy(tokens.content)
    model = content["model"]
    if model["type"] == "BPE":
        model["vocab"] = {t: ids[i] for t, i in model["vocab"].items() if ids[i] >= 0}
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if all(text in model["vocab"] for text in (left, right, left + right))
        ]
    else:
        model["vocab"] = [p for i, p in enumerate(model["vocab"]) if ids[i] >= 0]
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["unk_id"]]
    added = [{**entry, "id": ids[entry["id"]]} for entry in content["added_tokens"]]
    content["added_tokens"] = [entry for entry in added if entry["id"] >= 0]
    _processed(content["post_processor"], lambda index: int(ids[index]))
    if content.get("padding"):
        content["padding"]["pad_id"] = ids[content["padding"]["pad_id"]]
    return content


def _processed(processor: Any, new: Callable[[int], int]) -> None:
    """Put `new(id)` in the place of every id that a post-processor holds."""
    match processor and processor["type"]:
        case "Sequence":
            for part in processor["processors"]:
                _processed(part, new)
        case "TemplateProcessing":
            for entry in processor["special_tokens"].values():
                entry["ids"] = [new(index) for index in entry["ids"]]
        case "BertProcessing" | "RobertaProcessing":
            for key in ("sep", "cls"):
                processor[key][1] = new(processor[key][1])
