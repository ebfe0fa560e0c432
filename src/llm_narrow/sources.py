"""Where documents come from: pinned packages, the standard library, folders, files of rows, a hub.

A source is found at once and read later. What it yields is neither decoded nor cleaned: that, and
the split into parts, is the work of `domains`.
"""

import gzip
import hashlib
import json
import os
import platform
import re
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .errors import BadInput, Unreachable, first_line
from .packages import fetch
from .pins import Part, pinned_packages
from .progress import Track

TEXT_COLUMNS = ("text", "content", "code")
HUB_DOCUMENTS = 20_000
SEPARATOR = "<|endoftext|>"
PIECE = 8_000
_SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class Asked:
    """What the user said about a domain, besides its name; None where nothing was said."""

    glob: str | None = None
    text_column: str | None = None
    project_column: str | None = None
    max_documents: int | None = None


@dataclass(frozen=True)
class Raw:
    """One document before cleaning; `read` gives its bytes, or its text where a row holds text."""

    project: str
    path: str
    size: int | None
    read: Callable[[], Any]


@dataclass(frozen=True)
class Source:
    """Where the documents of one domain are, found but not yet read.

    what:   the source in words, for people; no two sources have the same.
    key:    text that changes whenever the documents may have changed.
    python: whether Python's cleaning applies (tests, vendored, generated, non-parsing files out).
    parts:  the part of every project, where it is fixed; empty where a hash of the project says.
    """

    what: str
    key: str
    read: Callable[[Track], Iterator[Raw]]
    python: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)


def packages() -> Source:
    """The Python files of pinned packages, read from their wheels without installing them."""
    pinned = pinned_packages()
    wheels = [package for part in pinned.values() for package in part]

    def read(track: Track) -> Iterator[Raw]:
        files = [(package, fetch(package, track)) for package in wheels]
        for package, path in track(files, "Reading packages"):
            with zipfile.ZipFile(path) as wheel:
                for entry in sorted(wheel.infolist(), key=lambda entry: entry.filename):
                    if entry.filename.endswith(".py"):
                        data = partial(wheel.read, entry)
                        yield Raw(package.name, entry.filename, entry.file_size, data)

    return Source(
        what=f"{len(wheels)} pinned packages",
        key=" ".join(package.sha256 for package in wheels),
        read=read,
        python=True,
        parts={package.name: part for part, them in pinned.items() for package in them},
    )


def standard_library() -> Source:
    """The interpreter's own standard library; a project is a top-level module or package."""
    root = Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "dist-packages", "lib-dynload", "ensurepip", "pydoc_data"}

    def read(track: Track) -> Iterator[Raw]:
        found = [path for path in walk(root) if path.endswith(".py")]
        if not found:
            raise BadInput(
                f"Python's standard library has no .py files in {root}. "
                "Use another domain, or a Python that ships its sources."
            )
        for path in track(found, "Reading the library"):
            top = path.split("/")[0]
            if top not in outside and not top.startswith("config-"):
                whole = root / path
                yield Raw(top.removesuffix(".py"), path, whole.stat().st_size, whole.read_bytes)

    version = f"{platform.python_implementation()} {platform.python_version()}"
    return Source(f"standard library of {version}", f"{version} {root}", read, python=True)


def walk(root: Path) -> list[str]:
    """Every ordinary file below `root`, sorted, with `/` between folders.

    Hidden files and folders are left out, and linked folders are not entered, so links that make
    a circle do no harm.
    """
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [n for n in inner if not n.startswith(".") and n not in _SKIPPED_FOLDERS]
        below = Path(folder)
        found += [
            (below / name).relative_to(root).as_posix()
            for name in files
            if not name.startswith(".") and (below / name).is_file()
        ]
    return sorted(found)


def matches(path: str, pattern: str) -> bool:
    """Whether a glob fits a whole relative path; `**/` stands for any number of folders."""
    rules = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))

    def rule(piece: str) -> str:
        if len(piece) > 2 and piece.startswith("[") and piece.endswith("]"):
            return f"[^{piece[2:]}" if piece[1] == "!" else piece
        return rules.get(piece, re.escape(piece))

    return re.fullmatch("".join(map(rule, pieces)), path) is not None


