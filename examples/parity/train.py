"""The training of many networks at once, each on its own fresh samples; stopped and taken up.

The loss is the sum of the mean losses of the networks, and Adam is elementwise, so every network is
trained as it would be alone. Each step's samples are fresh, so the loss before its update is that
on samples never seen: it is recorded as it is, and no pass is spent on evaluation.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from network import Networks, activations, losses, penalty, proximal_step, right, scale
from task import Layout, sample
from torch import Tensor

from llm_narrow import state as states
from llm_narrow.errors import problems
from llm_narrow.progress import Track, silent

SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Settings:
    """How to train. `window` is the number of steps that one point of the curves is made of.

    `strength` is that of the group lasso: as a gradient beside that of the loss (the paper's way),
    or as a proximal step of lr * strength after each step (exact zeros).
    """

    steps: int
    lr: float = 1e-3
    eps: float = 1e-8
    window: int = 100
    strength: float = 0.0
    way: Literal["gradient", "proximal"] = "gradient"

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        found = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("steps", 1), ("window", 1), ("strength", 0))
            if getattr(self, name) < least
        ]
        if not self.lr > 0:
            found.append(f"lr must be above 0, got {self.lr}")
        if found:
            raise problems("training", found)


@dataclass(frozen=True)
class Trained:
    """Networks after training, and the curves of their losses in nats per sample.

    mean:    over each window of steps, (points, networks, codes)
    least:   the lowest of a single step in each window, the same shape
    seconds: spent on it, by earlier processes too
    """

    nets: Networks
    mean: Tensor
    least: Tensor
    seconds: float


def train(
    nets: Networks,
    asked: Layout,
    seeds: Tensor,
    settings: Settings,
    *,
    stream: str = "train",
    state: Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    save_every: float = SAVE_EVERY,
    track: Track = silent,
    what: str = "training",
) -> Trained:
    """Train copies of the networks on what `asked` asks, each on the samples of its seed.

    With a `state` folder it goes on from the state there, to the same numbers; `made_by` is what
    has to be the same for that beside settings and seeds. Raises BadInput where it is not.
    """
    run = _Run(nets, asked, seeds, settings, stream)
    about = {**asdict(settings), "stream": stream, "seeds": seeds.tolist(), **(made_by or {})}
    began, before = time.monotonic(), 0.0
    if state is not None:
        held = states.find(state, about).snapshot
        if held is not None:
            before = run.restore(held)
    saved = time.monotonic()
    for _ in track(range(run.step, settings.steps), what):
        run.advance()
        last = run.step == settings.steps
        if state is not None and (last or time.monotonic() - saved > save_every):
            spent = before + time.monotonic() - began
            states.save(state, run.snapshot(spent), about)
            saved = time.monotonic()
    spent = before + time.monotonic() - began
    nets = {name: p.detach() for name, p in run.nets.items()}
    return Trained(nets, run.mean.cpu(), run.least.cpu(), spent)


class _Run:
    """Networks on their way through the steps."""

    def __init__(
        self, nets: Networks, asked: Layout, seeds: Tensor, settings: Settings, stream: str
    ) -> None:
        device = asked.relevant.device
        self.asked, self.settings, self.stream = asked, settings, stream
        self.seeds = seeds.to(device)
        self.nets = {n: p.detach().to(device).clone().requires_grad_() for n, p in nets.items()}
        self.optimizer = torch.optim.Adam(
            self.nets.values(), lr=settings.lr, eps=settings.eps, fused=True
        )
        points = -(-settings.steps // settings.window)
        self.step = 0
        self.mean = torch.zeros(points, len(seeds), asked.codes, device=device)
        self.least = torch.full_like(self.mean, torch.inf)

    def advance(self) -> None:
        """One step of all networks."""
        s = self.settings
        inputs, labels = sample(self.asked, self.seeds, stream=self.stream, step=self.step)
        per_sample = losses(activations(self.nets, inputs)[-1], labels)
        loss = per_sample.mean(1).sum()
        if s.strength and s.way == "gradient":
            loss = loss + s.strength * penalty(self.nets).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if s.strength and s.way == "proximal":
            self._shorten(s.lr * s.strength)
        with torch.no_grad():
            by_code = per_sample.view(len(self.seeds), self.asked.codes, -1).mean(2)
            point = self.step // s.window
            self.mean[point] += by_code / min(s.window, s.steps - point * s.window)
            torch.minimum(self.least[point], by_code, out=self.least[point])
        self.step += 1

    def _shorten(self, amount: float) -> None:
        """The proximal step; what became zero is forgotten by the optimizer, so that it stays."""
        alive = [(norm > 0).float() for norm in proximal_step(self.nets, amount)]
        for kind in ("exp_avg", "exp_avg_sq"):
            scale({n: self.optimizer.state[p][kind] for n, p in self.nets.items()}, alive)

    def snapshot(self, seconds: float) -> states.Snapshot:
        """All that the rest of the run follows from."""
        return states.Snapshot(
            self.step, dict(self.nets), states.optimizer_tensors(self.optimizer, self.nets),
            best=None, after={"mean": self.mean, "least": self.least}, random=[],
            facts={"seconds": seconds},
        )  # fmt: skip

    def restore(self, held: states.Snapshot) -> float:
        """Go on from a snapshot; the seconds spent until then."""
        states.restore_weights(self.nets, held.weights)
        states.restore_optimizer(self.optimizer, self.nets, held.optimizer)
        self.step = held.step
        self.mean.copy_(held.after["mean"])
        self.least.copy_(held.after["least"])
        return float(held.facts["seconds"])


@dataclass(frozen=True)
class Measured:
    """Mean loss in nats and share of right answers of each network and code, (networks, codes)."""

    loss: Tensor
    accuracy: Tensor


@torch.no_grad()
def measure(
    nets: Networks, asked: Layout, seeds: Tensor, *, stream: str = "measure", step: int = 0
) -> Measured:
    """Losses and accuracies on samples of a stream of their own."""
    device = asked.relevant.device
    inputs, labels = sample(asked, seeds.to(device), stream=stream, step=step)
    logits = activations({n: p.to(device) for n, p in nets.items()}, inputs)[-1]
    shape = (len(seeds), asked.codes, -1)
    return Measured(
        losses(logits, labels).view(shape).mean(2).cpu(),
        right(logits, labels).float().view(shape).mean(2).cpu(),
    )
