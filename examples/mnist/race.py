"""Runs side by side until each has the accuracy it is to have, has failed, or cannot matter.

Every run of a cell is in the same step, so a network with a penalty (a *trunk*) can pass several
sizes: at each one a copy goes on without the penalty, which is the run of that size. It is the same
network that a run for that size alone would have been.

A cell that chooses among configurations is a race: a configuration that can no longer be chosen,
whatever its runs do, is given up. That changes no choice (`choosing.py`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from digits import Part, Stream
from network import PerUnit, hits
from torch import Tensor
from train import Lane, Settings, Side, advance, arranged, turned

from llm_narrow import state as states
from llm_narrow.progress import Track, silent

Row = dict[str, Any]  # config, seed, target, neurons, examples (None: failed), given_up, accuracies
# rows, what still runs as (config, seed, target), examples at the next check -> (config, target)
Lost = Callable[[Sequence[Row], Sequence[tuple[int, int, int]], int], set[tuple[int, int]]]


@dataclass(frozen=True)
class Field:
    """What runs are trained and judged on; even digits only.

    `judged` is the part whose accuracy ends a run, `told` one that is only measured then. `taught`
    are a teacher's logits for the training part, (n, 10).
    """

    train: Part
    judged: Part
    told: Part
    goal: float
    entries: int
    taught: Tensor | None = None


@dataclass(frozen=True)
class Raced:
    """Rows of all runs, and curves of the runs that were watched: a row for each check."""

    rows: list[Row]
    curves: list[Row]


def race(
    field: Field,
    settings: Settings,
    start: Callable[[], Side],
    *,
    lost: Lost | None = None,
    watched: Sequence[int] = (),
    state: Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    save_every: float = 60.0,
    track: Track = silent,
    what: str = "runs",
) -> Raced:
    """Train until every run has ended. `start` gives the networks before their first step.

    With a `state` folder it goes on from the state there, to the same numbers; `made_by` is what
    has to be the same for that beside the settings. Raises BadInput where it is not. `watched` are
    seeds whose accuracies are kept.
    """
    run = _Race(field, settings, lost, watched)
    about = {**asdict(settings), **(made_by or {})}
    held = states.find(state, about).snapshot if state is not None else None
    if held is not None:
        run.restore(held)
    else:
        run.sides = arranged([start()], field.entries)
        if settings.check_first:
            run.check()
    saved = time.monotonic()
    last = -(-settings.most // settings.batch)
    for _ in track(range(run.step, last), what):
        if not run.sides:
            break
        run.advance()
        if state is not None and run.sides and time.monotonic() - saved > save_every:
            states.save(state, run.snapshot(), about)
            saved = time.monotonic()
    return Raced(run.rows, run.curves)


class _Race:
    """Runs on their way."""

    def __init__(
        self, field: Field, settings: Settings, lost: Lost | None, watched: Sequence[int]
    ) -> None:
        self.field, self.settings, self.lost, self.watched = field, settings, lost, set(watched)
        self.stream = Stream(field.train)
        self.sides: list[Side] = []
        self.rows: list[Row] = []
        self.curves: list[Row] = []
        self.step = 0

    @property
    def examples(self) -> int:
        """That each network has been trained on."""
        return self.step * self.settings.batch

    def advance(self) -> None:
        """One step of all networks, and what follows from it."""
        s = self.settings
        self.step += 1
        for side in self.sides:
            places = torch.stack([
                self.stream.places(lane.seed, lane.offset + self.examples - s.batch, s.batch)
                for lane in side.lanes
            ]).to(self.field.train.labels.device)  # (N, B)  # fmt: skip
            taught = None if self.field.taught is None or not s.temperature else (
                self.field.taught[places].transpose(1, 2))  # fmt: skip
            part = self.field.train
            advance(side, part.images[places], part.labels[places], taught, s, self.step)
        if not s.overshoot:
            self.fork()
        if self.examples // s.every > (self.examples - s.batch) // s.every:
            self.check()
        if self.examples >= s.most:
            self.fail()

    def fork(self) -> None:
        """Let runs go on without a penalty where a trunk has come to their sizes."""
        for side in list(self.sides):
            counts = side.counts if any(lane.pending for lane in side.lanes) else []
            now = [(n, count) for n, count in enumerate(counts)
                   if side.lanes[n].pending and count <= side.lanes[n].pending[0]]  # fmt: skip
            stay: list[int] = []
            for n, count in now:
                runs, trunk = turned(side.lanes[n], count)
                for lane in runs:
                    fork = side.some([n])
                    fork.lanes = [lane]
                    self.sides.append(fork.compacted())
                if trunk:
                    side.lanes[n] = trunk
                    stay.append(n)
            ended = {n for n, _ in now} - set(stay)
            self._keep(side, [n for n in range(len(side.lanes)) if n not in ended])

    def _keep(self, side: Side, places: Sequence[int]) -> None:
        """Go on with these of a side."""
        if len(places) == len(side.lanes):
            return
        at = next(n for n, other in enumerate(self.sides) if other is side)
        self.sides[at : at + 1] = [side.some(places)] if places else []

    def check(self) -> None:
        """Who has the accuracy, who has lost, and how those that go on lie together best."""
        self.fork()
        for side in list(self.sides):
            asked = [n for n, lane in enumerate(side.lanes)
                     if not lane.pending or lane.seed in self.watched]  # fmt: skip
            if not asked:
                continue
            of = side if len(asked) == len(side.lanes) else side.some(asked)
            right = self._accuracies(of, self.field.judged)
            by_lane = {(lane.config, lane.seed, lane.target): n for n, lane in enumerate(of.lanes)}
            ended = []
            counts = side.counts
            for n, lane in enumerate(side.lanes):
                at = by_lane.get((lane.config, lane.seed, lane.target))
                if at is None:
                    continue
                if lane.seed in self.watched:
                    self.curves.append({
                        "config": lane.config, "seed": lane.seed, "target": lane.target,
                        "neurons": counts[n], "examples": self.examples, "accuracy": right[at],
                    })  # fmt: skip
                if not lane.pending and right[at] >= self.field.goal:
                    ended.append(n)
                    self._tell(side, n, right[at], lane.offset + self.examples)
            self._keep(side, [n for n in range(len(side.lanes)) if n not in ended])
        self.give_up()
        self.sides = arranged(self.sides, self.field.entries)

    def _accuracies(self, side: Side, part: Part) -> list[float]:
        found = hits(side.nets, part.images, part.labels, entries=self.field.entries)
        return (found.double() / len(part)).tolist()

    def _tell(self, side: Side, place: int, accuracy: float | None, examples: int | None) -> None:
        """Write down how a run ended."""
        lane, count = side.lanes[place], side.counts[place]
        told = self._accuracies(side.some([place]), self.field.told)[0]
        self.rows.append(row(lane, lane.target, count, examples, accuracy=accuracy, told=told))

    def give_up(self) -> None:
        """Leave the runs that cannot matter."""
        if self.lost is None:
            return
        running = [(lane.config, lane.seed, target) for side in self.sides for lane in side.lanes
                   for target in targets(lane)]  # fmt: skip
        gone = self.lost(self.rows, running, self.examples + self.settings.every)
        for side in list(self.sides) if gone else ():
            counts = side.counts
            ended = []
            for n, lane in enumerate(side.lanes):
                mine = [t for t in targets(lane) if (lane.config, t) in gone]
                for target in mine:
                    self.rows.append(row(lane, target, counts[n], None, given_up=self.examples))
                if len(mine) == len(targets(lane)):
                    ended.append(n)
                elif mine:
                    left = tuple(t for t in lane.pending if t not in mine)
                    side.lanes[n] = replace(lane, pending=left)
            self._keep(side, [n for n in range(len(side.lanes)) if n not in ended])

    def fail(self) -> None:
        """Whatever still runs has failed."""
        for side in self.sides:
            counts = side.counts
            for n, lane in enumerate(side.lanes):
                if lane.pending:
                    self.rows += [row(lane, t, counts[n], None) for t in lane.pending]
                else:
                    accuracy = self._accuracies(side.some([n]), self.field.judged)[0]
                    self._tell(side, n, accuracy, None)
        self.sides = []

    def snapshot(self) -> states.Snapshot:
        """All that the rest of the race follows from."""

        def named(part: str) -> dict[str, Tensor]:
            return {f"{n}:{name}": p for n, side in enumerate(self.sides)
                    for name, p in getattr(side, part).items()}  # fmt: skip

        moments = {f"{part}:{name}": p for part in ("first", "second")
                   for name, p in named(part).items()}  # fmt: skip
        alive: dict[str, Tensor] = {f"{n}:{layer}": a for n, side in enumerate(self.sides)
                                    for layer, a in enumerate(side.alive)}  # fmt: skip
        return states.Snapshot(
            self.step, named("nets"), moments, best=None, after=alive, random=[],
            facts={"lanes": [[asdict(lane) for lane in side.lanes] for side in self.sides],
                   "rows": self.rows, "curves": self.curves},
        )  # fmt: skip

    def restore(self, held: states.Snapshot) -> None:
        """Go on from a snapshot."""
        device = self.field.train.labels.device

        def of(tensors: Mapping[str, Tensor], before: str) -> dict[str, Tensor]:
            return {name.removeprefix(before): p.to(device) for name, p in tensors.items()
                    if name.startswith(before)}  # fmt: skip

        self.step = held.step
        self.rows, self.curves = list(held.facts["rows"]), list(held.facts["curves"])
        self.sides = []
        for n, lanes in enumerate(held.facts["lanes"]):
            alive: PerUnit = [held.after[f"{n}:{layer}"].to(device) for layer in (0, 1)]
            self.sides.append(Side(
                [Lane(**{**lane, "pending": tuple(lane["pending"])}) for lane in lanes],
                of(held.weights, f"{n}:"), of(held.optimizer, f"first:{n}:"),
                of(held.optimizer, f"second:{n}:"), alive,
            ))  # fmt: skip


def targets(lane: Lane) -> list[int]:
    """The sizes that a lane is still to give a run for."""
    return list(lane.pending) if lane.pending else [lane.target]  # type: ignore[list-item]


def row(
    lane: Lane, target: int | None, neurons: int, examples: int | None, *,
    accuracy: float | None = None, told: float | None = None, given_up: int | None = None,
) -> Row:  # fmt: skip
    """How a run ended: `examples` it took, None where it failed or was given up at so many."""
    return {
        "config": lane.config, "seed": lane.seed, "target": target, "neurons": neurons,
        "examples": examples, "given_up": given_up, "accuracy": accuracy, "told": told,
    }  # fmt: skip
