"""Tiny models and domains on disk, as a user would have them."""

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tiny import tiny

WORDS = ("the", "unit", "group", "score", "keep", "narrow", "model", "code", "def", "return", "for")


def sentences(seed: int, count: int) -> str:
    """Text of `count` lines that no other seed gives."""
    chance = random.Random(seed)
    lines = (" ".join(chance.choices(WORDS, k=8)) + f" {chance.random():.6f}" for _ in range(count))
    return "\n".join(lines) + "\n"


def write_model(
    folder: Path, kind: str = "llama", *, vocabulary: int = 320, more: str = "", **changes: object
) -> Path:
    """A tiny model of the kind with a byte-level tokenizer, as a stock checkpoint folder.

    `more` is text that the tokenizer is trained on beside that of the domain.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(99, 200), more], trainer)
    settings = {"vocab_size": 384, "max_position_embeddings": 256, **changes}
    tiny(kind, **settings).save_pretrained(folder)  # type: ignore[operator]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def write_domain(folder: Path, files: int = 40) -> Path:
    """A folder of text files, each of its own words and numbers, in ten top folders."""
    for number in range(files):
        file = folder / f"project{number % 10}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(sentences(number, 30))
    return folder
