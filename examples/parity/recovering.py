"""Cut networks, measured before and after training on one code; many of them side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from network import Networks, PerUnit, chosen, fresh, hidden, removed, side_by_side
from presets import Recovery
from task import Code, Task, layout
from train import measure, train

from llm_narrow.paper_toys import Place

FRESH = 1000  # added to the seed of a network for a fresh one of its shape


@dataclass(frozen=True)
class Job:
    """A network at its place among its like, the units of it that stay, and what it is trained on.

    `fresh` takes the shape alone: new weights, whole from the beginning.
    """

    place: int
    seed: int
    way: str
    sparsity: float
    trained_on: str  # "kept" or "other"
    code: Code
    stays: PerUnit  # (width,) bool of each layer
    fresh: bool = False

    @property
    def widths(self) -> list[int]:
        """Of the hidden layers of the cut network."""
        return [int(s.sum()) for s in self.stays]


def jobs(
    keep: Sequence[PerUnit], *, seeds: Sequence[int], way: str, sparsities: Sequence[float],
    tasks: dict[str, Code], fresh: bool = False,
) -> list[Job]:  # fmt: skip
    """Every network at every sparsity on every task. `keep` as `ablation.decisions` gives it."""
    return [
        Job(place, seed, "fresh" if fresh else way, sparsity, name, code,
            [layer[place].cpu() for layer in stays], fresh)
        for stays, sparsity in zip(keep, sparsities, strict=True)
        for place, seed in enumerate(seeds)
        for name, code in tasks.items()
    ]  # fmt: skip


def cut(nets: Networks, todo: Sequence[Job]) -> Networks:
    """The networks of the jobs, side by side."""
    inputs = next(iter(nets.values())).shape[2]
    return side_by_side(
        [
            fresh(inputs, job.widths, [job.seed + FRESH])
            if job.fresh
            else removed(chosen(nets, torch.tensor([job.place])), [s[None] for s in job.stays])
            for job in todo
        ]
    )


def recovered(
    place: Place, name: str, nets: Networks, todo: Sequence[Job], task: Task, recovery: Recovery,
    *, samples: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each job: units left, and accuracies on its code before and after recovery.

    `last_batch` is the paper's measure: on the batch of the last update. `after` is on new samples.
    Each group of jobs is a part of the run, kept when it is finished. `samples` to measure on.
    """
    rows = []
    share = max(1, place.preset.entries // recovery.samples)
    for number, some in enumerate(together(todo, share)):
        rows += place.part(
            f"{name}-{number}",
            lambda some=some, number=number: _recovered(
                place, f"{name}-{number}", nets, some, task, recovery, samples
            ),
            place.state(f"{name}-{number}"),
        )
    return rows


def together(todo: Sequence[Job], units: int) -> Iterator[list[Job]]:
    """Jobs of about the same width, as many as have no more than `units` with their zeros."""
    batch: list[Job] = []
    for job in sorted(todo, key=lambda job: max(job.widths)):
        if batch and (len(batch) + 1) * max(1, *job.widths) > units:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _recovered(
    place: Place, name: str, nets: Networks, todo: Sequence[Job], task: Task, recovery: Recovery,
    samples: int,
) -> list[dict[str, Any]]:  # fmt: skip
    seeds = torch.tensor([job.seed for job in todo])
    codes = [[job.code] for job in todo]
    small = {n: p.to(place.device) for n, p in cut(nets, todo).items()}
    asked = layout(task, codes, samples, place.device)
    before = measure(small, asked, seeds)
    training = layout(task, codes, recovery.samples, place.device)
    done = train(
        small, training, seeds, recovery.training, stream="recover",
        state=place.state(name), save_every=place.save_every, track=place.track,
        what=f"{name}, {len(todo)} networks",
    )  # fmt: skip
    last = measure(done.nets, training, seeds, stream="recover", step=recovery.training.steps - 1)
    after = measure(done.nets, asked, seeds, stream="measure again")
    loss = done.mean[:, :, 0]  # (points, networks)
    return [
        {
            "seed": job.seed, "way": job.way, "sparsity": job.sparsity,
            "trained_on": job.trained_on, "left": job.widths,
            "before": float(before.accuracy[n, 0]), "after": float(after.accuracy[n, 0]),
            "last_batch": float(last.accuracy[n, 0]), "losses": loss[:, n].tolist(),
        }
        for n, job in enumerate(todo)
    ]  # fmt: skip


def whole(nets: Networks, seeds: Sequence[int]) -> list[PerUnit]:
    """The decision to remove nothing, as `ablation.decisions` gives it for one sparsity."""
    return [[torch.ones(len(seeds), width, dtype=torch.bool) for width in hidden(nets)]]


def selected(
    rows: Sequence[dict[str, Any]], **wanted: Any
) -> list[dict[str, Any]]:
    """The rows that have all the values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]
