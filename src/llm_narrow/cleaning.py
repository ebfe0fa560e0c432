"""Which documents are fit to narrow on: what is dropped, and why.

Dropped are texts that cannot be read, Python that nobody wrote as an example to follow, and copies:
a held-out document that largely repeats a training one would make every figure look better.
"""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pins import PARTS, Part
from .progress import Track
from .sources import Raw

CLEANING = 1  # raised whenever the rules below change, so that what was cached before is not found
LARGEST = 2_000_000  # bytes of one document
LARGEST_PYTHON = 250_000
SHINGLE = 6  # lines
MOST_SHARED = 0.3  # of a document's shingles, with the parts before its own

Hashes = npt.NDArray[np.uint64]

_TESTS = re.compile(
    r"(^|/)(tests?|testing|[^/]*_tests?)/|(^|/)(test_[^/]*|[^/]*_test|tests?|conftest)\.py$"
)
_VENDORED = re.compile(
    r"(^|/)(_?vendor(ed)?|_?vendored_packages|extern|_?externals|_?third_?party)/", re.IGNORECASE
)
_GENERATED_NAME = re.compile(r"(_pb2|_pb2_grpc|(^|/)_?version|(^|/)_?versioneer)\.py$")
_GENERATED = re.compile(
    r"^\s*#.*(auto-?\s?generated|\bgenerated\b|\bdo(n't| not) (edit|modify))"
    r"|^\W*this (file|module) (is|was) (auto|generated)",
    re.IGNORECASE | re.MULTILINE,
)
_HEAD = 600  # characters in which a generated file says so


@dataclass(frozen=True)
class Document:
    """One text, the project that it belongs to, and where in it."""

    project: str
    path: str
    text: str


def clean(raw: Raw, python: bool) -> Document | str:
    """The document, or in a word why it is dropped; what is cheap to see is looked at first."""
    if python:
        if _TESTS.search(raw.path):
            return "test"
        if _VENDORED.search(raw.path):
            return "vendored"
    largest = LARGEST_PYTHON if python else LARGEST
    if raw.size is not None and raw.size > largest:
        return "too large"
    try:
        data = raw.read()
    except OSError:
        return "cannot be read"
    if not isinstance(data, str | bytes):
        return "no text"
    nul = b"\0" if isinstance(data, bytes) else "\0"
    if nul in data:  # type: ignore[operator]
        return "binary"
    try:
        encoded = data.encode() if isinstance(data, str) else data
        text = encoded.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeError:
        return "not UTF-8"
    if not text.strip():
        return "empty"
    if len(encoded) > largest:
        return "too large"
    if python:
        if _GENERATED_NAME.search(raw.path) or _GENERATED.search(text[:_HEAD]):
            return "generated"
        if not _parses(text):
            return "does not parse"
    return Document(_printable(raw.project), _printable(raw.path), text)


def _printable(name: str) -> str:
    """The name as it can be stored: a disk and JSON can hold names that are not Unicode."""
    return name.encode("utf-8", "replace").decode()


def _parses(text: str) -> bool:
    """Whether Python takes the text; `compile` says so in half the time of `ast.parse`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "document", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False
    return True


def digest(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def without_equals(documents: Sequence[Document], dropped: Counter[str]) -> list[Document]:
    """The documents in order, of equal texts only the first."""
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(digest(document.text.strip()), document)
    if copies := len(documents) - len(first):
        dropped["duplicate"] += copies
    return list(first.values())


def without_copies(
    by_part: Mapping[Part, Sequence[Document]], dropped: Counter[str], track: Track
) -> dict[Part, tuple[Document, ...]]:
    """The documents that do not largely repeat what earlier parts say.

    Earlier parts win, so the held-out part loses whatever was also narrowed on.
    """
    seen: Hashes = np.empty(0, np.uint64)
    kept: dict[Part, tuple[Document, ...]] = {}
    for part in PARTS:
        clean, new = [], []
        for document in track(by_part[part], f"Comparing {part}"):
            shingles = _shingles(document.text)
            if _share(shingles, seen) > MOST_SHARED:
                dropped[f"near-duplicate across the split, in {part}"] += 1
                continue
            clean.append(document)
            new.append(shingles)
        kept[part] = tuple(clean)
        seen = np.sort(np.concatenate([seen, *new]))
    return kept


def _shingles(text: str) -> Hashes:
    """The hashes of every SHINGLE lines in a row, blank lines and spacing left out."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    digests = [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines if line]
    hashes = np.frombuffer(b"".join(digests), "<u8")
    width = min(SHINGLE, len(hashes))
    windows = np.zeros(len(hashes) - width + 1, np.uint64)
    for place in range(width):
        # An odd factor for each place, wrapping at 2**64, so that the order of lines counts.
        factor = np.uint64(0x9E3779B97F4A7C15 * (2 * place + 1) % 2**64)
        windows += hashes[place : place + len(windows)] * factor
    return windows


def _share(values: Hashes, in_sorted: Hashes) -> float:
    """The share of `values` that is found in the sorted ones."""
    if not len(in_sorted):
        return 0.0
    places = np.searchsorted(in_sorted, values).clip(max=len(in_sorted) - 1)
    return float((in_sorted[places] == values).mean())
