"""One step of many networks at once: loss, penalty, clipping, optimizer, units that go.

The loss is the sum of the mean losses of the networks, and all that follows is per network, so
each is trained as it would be alone. All networks have made the same number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from network import (
    CLASSES,
    Networks,
    PerUnit,
    activations,
    add_penalty,
    chosen,
    compact,
    hidden,
    side_by_side,
    silence,
    squares,
)
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adam import adam

from llm_narrow.errors import problems


@dataclass(frozen=True)
class Settings:
    """How all networks of a cell are trained.

    `every` is how many examples lie between two checks, and `most` how many are given before a run
    has failed. `clip` limits the norm of a network's gradient; 0 is no limit. `temperature` is that
    of distillation, whose loss is (1 - share) * cross-entropy + share * T^2 * KL; 0 is none.
    `ghosts` leaves the bias of units that go (the paper's way). A unit whose weights have a norm of
    `zero` or less goes; it is looked at after every step, but whether enough are gone only at
    checks where `overshoot`.
    """

    batch: int
    every: int
    most: int
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    clip: float = 0.0
    temperature: float = 0.0
    share: float = 0.9
    zero: float = 0.05
    ghosts: bool = False
    overshoot: bool = False
    check_first: bool = True

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        found = [f"{name} must be at least 1, got {getattr(self, name)}"
                 for name in ("batch", "every", "most") if getattr(self, name) < 1]  # fmt: skip
        found += [
            f"{name} must be at least 0, got {getattr(self, name)}"
            for name in ("clip", "temperature", "zero")
            if getattr(self, name) < 0
        ]
        if self.every < self.batch:
            found.append(f"every must be at least batch, {self.batch}, got {self.every}")
        if found:
            raise problems("training", found)


@dataclass(frozen=True)
class Lane:
    """One run among those side by side: configuration `config` with one seed.

    `target` is the number of hidden units that it ends with; None while a penalty still has more
    than one of `pending` to come to. `offset` is how many examples it had been given before.
    """

    config: int
    seed: int
    lr: float
    target: int | None
    strength: float = 0.0
    pending: tuple[int, ...] = ()  # falling
    offset: int = 0


@dataclass
class Side:
    """Networks side by side: lanes in the order of their learning rates, what they are made of.

    `alive`, (N, H) bool of each layer, says which units have not gone.
    """

    lanes: list[Lane]
    nets: Networks
    first: Networks  # moments, or the momentum of SGD
    second: Networks
    alive: PerUnit
    squared: PerUnit | None = None  # as `squares` gives them, where they are known

    @property
    def counts(self) -> list[int]:
        """Hidden units of each network."""
        return [int(n) for n in sum(a.sum(1) for a in self.alive)]  # type: ignore[union-attr]

    def some(self, places: Sequence[int]) -> "Side":
        """Those at the places, in the order of their learning rates; copies."""
        order = sorted(places, key=lambda n: self.lanes[n].lr)
        at = torch.tensor(order, dtype=torch.long, device=self.alive[0].device)
        return Side([self.lanes[n] for n in order], chosen(self.nets, at), chosen(self.first, at),
                    chosen(self.second, at), [a[at] for a in self.alive])  # fmt: skip

    def compacted(self) -> "Side":
        """Without the units that went, where that makes it narrower."""
        if all(int(a.sum(1).max()) > 0.95 * a.shape[1] for a in self.alive):
            return self
        kept = [a.gather(1, a.to(torch.int8).argsort(dim=1, descending=True, stable=True))
                [:, : max(1, int(a.sum(1).max()))] for a in self.alive]  # fmt: skip
        parts = [compact(p, self.alive) for p in (self.nets, self.first, self.second)]
        return Side(self.lanes, *parts, kept)


def begun(lanes: Sequence[Lane], nets: Networks, alive: PerUnit) -> Side:
    """Networks before their first step, which will change them in place."""
    zeros = [{name: torch.zeros_like(p) for name, p in nets.items()} for _ in range(2)]
    side = Side(list(lanes), nets, *zeros, alive)
    rates = [lane.lr for lane in lanes]
    return side if rates == sorted(rates) else side.some(range(len(lanes)))


def joined(sides: Sequence[Side]) -> Side:
    """All of them as one."""
    lanes = [lane for side in sides for lane in side.lanes]
    wide = [max(side.alive[layer].shape[1] for side in sides) for layer in (0, 1)]
    alive = [torch.cat([F.pad(side.alive[layer], (0, wide[layer] - side.alive[layer].shape[1]))
                        for side in sides]) for layer in (0, 1)]  # fmt: skip
    return Side(lanes, *(side_by_side([getattr(side, part) for side in sides])
                         for part in ("nets", "first", "second")), alive)\
        .some(range(len(lanes)))  # fmt: skip


def arranged(sides: Sequence[Side], entries: int) -> list[Side]:
    """The same lanes again, those of similar width side by side, compact.

    As many together as have about `entries` parameters with their zeros.
    """
    each = [part for side in sides for part in _parted(side, entries)]
    each.sort(key=lambda side: max(side.counts))
    found: list[list[Side]] = []
    for side in each:
        size, width = sum(p[0].numel() for p in side.nets.values()), max(hidden(side.nets))
        if found:
            lanes = sum(len(s.lanes) for s in found[-1]) + len(side.lanes)
            narrow = min(max(hidden(s.nets)) for s in found[-1])
            if lanes * size <= entries and width <= max(1.5 * narrow, narrow + 16):
                found[-1].append(side)
                continue
        found.append([side])
    return [some[0] if len(some) == 1 else joined(some) for some in found]


def _parted(side: Side, entries: int) -> list[Side]:
    """The networks of a side split where widths differ much, or where they are too many."""
    size = sum(p[0].numel() for p in side.nets.values())
    most = max(1, entries // size)
    widths = torch.stack([a.sum(1) for a in side.alive]).max(0).values.tolist()
    order = sorted(range(len(widths)), key=widths.__getitem__)
    parts: list[list[int]] = []
    for n in order:
        narrow = widths[parts[-1][0]] if parts else 0
        if parts and widths[n] <= max(1.5 * narrow, narrow + 16) and len(parts[-1]) < most:
            parts[-1].append(n)
        else:
            parts.append([n])
    if len(parts) == 1:
        return [side.compacted()]
    return [side.some(part).compacted() for part in parts]


def losses(logits: Tensor, labels: Tensor, taught: Tensor | None, settings: Settings) -> Tensor:
    """The mean loss of each network, (N,): logits (N, 10, B), labels (N, B), taught as logits."""
    found = F.cross_entropy(logits, labels, reduction="none").mean(1)
    if taught is not None:
        t = settings.temperature
        apart = F.kl_div((logits / t).log_softmax(1), (taught / t).softmax(1), reduction="none")
        kl = apart.sum(1).mean(1)
        found = (1 - settings.share) * found + settings.share * t * t * kl
    return found


def advance(
    side: Side, images: Tensor, labels: Tensor, taught: Tensor | None, settings: Settings, step: int
) -> None:
    """Step number `step`, from 1, of all networks of a side, in place.

    Images (N, B, 784), labels (N, B), the teacher's logits (N, 10, B) where there is one.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in side.nets.items()}
    logits = activations(leaves, images)[-1]
    assert logits.shape[1] == CLASSES
    loss = losses(logits, labels, taught, settings).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    grads = dict(zip(leaves, found, strict=True))
    strengths = [lane.strength for lane in side.lanes]
    dying = any(strengths)
    with torch.no_grad():
        if dying:
            strength = torch.tensor(strengths, device=images.device)
            add_penalty(grads, side.nets, strength, side.squared or squares(side.nets))
        if settings.ghosts and not all(bool(a.all()) for a in side.alive):
            silence(grads, side.alive, whole=False)
        if settings.clip:
            _clip(grads, settings.clip)
        _update(side, grads, settings, step)
        if dying:
            shrink(side, settings)


def _clip(grads: Networks, most: float) -> None:
    """Shorten the gradient of each network to a norm of at most `most`."""
    norm = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()  # type: ignore[union-attr]
    factor = (most / (norm + 1e-6)).clamp_max(1)
    if bool((factor < 1).any()):
        for g in grads.values():
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


def _update(side: Side, grads: Networks, settings: Settings, step: int) -> None:
    """The optimizer's step, with the learning rate of each lane."""
    rates = [lane.lr for lane in side.lanes]
    if settings.optimizer == "sgd":
        lr = torch.tensor(rates, device=side.alive[0].device)
        for name, g in grads.items():
            side.first[name].mul_(settings.momentum).add_(g)
            side.nets[name].sub_(side.first[name] * lr.view(-1, *[1] * (g.dim() - 1)))
        return
    at = 0
    for rate, some in groupby(rates):
        block = slice(at, at := at + len(list(some)))
        parts = [[tensors[name][block] for name, p in side.nets.items() if p.numel()]
                 for tensors in (side.nets, grads, side.first, side.second)]  # fmt: skip
        # The fused optimizer wants a count of steps for each tensor, on its device.
        steps = list(torch.full((len(parts[0]),), step - 1.0, device=parts[0][0].device).unbind())
        adam(*parts, [], steps, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=rate,
             weight_decay=0.0, eps=1e-8, maximize=False)  # fmt: skip


@torch.no_grad()
def shrink(side: Side, settings: Settings) -> None:
    """Let the units go whose weights are at zero, in lanes that have a penalty."""
    pushed = torch.tensor([lane.strength > 0 for lane in side.lanes],
                          device=side.alive[0].device)[:, None]  # fmt: skip
    side.squared = squares(side.nets)
    alive = [a & ~((s.sqrt() <= settings.zero) & pushed)
             for a, s in zip(side.alive, side.squared, strict=True)]  # fmt: skip
    if any(bool((old != new).any()) for old, new in zip(side.alive, alive, strict=True)):
        side.alive, side.squared = alive, None
        for tensors in (side.nets, side.first, side.second):
            silence(tensors, alive, whole=not settings.ghosts)


def turned(lane: Lane, count: int) -> tuple[list[Lane], Lane | None]:
    """What a lane with a penalty becomes when `count` units are left.

    The runs that have now reached their targets, without a penalty, and what goes on, if anything.
    """
    reached = [t for t in lane.pending if count <= t]
    left = tuple(t for t in lane.pending if count > t)
    runs = [replace(lane, target=t, strength=0.0, pending=()) for t in reached]
    return runs, replace(lane, pending=left) if left else None
