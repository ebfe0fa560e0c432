"""What is left of a model after any set of removals, and how a model is brought to it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .budget import Removal
from .depth import Layer, carried, counted, layers_of, remove_layers, silence, stack_of, take_out
from .families import find_groups
from .progress import Track, silent
from .refit import Against, RefitFacts, refit_and_remove
from .units import Group, Keep, keep_all, remove


@dataclass(frozen=True)
class Decision:
    """Which layers stay, (layers,) bool, and which units, by the names that the whole model has.

    A half of a layer of which no unit stays goes as a whole. Units of layers that go are all False.
    """

    layers: Tensor
    keep: Keep

    @classmethod
    def whole(cls, layers: Sequence[Layer]) -> "Decision":
        """The decision to remove nothing."""
        groups = [g for layer in layers for g in layer.groups]
        return cls(torch.ones(len(layers), dtype=torch.bool), keep_all(groups))

    def without(self, layers: Sequence[Layer], removal: Removal) -> "Decision":
        """The decision to remove this as well."""
        at = layers[removal.layer]
        alive, changed = self.layers, dict(self.keep)
        match removal.kind:
            case "layers":
                alive = alive.clone()
                alive[removal.layer] = False
                gone: tuple[Group, ...] = at.groups
            case "attention" | "mlp":
                gone = counted(at.half("attention" if removal.kind == "attention" else "mlp"))
            case _:
                stay = self.keep[removal.group].clone()
                stay[list(removal.units)] = False
                return Decision(alive, {**changed, removal.group: stay})
        changed |= {g.name: torch.zeros(g.size, dtype=torch.bool) for g in gone}
        return Decision(alive, changed)

    @property
    def kept(self) -> dict[str, int]:
        """How many units of each group stay."""
        return {name: int(stay.sum()) for name, stay in self.keep.items()}

    @property
    def name(self) -> str:
        """Equal decisions have equal names."""
        digest = hashlib.sha256(bytes(self.layers.tolist()))
        for name in sorted(self.keep):
            digest.update(name.encode() + bytes(self.keep[name].tolist()))
        return digest.hexdigest()[:16]


@torch.no_grad()
def carry_out(
    model: Any,
    decision: Decision,
    batches: Sequence[Tensor],
    *,
    damping: float = 0.01,
    sequential: bool = True,
    refit: bool = True,
    dtype: torch.dtype | None = None,
    against: Against | None = None,
    out: bool = True,
    track: Track = silent,
) -> tuple[tuple[Group, ...], Keep, RefitFacts | None]:
    """Bring the model, which is whole, to the decision, in place; layers first, units last.

    Gives the groups and the keep of the rest under the names that they have once layers are gone,
    which is what `checkpoint.save` wants, with the config as it is after `remove_layers`. Readers
    of units are refitted on `batches`; what took a whole layer or half is not. With `out` False
    emptied halves stay in the model, silent, so that it can be pruned further.
    """
    groups = find_groups(model)
    if not decision.layers.all():
        stack = stack_of(model, groups)
        remove_layers(model, decision.layers)
        keep = carried(decision.keep, decision.layers, stack)
        groups = find_groups(model)
    else:
        keep = dict(decision.keep)
    keep = keep_all(groups) | keep
    halves = [half for at in layers_of(model, groups) for half in (at.attention, at.mlp)]
    emptied = [h for h in halves if counted(h) and not any(keep[g.name].any() for g in counted(h))]
    for half in emptied:
        silence(model, half)
    partly = keep | keep_all(g for half in emptied for g in half)
    facts = None
    if refit:
        facts = refit_and_remove(
            model, groups, partly, batches, damping=damping, sequential=sequential, dtype=dtype,
            against=against, track=track,
        )  # fmt: skip
    else:
        remove(model, groups, partly)
    if out and emptied:
        left = find_groups(model)
        gone = {g.name for half in emptied for g in counted(half)}
        none = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in left if g.name in gone}
        take_out(model, left, keep_all(left) | none)
    return tuple(groups), keep, facts