def folder(root: Path, asked: Asked) -> Source:
    """The files of a folder that fit a glob.

    A project is a top folder where there are at least three and none holds more than half of the
    bytes; otherwise every file is its own project.
    """
    pattern = asked.glob or "**/*"
    everything = walk(root)
    found = [path for path in everything if matches(path, pattern)]
    if not os.access(root, os.R_OK | os.X_OK):
        raise BadInput(f"{root} may not be read by this user. Change its rights, or copy it.")
    if not everything:
        raise BadInput(f"{root} holds no files. Give a folder, a file or a data set with text.")
    if not found:
        endings = Counter(Path(path).suffix or "nothing" for path in everything).most_common(5)
        deeper = f"**/{pattern}"
        better = deeper if any(matches(path, deeper) for path in everything) else "**/*"
        raise BadInput(
            f"No file of {root} fits the glob {pattern!r}. Its {len(everything)} files end in "
            f"{', '.join(f'{ending} ({n})' for ending, n in endings)}. Try --glob '{better}'."
        )
    root = root.resolve()
    stats = {path: (root / path).stat() for path in found}
    bytes_of: Counter[str] = Counter()
    for path in found:
        if "/" in path:
            bytes_of[path.split("/")[0]] += stats[path].st_size
    by_top = len(bytes_of) >= 3 and max(bytes_of.values()) * 2 <= bytes_of.total()

    def read(track: Track) -> Iterator[Raw]:
        for path in track(found, "Reading files"):
            project = path.split("/")[0] if by_top else path
            yield Raw(project, path, stats[path].st_size, (root / path).read_bytes)

    listing = "\n".join(f"{p}\t{s.st_size}\t{s.st_mtime_ns}" for p, s in stats.items())
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    what = f"folder {root}" + (f", {pattern}" if asked.glob else "")
    return Source(what, digest, read)


