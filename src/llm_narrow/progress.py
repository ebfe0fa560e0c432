"""How a long loop tells that it is alive: a `Track` wraps an iterable and shows how far it is."""

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class Track(Protocol):
    """Wraps `items`; `total` is needed where `items` has no length."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, telling how far the loop is."""
        ...


def silent(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """A `Track` that shows nothing."""
    yield from items


def shown(console: Console) -> Track:
    """A `Track` that draws a bar with elapsed and remaining time on `console`."""

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
            yield from progress.track(items, total=total, description=what)

    return track
