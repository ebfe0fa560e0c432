"""The network of all ten digits that is pruned and distilled from, one for each way.

784-1200-1200-10 with dropout, as the paper has it: Adam with weight decay in the gradient, the best
epoch by accuracy on the digits that the way judges by.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from digits import Part, Stream
from network import fresh, one
from presets import Teacher
from torch import Tensor, nn
from torch.nn import functional as F

from llm_narrow import state as states
from llm_narrow.progress import Track, silent

SEED = 1000  # of its weights and of the order of its examples; those of runs are smaller


def trained(
    part: Part, judged: Part, settings: Teacher, *, state: Path,
    made_by: Mapping[str, Any] | None = None, save_every: float = 60.0, track: Track = silent,
) -> nn.Sequential:
    """The teacher: the best of its epochs by accuracy on `judged`, all digits.

    It is kept in `state` when it is done, and not trained again.
    """
    run = _Training(part, judged, settings)
    about = {**vars(settings), **(made_by or {})}
    if (held := states.find(state, about).snapshot) is not None:
        run.restore(held)
    saved = time.monotonic()
    for _ in track(range(run.step, run.steps), "teacher"):
        if run.over:
            break
        run.advance()
        if run.over or run.step == run.steps or time.monotonic() - saved > save_every:
            states.save(state, run.snapshot(), about)
            saved = time.monotonic()
    run.net.load_state_dict(run.best.weights)
    return run.net.to(part.images.device).requires_grad_(False)


class _Training:
    """The teacher on its way."""

    def __init__(self, part: Part, judged: Part, settings: Teacher) -> None:
        self.part, self.judged, self.settings = part, judged, settings
        self.stream = Stream(part)
        self.net = one(fresh(part.images.shape[1], [settings.hidden] * 2, [SEED]), 0)
        self.net.to(part.images.device)
        self.params = dict(self.net.named_parameters())
        self.optimizer = torch.optim.Adam(
            self.params.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.epoch = -(-len(part) // settings.batch)  # steps of one
        self.steps = settings.epochs * self.epoch
        self.lr, self.waited, self.step, self.over = settings.lr, 0, 0, False
        self.best = states.Best(0, 1.0, {n: p.detach().clone() for n, p in self.params.items()})

    def advance(self) -> None:
        """One step, and a look at the accuracy after each epoch."""
        s = self.settings
        first = self.step % self.epoch * s.batch + self.step // self.epoch * len(self.part)
        count = min(s.batch, len(self.part) - self.step % self.epoch * s.batch)
        batch = self.part.at(self.stream.places(SEED, first, count).to(self.part.labels.device))
        generator = torch.Generator(batch.images.device).manual_seed(self.step)
        inputs = batch.images
        for layer in self.net:
            inputs = layer(inputs)
            if isinstance(layer, nn.ReLU):
                stays = torch.rand(inputs.shape, generator=generator, device=inputs.device)
                inputs = inputs * (stays >= s.dropout) / (1 - s.dropout)
        F.cross_entropy(inputs, batch.labels).backward()
        for group in self.optimizer.param_groups:
            linear = s.slowing == "linear"
            group["lr"] = s.lr * (1 - self.step / self.steps) if linear else self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % self.epoch == 0:
            self.look()

    def look(self) -> None:
        """Keep the best; slow down where it has not risen for three epochs, as torch's plateau."""
        lacks = 1 - accuracy(self.net, self.judged)
        if lacks < self.best.loss:
            weights = {n: p.detach().clone() for n, p in self.params.items()}
            self.best, self.waited = states.Best(self.step, lacks, weights), 0
        else:
            self.waited += 1
        if self.waited > 2:
            self.lr, self.waited = self.lr / 2, 0
        self.over = lacks <= 1 - self.settings.enough

    def snapshot(self) -> states.Snapshot:
        """All that the rest follows from."""
        return states.Snapshot(
            self.step, {n: p.detach() for n, p in self.params.items()},
            states.optimizer_tensors(self.optimizer, self.params), self.best, after={}, random=[],
            facts={"lr": self.lr, "waited": self.waited, "over": self.over},
        )  # fmt: skip

    def restore(self, held: states.Snapshot) -> None:
        """Go on from a snapshot."""
        states.restore_weights(self.params, held.weights)
        states.restore_optimizer(self.optimizer, self.params, held.optimizer)
        self.step, self.best = held.step, held.best or self.best
        self.lr, self.waited = held.facts["lr"], held.facts["waited"]
        self.over = held.facts["over"]


@torch.no_grad()
def logits(net: nn.Module, part: Part, at_once: int = 4096) -> Tensor:
    """What a network gives to all images, (n, 10)."""
    return torch.cat([net(images) for images in part.images.split(at_once)])


def accuracy(net: nn.Module, part: Part) -> float:
    """The share of digits it gets right."""
    return float((logits(net, part).argmax(1) == part.labels).double().mean())