def rows_file(path: Path, asked: Asked) -> Source:
    """The rows of a .jsonl, .json, .csv or .parquet file, or the pieces of a .txt file."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ROWS or (path.suffix == ".gz" and kind not in ("json", "jsonl", "txt")):
        raise BadInput(
            f"{path}: a single file must be .{', .'.join(ROWS)} (.json, .jsonl and .txt may be "
            "gzipped). For other files give their folder and a --glob."
        )
    if kind == "txt" and (asked.text_column or asked.project_column):
        raise BadInput(f"{path} is plain text and has no columns. Leave the column options out.")

    def read(track: Track) -> Iterator[Raw]:
        rows = ROWS[kind](path)
        yield from _documents(track(rows, "Reading rows"), asked, str(path))

    stat = path.stat()
    return Source(f"file {path.resolve()}", f"{stat.st_size} {stat.st_mtime_ns}", read)


Row = Mapping[str, Any]


def _documents(rows: Iterator[Row], asked: Asked, where: str) -> Iterator[Raw]:
    """A document from each row; the columns are checked on the first one.

    A row that tells its path keeps it, so that cleaning knows tests and vendored files there too.
    """
    text = asked.text_column
    for number, row in enumerate(rows):
        if number == 0:
            text = _checked_columns(list(row), asked, where)
        path = f"row {number:09d}"
        if isinstance(row.get("path"), str):
            path = f"{path}/{row['path']}"
        value = row.get(text or "")
        project = row.get(asked.project_column) if asked.project_column else None
        yield Raw(path if project is None else str(project), path, None, partial(_same, value))


def _same(value: Any) -> Any:
    return value


def _checked_columns(columns: list[str], asked: Asked, where: str) -> str:
    """The name of the text column; BadInput that lists the columns if one that is needed lacks."""
    listing = f"It has: {', '.join(columns)}."
    if asked.text_column is None and not set(columns) & set(TEXT_COLUMNS):
        names = " nor ".join(TEXT_COLUMNS)
        raise BadInput(f"{where} has no column {names}. {listing} Name one with --text-column.")
    lacking = [
        f"no column {column!r} ({option})"
        for option, column in [
            ("--text-column", asked.text_column),
            ("--project-column", asked.project_column),
        ]
        if column is not None and column not in columns
    ]
    if lacking:
        raise BadInput(f"{where} has {' and '.join(lacking)}. {listing}")
    return asked.text_column or next(name for name in TEXT_COLUMNS if name in columns)


def _jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_row(path, f"line {number}", line)


def _json_row(path: Path, where: str, data: bytes) -> Row:
    try:
        row = json.loads(data)
    except ValueError as error:
        raise BadInput(f"{path}: {where} is not valid JSON ({error}). Mend or remove it.") from None
    if not isinstance(row, dict):
        raise BadInput(f"{path}: {where} is not an object with columns. Mend or remove it.")
    return row


def _json(path: Path) -> Iterator[Row]:
    """The objects of a JSON list; many files named .json hold one object on each line instead."""
    with _open(path) as file:
        start = file.read(4096).lstrip()[:1]
    if start == b"{":
        yield from _jsonl(path)
        return
    with _open(path) as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            raise BadInput(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} must be a JSON list of objects, or one object on each line.")
    yield from rows


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _csv(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, csv  # type: ignore[import-untyped]

    try:
        table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True))
    except ArrowInvalid as error:
        raise BadInput(f"{path} is not a valid CSV file ({error}).") from None
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is not a whole parquet file ({error}).") from None


def _txt(path: Path) -> Iterator[Row]:
    """The texts between `<|endoftext|>` marks; failing those, pieces, cut at blank lines if any."""
    with _open(path) as file:
        data: bytes = file.read()
    if SEPARATOR.encode() in data:
        yield from ({"text": text} for text in data.split(SEPARATOR.encode()))
        return
    piece: list[bytes] = []
    size = 0
    for line in chain.from_iterable(map(_short, data.splitlines(keepends=True))):
        piece.append(line)
        size += len(line)
        if (size >= PIECE and not line.strip()) or size >= 2 * PIECE:
            yield {"text": b"".join(piece)}
            piece, size = [], 0
    yield {"text": b"".join(piece)}


def _short(line: bytes) -> Iterator[bytes]:
    """The line in parts of less than PIECE bytes, cut after a blank, or else between characters.

    A whole book may stand on one line, and as one piece it could not be shared out.
    """
    while len(line) > PIECE:
        cut = line.rfind(b" ", 0, PIECE) + 1 or PIECE
        while cut > 1 and line[cut] & 0xC0 == 0x80:  # inside a character of several bytes
            cut -= 1
        yield line[:cut]
        line = line[cut:]
    yield line


ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "csv": _csv,
    "json": _json,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "txt": _txt,
}


def hub(name: str, asked: Asked, *, python: bool = False) -> Source:
    """The first rows of a hub data set, streamed: `asked.max_documents`, or HUB_DOCUMENTS."""
    most = asked.max_documents or HUB_DOCUMENTS

    def read(track: Track) -> Iterator[Raw]:
        local = "Local ways: --domain python-stdlib, a folder, or a .jsonl, .parquet or .txt file."
        first = islice(streamed(name, "train", local=local), most)
        rows = track(first, "Streaming rows", most)
        yield from _documents(rows, asked, f"hub data set {name}")

    return Source(f"hub data set {name}, first {most:,} rows", f"hub {name} {most}", read, python)


HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?(?:@([\w./-]+))?")


def streamed(name: str, split: str, *, local: str) -> Iterator[Row]:
    """The rows of a data set of the hub or in a folder, of the split if it has it, else the first.

    `name` is a folder or ORG/NAME, ORG/NAME:CONFIG, ORG/NAME@REVISION or all of it. Raises BadInput
    and Unreachable, which end with `local`, the ways that need no hub.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    found = None if Path(name).is_dir() else HUB_NAME.fullmatch(name)
    repo, config, revision = found.groups() if found else (name, None, None)
    try:
        splits = load_dataset(repo, config, revision=revision, streaming=True)
        yield from splits[split if split in splits else next(iter(splits))]
    except FileNotFoundError as error:
        told = f"There is no open data set {name!r}: {first_line(error)} {local}"
        raise BadInput(told) from error
    except (OSError, HTTPError) as error:
        told = f"Data set {name!r} cannot be reached now: {first_line(error)} {local}"
        raise Unreachable(told) from error
    except (ValueError, DatasetsError) as error:
        if str(error).startswith("Config name is missing"):
            names = re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])
            raise BadInput(
                f"Data set {name!r} has several configurations: {', '.join(names)}. "
                f"Name one, as {repo}:{names[0] if names else 'CONFIG'}."
            ) from error
        raise BadInput(f"Data set {name!r} cannot be read: {first_line(error)} {local}") from error
