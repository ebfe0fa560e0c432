"""How a long loop tells that it is alive: a `Track` wraps an iterable and shows how far it is."""

import time
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
    """A `Track` on `console`: a bar on a terminal, now and then a line in a pipe or a log file."""
    return bars(console) if console.is_terminal else lines(console)


def bars(console: Console) -> Track:
    """A `Track` that draws a bar with elapsed and remaining time."""

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, total=_length(items, total), description=what)

    return track


def lines(console: Console, *, every: float = 15.0) -> Track:
    """A `Track` that prints a line each `every` seconds, and one at the end of a longer loop."""

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        total = _length(items, total)
        started = told = time.monotonic()
        done = 0

        def tell(now: float) -> None:
            share = "" if total is None else f" of {total}"
            left = f", about {(now - started) / done * (total - done):.0f} s left" if total else ""
            console.print(f"{what}: {done}{share} in {now - started:.0f} s{left}", highlight=False)

        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - told >= every:
                told = now
                tell(now)
        if told != started:
            tell(time.monotonic())

    return track


def _length(items: object, total: int | None) -> int | None:
    return len(items) if total is None and isinstance(items, Sized) else total
