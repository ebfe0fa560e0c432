"""Where downloads and conversions are kept, and how a folder is written: whole or not at all."""

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from .errors import BadInput
from .progress import Track, silent

CHUNK = 1 << 24  # bytes read at a time when hashing


def cache_dir() -> Path:
    """`$LLM_NARROW_CACHE`, else `llm-narrow` in `$XDG_CACHE_HOME`, else `~/.cache/llm-narrow`."""
    if own := os.environ.get("LLM_NARROW_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(shared).expanduser() / "llm-narrow").absolute()


@contextmanager
def written_whole(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target` to write into; it becomes `target` when the block ends well.

    If the block raises anything (Ctrl-C too), the folder is removed and what stood at `target`
    stays. Raises BadInput where `target` exists and not `force`, where it cannot be written, and
    where the disk is full.
    """
    target = target.expanduser().absolute()
    _check_free(target, force)
    fresh = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _discard(fresh)  # left by a killed process that had our id
        fresh.mkdir()
    except OSError as error:
        ours = target.is_relative_to(cache_dir())
        way = "Name another cache with LLM_NARROW_CACHE" if ours else "Choose another folder"
        raise no_space(error, target) or BadInput(
            f"{target} cannot be written: {error.strerror or error}. {way}."
        ) from error
    try:
        yield fresh
        _sync(fresh)
        _check_free(target, force)
        _replace(fresh, target)
    except Exception as error:
        if full := no_space(error, target, fresh):
            raise full from error
        raise
    finally:
        _discard(fresh)


def check_own(out: Path | None, ending: str, what: str) -> None:
    """Refuse a folder that holds something else than files of the ending, which are `what`."""
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise BadInput(f"{out} is a file. Give --out a folder.")
    held = [path.name for path in out.iterdir()]
    if held and not any(name.endswith(ending) for name in held):
        raise BadInput(f"{out} holds {held[0]} and no {what}. Give --out a folder of its own.")


def made(folder: Path) -> Path:
    """The folder, made if need be. Raises BadInput where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"{folder} cannot be made: {error.strerror or error}. Choose another --out."
        ) from error
    return folder


def no_space(error: BaseException, target: Path, fresh: Path | None = None) -> BadInput | None:
    """The error to show if `error`, or what caused it, is a full disk; else None.

    safetensors and torch report a full disk as exceptions of their own, so the text counts too.
    """
    found: BaseException | None = error
    while found is not None:
        if _says(found, "File too large", errno.EFBIG):
            return BadInput(
                f"A file for {target} is larger than this disk or `ulimit -f` allows. Choose a "
                "folder on another disk, or raise the limit."
            )
        if _says(found, "No space left on device", errno.ENOSPC, errno.EDQUOT):
            break
        found = found.__cause__ or found.__context__
    else:
        return None
    written = _size(fresh) if fresh else 0
    disk = next(p for p in (target, *target.parents) if p.exists())
    free = shutil.disk_usage(disk).free + written
    return BadInput(
        f"No space left on the disk for {target}: more than {_megabytes(written)} needed, "
        f"{_megabytes(free)} free. Free some, or choose a folder on another disk "
        "(for caches: LLM_NARROW_CACHE and HF_HOME)."
    )


def _says(error: BaseException, text: str, *numbers: int) -> bool:
    return text in str(error) or (isinstance(error, OSError) and error.errno in numbers)


def file_sha256(path: Path, track: Track = silent) -> str:
    """The hex SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    chunks = math.ceil(path.stat().st_size / CHUNK)
    with path.open("rb") as file:
        for chunk in track(iter(partial(file.read, CHUNK), b""), f"hashing {path.name}", chunks):
            digest.update(chunk)
    return digest.hexdigest()


def remembered_sha256(path: Path, track: Track = silent) -> str:
    """The same, kept in the cache by path, size and time of change.

    For weights, which every command hashes: half a gigabyte takes seconds.
    """
    path = path.resolve()
    about = path.stat()
    seen = {"path": str(path), "size": about.st_size, "changed": about.st_mtime_ns}
    note = cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if {key: known.get(key) for key in seen} == seen:
            return str(known["sha256"])
    found = file_sha256(path, track)
    with suppress(OSError):  # a cache that cannot be written only costs time
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({**seen, "sha256": found}), encoding="utf-8")
        fresh.replace(note)
    return found


def megabytes(folder: Path, running: Callable[[], bool]) -> Iterator[int]:
    """One item per megabyte that `folder` grows by from now on, while another thread writes."""
    before = _size(folder)

    def counted() -> Iterator[int]:
        told, going = 0, True
        while going:
            going = running()
            time.sleep(0.1 if going else 0)
            while told < (_size(folder) - before) // 1_000_000:
                told += 1
                yield told

    return counted()


def _size(folder: Path) -> int:
    with suppress(OSError):  # files come and go while we look
        return sum(path.stat().st_size for path in _inside(folder))
    return 0


def _check_free(target: Path, force: bool) -> None:
    """Refuse a target that exists, and with `force` one that would take more than a run with it."""
    if not os.path.lexists(target):
        return
    if not force:
        raise BadInput(f"{target} exists already. Choose another, or replace it with --force.")
    real = target.resolve()
    places = (Path.cwd(), Path.home(), cache_dir())
    if any(place.resolve().is_relative_to(real) for place in places):
        raise BadInput(
            f"{target} holds the current, home or cache folder: it is not replaced, even with "
            "--force. Choose a folder of its own."
        )


def _replace(fresh: Path, target: Path) -> None:
    """Rename `fresh` onto `target`, whose old contents come back if that fails."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    _discard(old)
    with suppress(FileNotFoundError):
        target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        raise
    _sync_folder(target.parent)
    _discard(old)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _sync(folder: Path) -> None:
    """Have the disk hold every file: a rename may reach it before the contents do.

    Files also get the rights that new files have here: safetensors writes its own for the owner
    alone, which a colleague or a server could not read.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in _inside(folder):
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError, AttributeError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
