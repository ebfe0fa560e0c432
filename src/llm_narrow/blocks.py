"""A part of a domain as packed blocks of token ids, tokenised once and kept on disk.

Every token carries the number of UTF-8 bytes that it adds and the document that it belongs to, so
that a loss can be told per byte, and its spread over documents.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .cache import cache_dir, written_whole
from .domains import Domain, Part
from .errors import BadInput
from .progress import Track, silent

AT_ONCE = 64  # documents tokenised in one call
PACKING = 1  # raised whenever packing changes, so that what was cached before is not found

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Blocks:
    """Packed text: (n, length) token ids with a separator after each document.

    tokens:    int32 token ids.
    sizes:     int16, UTF-8 bytes that each token adds, 0 for separators. They sum to the bytes of
               the text exactly, also where several tokens make up one character.
    documents: int32, index in the part of the document that each token belongs to.
    sha256:    of the token ids.
    """

    tokens: Tensor
    sizes: Tensor
    documents: Tensor
    sha256: str

    def take(self, tokens: int, *, seed: int) -> "Blocks":
        """A seeded choice of whole blocks without replacement, of at least `tokens` tokens.

        With one seed, a smaller choice is the beginning of a larger one. Raises BadInput if there
        are too few.
        """
        count, length = self.tokens.shape
        wanted = max(1, -(-tokens // length))
        if wanted > count:
            raise BadInput(
                f"{tokens:,} tokens were asked for, but the data hold {count * length:,} in whole "
                f"blocks of {length}. Ask for fewer tokens or give more data."
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return self.only(order[:wanted])

    def halves(self) -> tuple["Blocks", "Blocks"]:
        """Every other block, and the rest. Raises BadInput where there is only one block."""
        count, length = self.tokens.shape
        if count < 2:
            raise BadInput(
                f"Two halves need at least 2 blocks of {length} tokens, got {count}. "
                "Ask for more tokens or shorter blocks."
            )
        return self.only(torch.arange(0, count, 2)), self.only(torch.arange(1, count, 2))

    def batches(self, size: int) -> Sequence[Tensor]:
        """The token ids in order, as int64 tensors of (size, length); the last may be smaller."""
        return [
            self.tokens[start : start + size].long() for start in range(0, len(self.tokens), size)
        ]

    def only(self, blocks: Tensor) -> "Blocks":
        """The blocks at the given places, (n,) int64."""
        tokens = self.tokens[blocks]
        return Blocks(tokens, self.sizes[blocks], self.documents[blocks], hashed(tokens))


def pack(
    domain: Domain, part: Part, tokenizer: Any, *, length: int = 512, track: Track = silent
) -> Blocks:
    """All documents of a part in a fixed shuffled order, end to end, cut into blocks.

    What is left after the last whole block is dropped. Cached by the part's and the tokenizer's
    hash and the length. Raises BadInput if the text is shorter than a block, or the tokenizer
    cannot separate documents or tell where tokens come from.
    """
    _check(tokenizer)
    key = f"{PACKING} {domain.sha256[part]} {_tokenizer_hash(tokenizer)} {length}"
    folder = cache_dir() / "blocks" / hashlib.sha256(key.encode()).hexdigest()[:16]
    with suppress(OSError, SafetensorError):
        return _read(folder)
    blocks = _packed(domain, part, tokenizer, length, track)
    with written_whole(folder, force=True) as partial:
        tensors = {"tokens": blocks.tokens, "sizes": blocks.sizes, "documents": blocks.documents}
        save_file(tensors, partial / "blocks.safetensors", {"sha256": blocks.sha256})
    return blocks


def _read(folder: Path) -> Blocks:
    with safe_open(folder / "blocks.safetensors", "pt") as file:
        tokens, sizes, documents = map(file.get_tensor, ("tokens", "sizes", "documents"))
        return Blocks(tokens, sizes, documents, file.metadata()["sha256"])


def _check(tokenizer: Any) -> None:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"The tokenizer of {name} is not a fast one, which token sizes are read from. "
            "Save it once with a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"The tokenizer of {name} has no end-of-text token, which separates documents. "
            "Set eos_token in its tokenizer_config.json."
        )


def _tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what decides about token ids, as tokenizer.json has it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
    told = json.dumps([*(content[name] for name in names), tokenizer.eos_token_id])
    return hashlib.sha256(told.encode()).hexdigest()


def _packed(domain: Domain, part: Part, tokenizer: Any, length: int, track: Track) -> Blocks:
    documents = domain.documents[part]
    shuffled = sorted(
        range(len(documents)),
        key=lambda index: hashlib.sha256(documents[index].text.encode()).digest(),
    )
    found = tokenised([documents[index].text for index in shuffled], tokenizer)
    ids, sizes, owners = [], [], []
    for index in track(shuffled, f"Tokenising {part}"):
        own = next(found)
        ids.append(np.append(own.ids, np.int32(tokenizer.eos_token_id)))
        sizes.append(np.append(own.sizes, np.int32(0)))
        owners.append(np.full(len(own.ids) + 1, index, np.int32))
    total = sum(map(len, ids))
    if total < length:
        raise BadInput(
            f"The {part} part of domain {domain.name!r} has {total:,} tokens, but a block takes "
            f"{length:,}. Give more data or ask for shorter blocks (--length)."
        )
    tokens, bytes_of, owner = (
        torch.from_numpy(np.concatenate(column)[: total // length * length].reshape(-1, length))
        for column in (ids, sizes, owners)
    )
    fits = bytes_of.max() < 2**15
    return Blocks(tokens, bytes_of.short() if fits else bytes_of, owner, hashed(tokens))


@dataclass(frozen=True)
class _Tokens:
    ids: Ints
    sizes: Ints


def tokenised(texts: Sequence[str], tokenizer: Any) -> Iterator[_Tokens]:
    """The ids and sizes of each text; special tokens that a text spells out stay plain text."""
    # A copy, because the settings are the tokenizer's own and the user goes on using it.
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    bytes_of = _bytes_by_id(own)
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        for text, encoding in zip(
            some, own.encode_batch_fast(some, add_special_tokens=False), strict=True
        ):
            ids = np.array(encoding.ids, np.int32)
            size = len(text.encode())
            if bytes_of is None or (sizes := bytes_of[ids]).sum() != size:
                # Anew, since the fast way leaves out where in the text each token comes from.
                exact = own.encode(text, add_special_tokens=False)
                ids, sizes = np.array(exact.ids, np.int32), _by_offsets(text, exact.offsets)
            yield _Tokens(ids, sizes)


def _bytes_by_id(tokenizer: Tokenizer) -> Ints | None:
    """The bytes of every token of a byte-level vocabulary, whose letters stand for a byte each."""
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for token, index in vocabulary.items():
        table[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        table[index] = len(added.content.encode())
    return table


def _by_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> Ints:
    """The bytes that each token adds, from the character after its last one.

    What no token claims (spaces, as a rule) counts for the token after it, and at the end of the
    text for the last one; a character made of several tokens counts for the first of them.
    """
    if not offsets:
        return np.empty(0, np.int32)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(np.int32) + (codes > 0xFFFF)
    ends_at = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    return np.diff(ends_at[ends], prepend=0).astype(np.int32)


def hashed(tokens: Tensor) -> str:
    """The hash that blocks of these tokens have."""
    return hashlib.sha256(tokens.numpy().astype("<i4").tobytes()).hexdigest()
