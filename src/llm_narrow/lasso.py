"""The group lasso as steps of a training run: what `train` calls around each optimizer step.

Which units are drawn, and how hard, is decided before the run (weights) and on its way (control).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .penalties import (
    PENALTIES,
    PerUnit,
    add_gradient,
    hold_zero,
    over_shards,
    proximal_step,
    scale_units,
    unit_norms,
    zero_share,
)
from .strength import Controller, Fixed, LossDriven, Seen, Shrinking, State, Target, needed_strength
from .train import Step
from .units import Group, keep_all


class _Drawing:
    """What all ways of drawing units to zero share: the groups, and what is recorded."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """The groups whose units are drawn."""
        self.groups = groups
        self.alive = keep_all(groups)

    def recorded(self, norms: PerUnit, **facts: float) -> Mapping[str, Any]:
        """The numbers of a step, and the norms, to be drawn."""
        drawn = [x for norm in norms.values() for x in norm.tolist()]
        return {**facts, "zero": zero_share(norms), "norms": drawn}

    def settle(self, optimizer: Any, params: Mapping[str, Tensor], norms: PerUnit) -> None:
        """Have the optimizer forget the units that became zero, so that they stay there."""
        alive = {name: (norm > 0).cpu() for name, norm in norms.items()}
        fallen = {name: now | ~self.alive[name] for name, now in alive.items()}
        hold_zero(optimizer, self.groups, params, fallen)
        self.alive = alive

    def before(self, model: Any, step: Step) -> None:
        """Before gradients are clipped: nothing, unless the penalty is one of gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, held: Mapping[str, Any]) -> None:
        """The reverse."""


class Proximal(_Drawing):
    """A proximal step after each optimizer step, its strength under control."""

    def __init__(
        self, groups: Sequence[Group], weights: PerUnit, control: Controller, share: float
    ) -> None:
        """`share` of all units is to be zero at the end, for a control that aims at it."""
        super().__init__(groups)
        self.weights, self.control, self.share = weights, control, share
        self.state: State | None = None

    def __call__(self, model: Any, step: Step) -> Mapping[str, Any]:
        """Take the step, and let the control look at it."""
        params = dict(model.named_parameters())
        reduce = over_shards({s.param: params[s.param] for g in self.groups for s in g.slices})
        if self.state is None:
            needed = 0.0
            if isinstance(self.control, Target):
                norms = unit_norms(self.groups, params, reduce=reduce)
                needed = self._needed(norms, step.lr_left + step.lr)
            self.state = self.control.begin(needed)
        strength = self.state.strength
        norms = proximal_step(
            self.groups, params, self.weights, step.lr * strength, reduce=reduce
        )
        self.settle(step.optimizer, params, norms)
        aims = isinstance(self.control, Target) and self.control.decides(self.state)
        seen = Seen(
            step.loss, zero_share(norms), validation=step.validation,
            **({"needed": self._needed(norms, step.lr_left)} if aims else {}),
        )  # fmt: skip
        self.state = self.control.after(self.state, seen)
        return self.recorded(norms, strength=strength)

    def _needed(self, norms: PerUnit, learning: float) -> float:
        return needed_strength(norms, self.weights, share=self.share, learning=learning)

    def state_dict(self) -> dict[str, Any]:
        """The state of the control."""
        return {} if self.state is None else {"control": self.state.to_json()}

    def load_state_dict(self, held: Mapping[str, Any]) -> None:
        """The reverse."""
        self.state = State.from_json(held["control"]) if "control" in held else None


class Timetable(_Drawing):
    """Each unit of a decision reaches zero at its time; there is no strength to control."""

    def __init__(self, groups: Sequence[Group], places: PerUnit, shrinking: Shrinking) -> None:
        """`places` as from `removal_places`."""
        super().__init__(groups)
        self.places, self.shrinking = places, shrinking

    def __call__(self, model: Any, step: Step) -> Mapping[str, Any]:
        """Shorten every unit whose time has come."""
        params = dict(model.named_parameters())
        reduce = over_shards({s.param: params[s.param] for g in self.groups for s in g.slices})
        scale_units(self.groups, params, self.shrinking.factors(self.places, step.number))
        norms = unit_norms(self.groups, params, reduce=reduce)
        self.settle(step.optimizer, params, norms)
        return self.recorded(norms)


class Gradient(_Drawing):
    """The penalty's gradient beside that of the loss (Michaud et al. 2025); no exact zeros."""

    def __init__(
        self,
        groups: Sequence[Group],
        weights: PerUnit,
        control: Fixed | LossDriven,
        penalty: str = "group_lasso",
    ) -> None:
        """`penalty` is a name of PENALTIES."""
        super().__init__(groups)
        self.weights, self.control, self.penalty = weights, control, PENALTIES[penalty]
        self.state = control.begin()
        self.value = 0.0

    def before(self, model: Any, step: Step) -> None:
        """Add the gradient of the penalty."""
        params = dict(model.named_parameters())
        owned = {s.param: params[s.param] for g in self.groups for s in g.slices}
        value = add_gradient(
            self.penalty, self.state.strength, self.groups, params, self.weights,
            reduce=over_shards(owned),
        )  # fmt: skip
        self.value = float(value)

    def __call__(self, model: Any, step: Step) -> Mapping[str, Any]:
        """Let the control look at the step."""
        params = dict(model.named_parameters())
        owned = {s.param: params[s.param] for g in self.groups for s in g.slices}
        strength = self.state.strength
        self.state = self.control.after(self.state, Seen(step.loss, validation=step.validation))
        norms = unit_norms(self.groups, params, reduce=over_shards(owned))
        return self.recorded(norms, strength=strength, penalty=self.value)

    def state_dict(self) -> dict[str, Any]:
        """The state of the control."""
        return {"control": self.state.to_json()}

    def load_state_dict(self, held: Mapping[str, Any]) -> None:
        """The reverse."""
        self.state = State.from_json(held["control"])
