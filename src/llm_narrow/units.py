"""Units, the groups they form, and what can be done to them: pick, mask, remove, count.

A unit is the smallest thing that is removed: one MLP neuron, one attention head (with grouped
queries: one key/value head and its query heads), one expert. A group is a row of interchangeable
units. Unit `u` owns the `u`-th block of every slice of its group, so every operation is a loop over
slices and knows no architecture by name.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import BadInput, problems

Kind = Literal["neurons", "heads", "experts"]
KINDS: tuple[Kind, ...] = ("neurons", "heads", "experts")
# Kinds whose units a router chooses among: one that owns nothing but zeros is chosen all the same,
# so that it can be removed but not masked.
ROUTED: tuple[Kind, ...] = ("experts",)
Params = Mapping[str, Tensor]  # name -> tensor, as from dict(model.named_parameters())
Scores = dict[str, Tensor]  # group name -> (size,) float32, higher = keep
Keep = dict[str, Tensor]  # group name -> (size,) bool, True where the unit stays


@dataclass(frozen=True)
class Slice:
    """Unit `u` owns [start + u * block, start + (u + 1) * block) along `dim` of `param`."""

    param: str
    dim: int
    start: int = 0
    block: int = 1

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.param.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """A row of `size` interchangeable units.

    `writes` are the parameters that produce the activation of the units, `reads` those that
    consume it. `sizes` are module attributes, each with its value per unit, that have to follow
    the number of units in memory. `config` are the same for config.json when every layer keeps
    the same number; None says that no stock config can express a smaller number. `added` says that
    what the readers give is added to the residual stream as it is, with no norm or factor in
    between. At least `least` units have to stay.
    """

    name: str
    kind: Kind
    size: int
    writes: tuple[Slice, ...]
    reads: tuple[Slice, ...]
    sizes: tuple[tuple[str, int | Fraction], ...] = ()
    config: tuple[tuple[str, int], ...] | None = None
    added: bool = True
    least: int = 0

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices of the group."""
        return self.writes + self.reads


def unit_rows(tensor: Tensor, s: Slice, size: int) -> Tensor:
    """One row per unit, (size, entries of the slice per unit). Differentiable."""
    return tensor.narrow(s.dim, s.start, size * s.block).movedim(s.dim, 0).reshape(size, -1)


def norms(group: Group, params: Params, slices: Iterable[Slice] | None = None) -> Tensor:
    """The L2 norm of everything each unit owns, (size,)."""
    chosen = group.slices if slices is None else slices
    squares = [unit_rows(params[s.param], s, group.size).float().square().sum(1) for s in chosen]
    return torch.stack(squares).sum(0).sqrt()


def positions(s: Slice, units: Tensor) -> Tensor:
    """Where the given units, (n,) int64, lie along the axis of the slice, (n * block,)."""
    return (s.start + units[:, None] * s.block + torch.arange(s.block)).flatten()


def removed(groups: Iterable[Group], keep: Keep) -> dict[tuple[str, int], Tensor]:
    """Which positions of which parameter axis go: what `mask`, `remove` and `count` all follow."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    for g in groups:
        dropped = (~keep[g.name]).nonzero().flatten()
        for s in g.slices:
            parts.setdefault((s.param, s.dim), []).append(positions(s, dropped))
    return {axis: torch.cat(p) for axis, p in parts.items()}


def count(params: Params, groups: Iterable[Group], keep: Keep) -> int:
    """Parameters left after removal. From shapes, since two groups may share a matrix."""
    shapes = {name: list(p.shape) for name, p in params.items()}
    for (name, dim), gone in removed(groups, keep).items():
        shapes[name][dim] -= len(gone)
    return sum(math.prod(shape) for shape in shapes.values())


def keep_all(groups: Iterable[Group]) -> Keep:
    """The decision to remove nothing."""
    return {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}


@torch.no_grad()
def mask(model: nn.Module, groups: Iterable[Group], keep: Keep) -> None:
    """Set everything the removed units own to zero, in place. Raises BadInput for ROUTED kinds."""
    groups = list(groups)
    routed = [g for g in groups if g.kind in ROUTED and not keep[g.name].all()]
    if routed:
        raise BadInput(
            f"{routed[0].kind} cannot be masked, got {routed[0].name}: a router chooses among them "
            "even where their weights are zero. Remove them, or leave the kind out."
        )
    params = dict(model.named_parameters())
    for (name, dim), gone in removed(groups, keep).items():
        params[name].index_fill_(dim, gone.to(params[name].device), 0)


@torch.no_grad()
def remove(model: nn.Module, groups: Sequence[Group], keep: Keep) -> None:
    """Shrink the model in place to the kept units. Works on meta tensors too, as loading needs.

    Raises BadInput where fewer than a group's `least` would stay.
    """
    few = [g for g in groups if int(keep[g.name].sum()) < g.least]
    if few:
        raise problems(
            "too few units would stay",
            [
                f"{g.name} must keep at least {g.least} {g.kind}, got {int(keep[g.name].sum())}"
                for g in few
            ],
        )
    for (name, dim), gone in removed(groups, keep).items():
        if not len(gone):
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        stay = torch.ones(old.shape[dim], dtype=torch.bool).index_fill_(0, gone, False)
        new = old.index_select(dim, stay.nonzero().flatten().to(old.device))
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        _refresh(owner)
    for g in groups:
        left = int(keep[g.name].sum())
        for path, per_unit in g.sizes if left < g.size else ():
            _set_size(model, path, int(per_unit * left))
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _refresh(layer: Any) -> None:
    """Keep the sizes that a layer reports about itself true to its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif type(layer).__name__ == "Conv1D":
        layer.nx, layer.nf = layer.weight.shape
    elif any(p.dim() == 3 and p.shape[-1] % 8 for p in layer.parameters(recurse=False)):
        # The usual product of all experts at once needs rows of whole 16 bytes; a loop does not.
        layer.config = copy.copy(layer.config)
        layer.config._experts_implementation = "eager"


def _set_size(model: nn.Module, path: str, value: int) -> None:
    owner_name, _, leaf = path.rpartition(".")
    if owner_name.endswith(".config"):
        # One config object is shared by all layers: a layer of its own size needs its own.
        layer: Any = model.get_submodule(owner_name.removesuffix(".config"))
        layer.config = copy.copy(layer.config)
        setattr(layer.config, leaf, value)
    else:
        setattr(model.get_submodule(owner_name), leaf, value)
