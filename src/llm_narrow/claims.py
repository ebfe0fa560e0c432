"""What one process is at, so that several of the same command share the work and not repeat it."""

from collections.abc import Iterator
from contextlib import contextmanager
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
