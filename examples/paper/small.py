"""A language model small enough to be cut and trained again many times on one core.

    python examples/paper/small.py --out runs/small
    llm-narrow recover runs/small/fresh --domain runs/small/texts.jsonl ...

Writes OUT/fresh, a model of fresh weights with a tokenizer of its own, and OUT/texts.jsonl, as much
text of each of `--domains`, to train it on; OUT/small.json comes last. The domain that it is
narrowed to later is none of them.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_narrow import domains
from llm_narrow.errors import BadInput
from llm_narrow.paper_toys import keep, told
from llm_narrow.progress import shown

END = "<|endoftext|>"
LAYERS, HEADS, LONGEST = 4, 4, 512


def main(argv: Sequence[str] | None = None) -> None:
    """Write what is not there."""
    args = parse(argv)
    console = Console(stderr=True, highlight=False)
    file = args.out / "small.json"
    if file.exists():
        console.print(f"There is {file} already.")
        return
    rows = [row for name in args.domains.split(",")
            for row in some(name, args.megabytes, args.seed, shown(console))]  # fmt: skip
    random.Random(args.seed).shuffle(rows)
    keep(args.out / "texts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = learned([row["text"] for row in rows], args.vocabulary)
    model = fresh(len(tokenizer), args.hidden, args.seed)
    model.save_pretrained(args.out / "fresh")
    tokenizer.save_pretrained(args.out / "fresh")
    about = {"domains": args.domains.split(","), "documents": len(rows), "seed": args.seed,
             "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    keep(file, json.dumps(about) + "\n")
    console.print(f"Written: {args.out}, {about['parameters']:,} parameters")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--domains", default="english,python-stdlib", help="with commas between")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of each domain")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens")
    parser.add_argument("--hidden", type=int, default=96, help="channels; neurons are four times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="a folder of its own")
    args = parser.parse_args(argv)
    if args.vocabulary < 257 or args.hidden < 1 or args.hidden % (2 * HEADS):
        raise BadInput(
            f"--vocabulary must be at least 257 and --hidden a multiple of {2 * HEADS}, got "
            f"{args.vocabulary} and {args.hidden}."
        )
    return args


def some(name: str, megabytes: float, seed: int, track: Any) -> list[dict[str, str]]:
    """Documents of the training part in a random order, up to so much text."""
    documents = list(domains.load(name, track=track).documents["train"])
    random.Random(seed).shuffle(documents)
    rows, size = [], 0
    for document in documents:
        if size >= 1e6 * megabytes:
            break
        rows.append({"text": document.text, "project": f"{name} {document.project}"})
        size += len(document.text.encode())
    return rows


def learned(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of the pairs that are most frequent in the texts."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token=END, eos_token=END)


def fresh(vocabulary: int, hidden: int, seed: int) -> LlamaForCausalLM:
    """A llama of fresh weights; neurons are two thirds of it, as they are of large ones."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=LONGEST, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


if __name__ == "__main__":
    told(main)
