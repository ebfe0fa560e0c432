"""How strong the penalty is at each optimizer step: fixed, driven by a target, or by the loss.

A controller is a frozen setting; what it remembers is a `State` that goes to JSON and back, so that
a resumed run decides as an uninterrupted one. Steps are optimizer steps, and losses are those of
all processes together: with the same `Seen`, every process decides alike.

`Shrinking` needs no strength at all: it takes the units of a decision to zero on a timetable.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from .errors import BadInput, TargetOutOfReach, problems
from .penalties import PerUnit
from .units import Group, Keep, Scores


@dataclass(frozen=True)
class State:
    """What a controller remembers. `strength` is the one to apply at the next step."""

    strength: float
    steps: int = 0  # optimizer steps seen
    considered: int = 0  # the last of them at which the strength was reconsidered
    smoothed: float | None = None  # loss
    reference: float | None = None  # smoothed loss at `considered`
    lowest: float | None = None  # validation loss
    latest: float | None = None  # validation loss measured since `considered`

    def to_json(self) -> str:
        """One line; floats survive exactly."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "State":
        """Raises BadInput for anything that `to_json` does not give."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as broken:
            raise BadInput(f"state of the strength is no JSON: {broken}") from None
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise BadInput(
                f"state of the strength must have {', '.join(sorted(names))}, got "
                f"{', '.join(sorted(values)) if isinstance(values, dict) else repr(values)}"
            )
        return cls(**values)


@dataclass(frozen=True)
class Seen:
    """What one optimizer step showed."""

    loss: float  # training loss of the step, nats per token
    zero: float = 0.0  # share of units that are zero now, 0 to 1
    needed: float = math.inf  # from `needed_strength`; read only where `decides` says so
    validation: float | None = None  # where it was measured at this step


@dataclass(frozen=True)
class Fixed:
    """One strength from beginning to end."""

    strength: float

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        _check("penalty", [*_at_least(0, strength=self.strength)])

    def begin(self, needed: float = 0.0) -> State:
        """The state before the first step."""
        return State(self.strength)

    def decides(self, state: State) -> bool:
        """Whether the next step reconsiders the strength."""
        return False

    def after(self, state: State, seen: Seen) -> State:
        """The state after a step."""
        return replace(state, steps=state.steps + 1)


@dataclass(frozen=True)
class LossDriven:
    """Raise the strength while the loss falls, lower it when it rises (Michaud et al. 2025).

    Every `every` steps after `warmup`, the smoothed loss (exponential mean of weight `smooth`,
    begun with the mean of the first ten) is compared with the one of last time: x `raise_by` if it
    is not larger, x `lower_by` if it is. Their code counts micro-batches, and passes the evaluation
    through the rule too; here only optimizer steps count. A loss that is not finite has risen.
    """

    strength: float
    every: int = 200
    warmup: int = 1000
    smooth: float = 0.999
    raise_by: float = 1.1
    lower_by: float = 0.6

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        found = _at_least(0, strength=self.strength, warmup=self.warmup)
        found += _at_least(1, every=self.every, raise_by=self.raise_by)
        if not 0 <= self.smooth < 1:
            found.append(f"smooth must be at least 0 and below 1, got {self.smooth}")
        if not 0 < self.lower_by <= 1:
            found.append(f"lower_by must be above 0 and at most 1, got {self.lower_by}")
        _check("penalty", found)

    def begin(self, needed: float = 0.0) -> State:
        """The state before the first step."""
        return State(self.strength)

    def decides(self, state: State) -> bool:
        """Whether the next step reconsiders the strength."""
        n = state.steps + 1
        return n > self.warmup and (n - self.warmup) % self.every == 0

    def after(self, state: State, seen: Seen) -> State:
        """The state after a step."""
        n, old = state.steps + 1, state.smoothed
        finite = math.isfinite(seen.loss)
        smoothed = old
        if finite and old is None:
            smoothed = seen.loss
        elif finite and old is not None:
            weight = (n - 1) / n if n <= 10 else self.smooth
            smoothed = weight * old + (1 - weight) * seen.loss
        after = replace(state, steps=n, smoothed=smoothed)
        if not self.decides(state):
            return after
        strength = state.strength
        if not finite:
            strength *= self.lower_by
        elif state.reference is not None and smoothed is not None:
            strength *= self.lower_by if smoothed > state.reference else self.raise_by
        return replace(after, strength=strength, reference=smoothed, considered=n)


@dataclass(frozen=True)
class Target:
    """Reach a share of zero units at step `steps`, by a strength that moves slowly and under veto.

    `needed_strength` says which strength would take the units that are nearest to zero there in the
    steps left, if gradients neither helped nor resisted. The run begins with it; gradients do
    resist, so every `patience` steps the strength moves towards it by at most x `bound`:

    - up only while fewer units are zero than the schedule wants, target * (1 - (1 - t/steps)^3)
      (Zhu & Gupta 2017), and only after a validation loss that answers to the last move;
    - down (by `bound`) where the validation loss is more than `tolerance` nats per token above the
      lowest one seen: the veto. With `tolerance` None nothing waits for validation losses.

    Zero units are not promised: what is missing at the end has to be chosen by score.
    """

    target: float
    steps: int
    patience: int = 10
    bound: float = 1.15
    tolerance: float | None = 0.3

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        found = []
        if not 0 <= self.target < 1:
            found.append(f"target must be at least 0 and below 1, got {self.target}")
        found += _at_least(1, steps=self.steps, patience=self.patience, bound=self.bound)
        found += _at_least(0, tolerance=self.tolerance or 0)
        _check("penalty", found)

    def wanted(self, step: int) -> float:
        """The share of zero units that the schedule wants after `step` steps."""
        left: float = 1 - min(max(step / self.steps, 0.0), 1.0)
        return self.target * (1 - left * left * left)

    def begin(self, needed: float = 0.0) -> State:
        """The state before the first step."""
        return State(needed)

    def decides(self, state: State) -> bool:
        """Whether the next step reconsiders the strength, so that `Seen.needed` is wanted."""
        return state.steps + 1 - state.considered >= self.patience

    def after(self, state: State, seen: Seen) -> State:
        """The state after a step."""
        n, lowest, latest = state.steps + 1, state.lowest, state.latest
        if seen.validation is not None:
            # JSON knows no infinity; the largest float vetoes as well.
            finite = math.isfinite(seen.validation)
            latest = seen.validation if finite else torch.finfo(torch.float64).max
            lowest = latest if lowest is None else min(lowest, latest)
        state = replace(state, steps=n, lowest=lowest, latest=latest)
        if n - state.considered < self.patience:
            return state
        factor = self._move(state, seen)
        if factor is None:
            return state
        strength = seen.needed if state.strength == 0 else state.strength * factor
        return replace(state, strength=strength, considered=n, latest=None)

    def _move(self, state: State, seen: Seen) -> float | None:
        """What to multiply the strength by; None to leave it and look again at the next step."""
        latest, lowest = state.latest, state.lowest
        limit = math.inf
        if self.tolerance is not None and lowest is not None:
            limit = lowest + self.tolerance
        if latest is not None and latest > limit:
            return 1 / self.bound
        if seen.needed < state.strength:
            return max(1 / self.bound, seen.needed / state.strength)
        answered = self.tolerance is None or latest is not None
        if seen.needed > state.strength and seen.zero < self.wanted(state.steps) and answered:
            ratio = seen.needed / state.strength if state.strength else self.bound
            return min(self.bound, ratio)
        return None


Controller = Fixed | LossDriven | Target


def needed_strength(
    norms: PerUnit, weights: PerUnit, *, share: float, learning: float
) -> float:
    """The strength at which the given share of units becomes zero in the steps left.

    `norms` as `proximal_step` gives them, `learning` the sum of the learning rates of the steps
    left: a unit loses lr * strength * weight each. 0 where enough are zero already, infinite where
    no step is left. Raises TargetOutOfReach where too few units have a weight.
    """
    # A unit of zeros is there, whatever its weight.
    flat = torch.cat(
        [(n / weights[name].to(n.device)).masked_fill(n == 0, 0) for name, n in norms.items()]
    )
    count = math.ceil(share * len(flat) - 1e-6)
    if count == 0:
        return 0.0
    farthest = float(flat.kthvalue(count).values)
    if math.isinf(farthest):
        pushed = float(flat.isfinite().float().mean())
        raise TargetOutOfReach(
            f"target {share} is above {pushed:.4f}, the share of units whose weight is above 0. "
            "Ask for less, or for weights that push more units."
        )
    if farthest == 0:
        return 0.0
    return farthest / learning if learning > 0 else math.inf


@dataclass(frozen=True)
class Shrinking:
    """Take the units of a decision to zero one after the other; all are there at step `steps`.

    A proximal step whose threshold is chosen per unit: ||theta|| / (steps left to the unit), which
    is a factor (left - 1) / left. A unit that training leaves alone falls linearly over `window`
    steps, one that training pushes back is shortened more, and both reach zero exactly on time.
    Nothing is remembered but the step, so a resumed run goes on as it was.

    `power` shapes how many are zero when: 1 - (1 - t/steps)^power; 3 is early, 1 linear.
    """

    steps: int
    window: int = 20
    power: float = 3.0

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        _check("shrinking", _at_least(1, steps=self.steps, window=self.window, power=self.power))

    def factors(self, places: PerUnit, step: int) -> dict[str, Tensor]:
        """What to multiply each unit by at step `step`, from 1, for `penalties.scale_units`."""
        return {name: self._factors(place, step) for name, place in places.items()}

    def _factors(self, place: Tensor, step: int) -> Tensor:
        fraction = 1 - (1 - place.double().clamp_max(1)).pow(1 / self.power)
        due = (fraction * self.steps - 1e-9).ceil().clamp_min(1)  # the step that ends in zero
        left = (due - step + 1).clamp_min(1)  # steps left to the unit, this one included
        factor = torch.where(left > self.window, 1.0, (left - 1) / left)
        return torch.where(place.isinf(), 1.0, factor).float()


def removal_places(groups: Sequence[Group], keep: Keep, scores: Scores) -> dict[str, Tensor]:
    """When each unit goes: its place among the removed of its group, above 0 and up to 1.

    By score, the lowest first; infinite for units that stay. Groups keep pace with each other.
    """
    places = {}
    for g in groups:
        stays = keep[g.name]
        order = scores[g.name].masked_fill(stays, math.inf).argsort(stable=True)
        rank = torch.empty(g.size).index_copy_(0, order, torch.arange(1.0, g.size + 1))
        removed = max(1, int((~stays).sum()))
        places[g.name] = (rank / removed).masked_fill(stays, math.inf)
    return places


def _at_least(least: float, **values: float) -> list[str]:
    return [
        f"{name} must be finite and at least {least}, got {value}"
        for name, value in values.items()
        if not least <= value < math.inf
    ]


def _check(source: str, found: Sequence[str]) -> None:
    if found:
        raise problems(source, found)
