"""What is seen of a training run while it goes: a live table, or a line now and then."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Tell = Callable[[Row, Sequence[float]], None]  # a row of the run, and norms to draw (may be empty)

BARS = " ▁▂▃▄▅▆▇█"
COLUMNS = 40  # of the histogram
LOSSES = 48  # of the curve


@contextmanager
def watching(
    console: Console | None, what: str, steps: int, *, done: int = 0, every: float = 15.0
) -> Iterator[Tell]:
    """Show a run of `steps` steps of which `done` are done; without a console, show nothing.

    On a terminal a live table, else a line each `every` seconds and one at the end.
    """
    if console is None or console.quiet:
        yield lambda row, norms: None
        return
    seen = _Seen(what, steps, done)
    if console.is_terminal:
        with Live(console=console, get_renderable=seen.table, refresh_per_second=4):
            yield seen.add
        return
    told = time.monotonic()

    def tell(row: Row, norms: Sequence[float]) -> None:
        nonlocal told
        seen.add(row, norms)
        now = time.monotonic()
        if now - told >= every:
            told = now
            console.print(seen.line(), highlight=False)

    yield tell
    if seen.row:
        console.print(seen.line(), highlight=False)


def histogram(values: Sequence[float], *, columns: int = COLUMNS) -> str:
    """How values are spread between the least and the greatest, one block character a column."""
    low, high = min(values), max(values)
    width = (high - low) / columns or 1.0
    counts = [0] * columns
    for value in values:
        counts[min(int((value - low) / width), columns - 1)] += 1
    drawn = "".join(BARS[-(-c * (len(BARS) - 1) // max(counts))] for c in counts)
    return f"{low:.3g} {drawn} {high:.3g}"


def curve(values: Sequence[float]) -> str:
    """The last values as one line of block characters, the lowest of them lowest."""
    last = values[-LOSSES:]
    low, high = min(last), max(last)
    span = (high - low) or 1.0
    return "".join(BARS[1 + int((v - low) / span * (len(BARS) - 2))] for v in last)


class _Seen:
    """What has been told of a run so far."""

    def __init__(self, what: str, steps: int, done: int) -> None:
        self.what, self.steps, self.done = what, steps, done
        self.began_at, self.started = done, time.monotonic()
        self.row: dict[str, Any] = {}
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.norms: Sequence[float] = ()
        self.tokens: list[tuple[int, float]] = []

    def add(self, row: Row, norms: Sequence[float]) -> None:
        self.row.update({k: v for k, v in row.items() if v is not None})
        self.done = int(row["step"])
        self.tokens = [*self.tokens[-20:], (int(row["tokens"]), time.monotonic())]
        if row.get("loss") is not None:
            self.losses = [*self.losses[1 - LOSSES :], float(row["loss"])]
        if row.get("validation") is not None:
            self.validation.append(float(row["validation"]))
        if len(norms):
            self.norms = norms

    def speed(self) -> float | None:
        """Tokens per second over the last steps."""
        (first, then), (last, now) = self.tokens[0], self.tokens[-1]
        return (last - first) / (now - then) if last > first and now > then else None

    def left(self) -> float | None:
        """Seconds to go."""
        here = self.done - self.began_at
        taken = time.monotonic() - self.started
        return taken / here * (self.steps - self.done) if here else None

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of all that is worth a line."""
        found = []
        if self.losses:
            found.append(("training loss", f"{self.losses[-1]:.4f}"))
        if self.validation:
            best = min(self.validation)
            found.append(("validation loss", f"{self.validation[-1]:.4f} (best {best:.4f})"))
        if self.tokens and (speed := self.speed()):
            found.append(("tokens/s", f"{speed:,.0f}"))
        if (left := self.left()) is not None:
            found.append(("left", f"{int(left) // 60}:{int(left) % 60:02d}"))
        usual = {"step", "tokens", "loss", "validation", "tokens_per_second"}
        for name, value in self.row.items():
            if name not in usual:
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                found.append((name.replace("_", " "), shown))
        return found

    def line(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.facts())
        return f"{self.what}: {self.done} of {self.steps} steps, {told}"

    def table(self) -> Group:
        head = Text(f"{self.what}: step {self.done} of {self.steps}")
        table = Table.grid(padding=(0, 2))
        for name, value in self.facts():
            table.add_row(name, value)
        if len(self.losses) > 1:
            table.add_row("curve", curve(self.losses))
        if self.norms:
            table.add_row("group norms", histogram(self.norms))
        return Group(head, ProgressBar(total=self.steps, completed=self.done, width=60), table)
