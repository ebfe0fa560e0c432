"""What one process is at, so that several of the same command share the work and not repeat it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claimed(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether `name` is this process's own while the block runs.

    False where another process has it; with `wait` the block begins when it has let go. The system
    takes the claim from a process that ends in any way.
    """
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Mark a folder as worked in while the block runs; nothing is left in it.

    The system takes the mark from a process that ends in any way. Where folders cannot be marked
    (Windows, some network disks) nothing is.
    """
    handle = -1
    with suppress(OSError, ImportError):
        handle = _marked(folder)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a process that is alive has marked the folder."""
    try:
        os.close(_marked(folder))
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        pass
    return False


def _marked(folder: Path) -> int:
    """A handle of the folder with its mark. Raises BlockingIOError where another one has it."""
    from fcntl import LOCK_EX, LOCK_NB, flock  # which Windows lacks

    handle = os.open(folder, os.O_RDONLY)
    try:
        flock(handle, LOCK_EX | LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle
