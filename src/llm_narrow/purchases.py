"""What is bought, from what, and what it comes to: the words that spending is told in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .budget import Amounts, Removal
from .curves import convex
from .decision import Decision
from .trials import Measured
from .units import Kind

Limits = Mapping[str, float]  # resource (or bytes) -> the most that may be left of it
PIECES = 64  # that the neurons of a group, and each stretch of an outside curve, are bought in
NEVER = float("inf")


class Tried(Protocol):
    """What `trials.Trials` is to the spending: a model's loss, and how much removals add."""

    def loss(self) -> float:
        """The loss of the model as it is left, in nats per token."""
        ...

    def divergence(self) -> float:
        """How far it is from the whole model, the mean of KL(whole || it), in nats per token."""
        ...

    def rises(self, removals: Iterable[Removal]) -> list[Measured]:
        """How much both rise with each of the removals alone, in nats per token."""
        ...


@dataclass(frozen=True)
class Floors:
    """The least that stays: layers, halves of layers, and units in every half that stays."""

    layers: int = 1
    attention: int = 0
    mlp: int = 0
    units: Mapping[Kind, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outside:
    """Something to remove that others price, as the vocabulary: (parameters saved, rise) points.

    The rise of the loss is in nats per token of the whole model, or per byte. Any amount up to the
    last point can be bought, at prices between those of the points.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    per: Literal["token", "byte"] = "token"
    flops: float = 2.0  # operations per token saved with each parameter


@dataclass(frozen=True)
class Step:
    """One purchase. `removal` is None for what is outside."""

    removal: Removal | None
    outside: str
    saves: Amounts
    increase: float  # expected when it was bought, nats per token
    round: int


@dataclass(frozen=True)
class Check:
    """The loss between two rounds, in nats per token: as expected, and as measured."""

    left: Amounts
    expected: float
    measured: float


@dataclass(frozen=True)
class Spent:
    """What a budget buys: the decision, what is left with it, and what it is expected to cost.

    Losses in nats per token on the blocks of the prices, of the decision without what is outside.
    `listed` adds up the prices at which things were bought, `expected` does so from the last
    measurement on; `measured` is the loss of the decision, refitted, and `divergence` how far it is
    from the whole model.
    """

    decision: Decision
    outside: dict[str, tuple[float, float]]  # parameters to save, and expected rise; apart
    left: Amounts
    before: float  # of the whole model
    listed: float
    expected: float
    measured: float | None
    steps: tuple[Step, ...]
    checks: tuple[Check, ...]
    divergence: float | None = None

    def facts(self) -> dict[str, Any]:
        """What a manifest tells."""
        bought: dict[str, dict[str, float]] = {}
        for step in self.steps:
            kind = step.removal.kind if step.removal else step.outside
            of = bought.setdefault(kind, {"number": 0, "parameters": 0.0, "increase": 0.0})
            of["number"] += max(1, len(step.removal.units)) if step.removal else 0
            of["parameters"] += step.saves.parameters
            of["increase"] += step.increase
        return {
            "before": self.before, "listed": self.listed, "expected": self.expected,
            "measured": self.measured, "divergence": self.divergence,
            "left": vars(self.left), "outside": self.outside,
            "layers": self.decision.layers.tolist(), "kept": self.decision.kept, "bought": bought,
            "checks": [{**vars(c), "left": vars(c.left)} for c in self.checks],
        }  # fmt: skip


@dataclass(frozen=True)
class Option:
    """Something that can be bought now. `removal` and `outside` as in `Step`."""

    removal: Removal | None
    outside: "OutsideCurve | None"
    saves: Amounts
    increase: float
    amount: float = 0.0  # of the outside thing, once it is bought


class OutsideCurve:
    """An outside curve and how far it is bought, in parameters saved."""

    def __init__(self, of: Outside, bytes_per_token: float) -> None:
        """`bytes_per_token` turns what costs so much per byte into what it costs per token."""
        factor = bytes_per_token if of.per == "byte" else 1.0
        self.name, self._flops = of.name, of.flops
        self.knots = convex([(x, y * factor) for x, y in sorted(of.points)])
        self.end = self.knots[-1][0]
        self.bought = 0.0

    def saves(self, amount: float) -> Amounts:
        """What so many parameters less save."""
        return Amounts(amount, amount * self._flops, 0.0)

    def next(self, need: float) -> Option | None:
        """The next piece: within one stretch, and of no more parameters than are needed."""
        for (x, y), (ahead, above) in zip(self.knots, self.knots[1:], strict=False):
            if self.bought < ahead - 0.5:
                size = min(ahead - self.bought, max(1.0, (ahead - x) / PIECES))
                size = min(size, max(1.0, need)) if need > 0 else size
                rise = (above - y) / (ahead - x) * size
                return Option(None, self, self.saves(size), rise, self.bought + size)
        return None


def risen(steps: Iterable[Step]) -> float:
    """What the steps are expected to cost, but for those outside."""
    return sum((s.increase for s in steps if s.removal is not None), 0.0)


def within(left: Amounts, limits: Limits) -> bool:
    """Whether no more is left than may be; to a thousandth, for sums of fractions."""
    return all(getattr(left, r) <= most + 1e-3 for r, most in limits.items())
