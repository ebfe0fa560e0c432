"""The likelihoods of a set's texts under a model, kept in a file as they are found.

The file's first line has all settings that they depend on; then comes a line for each item. What
is there already is not found again, so that a benchmark that was stopped goes on where it was.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .choices import Likelihood, Pair, Window, encoded, likelihoods, positions, width
from .errors import BadInput, problems
from .matrix_sets import Item
from .progress import Track, silent


@dataclass(frozen=True)
class Score:
    """What a model makes of one item: the likelihood of its text, or of each of its choices.

    `bytes` are those of the text, or of all choices; `cut` are the tokens of the context that had
    no room in the model.
    """

    item: str
    bytes: int
    cut: int
    likelihoods: tuple[Likelihood, ...]

    def row(self) -> dict[str, Any]:
        """A line of the file."""
        each = self.likelihoods
        return {
            "item": self.item, "bytes": self.bytes, "cut": self.cut,
            "nats": [one.nats for one in each], "tokens": [one.tokens for one in each],
            "greedy": [one.greedy for one in each],
        }  # fmt: skip

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Score":
        """The score that `row` gave. Raises KeyError."""
        each = zip(row["nats"], row["tokens"], row["greedy"], strict=True)
        return cls(row["item"], row["bytes"], row["cut"], tuple(Likelihood(*one) for one in each))


def scores(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    tokens: int,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    what: str = "items",
    track: Track = silent,
) -> list[Score]:
    """The score of each item, in their order; `tokens` may be fed to the model at once.

    Raises BadInput for a file of other settings, and a text that has no tokens.
    """
    with kept(file, settings or {}) as (done, keep):
        if any(item.name not in done for item in items):
            most = positions(model)
            windows = {
                item.name: [_windows(tokenizer, pair, most, item.name, what) for pair in item.pairs]
                for item in items
            }
            by_name = {item.name: item for item in items}
            batches = _batches(windows, tokens)
            # One that is half there is made again whole: its shape may show in the last digits.
            lacking = [batch for batch in batches if any(name not in done for name in batch)]
            for batch in track(lacking, f"{what} in batches"):
                flat = [some for name in batch for some in windows[name]]
                found = iter(likelihoods(model, flat))
                keep([
                    Score(
                        name,
                        sum(len(pair.text.encode()) for pair in by_name[name].pairs),
                        max(window.cut for some in windows[name] for window in some),
                        tuple(next(found) for _ in windows[name]),
                    )
                    for name in batch
                ])  # fmt: skip
        return [done[item.name] for item in items]


def _windows(tokenizer: Any, pair: Pair, most: int, name: str, what: str) -> list[Window]:
    try:
        return encoded(tokenizer, pair, most)
    except BadInput as error:
        raise BadInput(f"{what}, item {name}: {error}") from error


def _batches(windows: Mapping[str, Sequence[Sequence[Window]]], tokens: int) -> list[list[str]]:
    """Names of items that go together, the longest first, so that little is padding.

    A batch is as many inputs as have room for that many tokens; equal inputs count once.
    """
    flat = {name: [w for some in several for w in some] for name, several in windows.items()}
    found: list[list[str]] = []
    wide = rows = 0
    for name in sorted(flat, key=lambda name: (-width(flat[name]), name)):
        own = len({window.ids[:-1] for window in flat[name]})
        if not found or (rows + own) * wide > tokens:
            found.append([])
            wide, rows = width(flat[name]), 0
        found[-1].append(name)
        rows += own
    return found


Kept = tuple[dict[str, Score], Any]


@contextmanager
def kept(path: Path | None, settings: Mapping[str, Any]) -> Iterator[Kept]:
    """What a file of these settings holds by item, and a function that adds to both.

    No other process may write to the file meanwhile.
    """
    done: dict[str, Score] = {}
    if path is None:
        yield done, lambda found: done.update((one.item, one) for one in found)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        _lock(file, path)
        file.seek(0)
        held = file.read()
        whole = held.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in held[:whole].splitlines()]
            had = lines[0]["settings"] if lines else settings
            for score in map(Score.of, lines[1:]):
                done[score.item] = score
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path} is damaged or holds other rows ({error!r}). Remove it to begin anew."
            ) from error
        other = [f"{k} was {had.get(k)}, now {v}" for k, v in settings.items() if had.get(k) != v]
        if other:
            other += ["give another folder, or remove this file"]
            raise problems(f"{path} was begun with other settings", other)
        file.truncate(whole)  # the writing of the last line was interrupted
        if not lines:
            _write(file, [{"settings": dict(settings)}])

        def keep(found: Sequence[Score]) -> None:
            _write(file, [one.row() for one in found])
            done.update((one.item, one) for one in found)

        yield done, keep


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(
            f"{path} is being written by another benchmark. Wait for it, or give another --out."
        ) from None


def _write(file: IO[bytes], rows: Sequence[Mapping[str, Any]]) -> None:
    file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    file.flush()
    os.fsync(file.fileno())
