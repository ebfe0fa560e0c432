"""How a long loop tells that it is alive: a `Track` wraps an iterable and shows how far it is."""

import time
from collections.abc import Iterable, Iterator, Sized
from importlib import import_module
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

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
    """A `Track` on `console`: a bar in a terminal or notebook, else now and then a line."""
    if console.is_jupyter:
        return cells()
    return bars(console) if console.is_terminal else lines(console)


def bars(console: Console) -> Track:
    """A `Track` that draws a bar with elapsed and remaining time."""

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        with Progress(*_columns(), console=console) as progress:
            yield from progress.track(items, total=_length(items, total), description=what)

    return track


def cells(*, every: float = 0.5) -> Track:
    """A `Track` for notebooks: one bar for each loop, drawn anew in its place.

    The bar is rich's own. Its live display would need the widgets of Jupyter, and be lost where the
    notebook is read elsewhere; what is displayed here stays in the notebook as it was last.
    """
    display: Any = import_module("IPython.display").display  # which is there in a notebook

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        progress = Progress(*_columns(), auto_refresh=False, disable=True)
        task = progress.add_task(what, total=_length(items, total))

        def drawn() -> Table:
            return progress.make_tasks_table(progress.tasks)

        place = display(drawn(), display_id=True)
        told = time.monotonic()
        try:
            for item in items:
                yield item
                progress.advance(task)
                if (now := time.monotonic()) - told >= every:
                    told = now
                    place.update(drawn())
        finally:
            place.update(drawn())

    return track


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def lines(console: Console, *, every: float = 15.0) -> Track:
    """A `Track` that prints a line each `every` seconds, and one at the end of a longer loop."""

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        total = _length(items, total)
        started = told = time.monotonic()
        done = last = 0

        def tell(now: float) -> None:
            share = "" if total is None else f" of {total}"
            left = f", about {(now - started) / done * (total - done):.0f} s left" if total else ""
            console.print(f"{what}: {done}{share} in {now - started:.0f} s{left}", highlight=False)

        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - told >= every:
                told, last = now, done
                tell(now)
        if last not in (0, done):
            tell(time.monotonic())

    return track


def _length(items: object, total: int | None) -> int | None:
    return len(items) if total is None and isinstance(items, Sized) else total
