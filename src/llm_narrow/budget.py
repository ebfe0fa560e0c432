"""What there is to remove, and what each removal saves: parameters, operations and cache.

All is counted from shapes, so that groups that share a matrix (experts and their neurons) are not
counted twice.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from .cost import (
    channels_times,
    experts_per_token,
    fixed_width,
    flops_per_token,
    is_matrix,
    size,
)
from .depth import Layer, counted, layers_of
from .units import KINDS, ROUTED, Group, Params, remove

PricedKind = Literal["neurons", "heads", "experts", "attention", "mlp", "layers"]
PRICED: tuple[PricedKind, ...] = ("neurons", "heads", "experts", "attention", "mlp", "layers")
LARGE: tuple[PricedKind, ...] = ("heads", "experts", "attention", "mlp", "layers")


@dataclass(frozen=True)
class Amounts:
    """Parameters, floating-point operations of one token, and bytes that it takes in the cache."""

    parameters: float = 0.0
    flops: float = 0.0
    kv_bytes: float = 0.0

    def __add__(self, other: "Amounts") -> "Amounts":
        """Each added to its like."""
        return Amounts(*(a + b for a, b in zip(self.each(), other.each(), strict=True)))

    def __sub__(self, other: "Amounts") -> "Amounts":
        """Each taken from its like."""
        return self + other * -1

    def __mul__(self, factor: float) -> "Amounts":
        """Each times the factor."""
        return Amounts(*(factor * a for a in self.each()))

    def each(self) -> tuple[float, float, float]:
        """All of them, in the order of the fields."""
        return self.parameters, self.flops, self.kv_bytes


RESOURCES = tuple(f.name for f in fields(Amounts))


@dataclass(frozen=True)
class Removal:
    """One thing that can go, in the numbers that the whole model had.

    `units` of `group` for units; a half of the layer or all of it, with no group, for the others.
    """

    kind: PricedKind
    layer: int
    group: str = ""
    units: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What the user is told: `heads 3:1`, `mlp 7`, `layers 12`."""
        if not self.units:
            return f"{self.kind} {self.layer}"
        which = str(self.units[0]) if len(self.units) == 1 else f"{len(self.units)} units"
        return f"{self.kind} {self.layer}:{which}"


@dataclass(frozen=True)
class _Axis:
    """How many positions of an axis of a parameter a unit owns."""

    param: str
    dim: int
    block: int


@dataclass(frozen=True)
class Ledger:
    """What is in each layer, and what is outside of all."""

    layers: tuple[Layer, ...]
    outside: Amounts
    bytes_per_parameter: int
    context: int
    _shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    _axes: Mapping[str, tuple[_Axis, ...]]
    _matrices: frozenset[str]
    _given: int  # experts of a token
    _per_channel: float  # operations of a channel of values for each token looked back at
    _fixed: int  # channels of a layer's heads, where these are no units
    _cache: tuple[float, ...]  # bytes of a token in each layer of the whole model
    _own_cache: frozenset[str]  # groups whose units have keys and values of their own

    def of(self, number: int, kept: Mapping[str, int]) -> Amounts:
        """What a layer has where so many units of each of its groups are kept."""
        layer = self.layers[number]
        shapes = {name: list(shape) for name, shape in self._shapes[number].items()}
        flops = cache = 0.0
        for half in (layer.attention, layer.mlp):
            empty = not any(kept[g.name] for g in counted(half))
            left = {g.name: g.size if empty and g.kind in ROUTED else kept[g.name] for g in half}
            for g in half:
                for axis in self._axes[g.name]:
                    shapes[axis.param][axis.dim] -= axis.block * (g.size - left[g.name])
                if g.kind == "heads":
                    flops += self._per_channel * self.context * kept[g.name] * g.reads[0].block
                    share = kept[g.name] / g.size
                    if g.name not in self._own_cache:
                        share = float(kept[g.name] > 0)
                    cache += share * self._cache[number] / len(layer.attention)
        if not layer.attention:
            cache = self._cache[number]
        elif not any(kept[g.name] for g in layer.attention):
            cache = 2.0 * self.bytes_per_parameter  # see `depth.Skipped`
        entries = {name: math.prod(shape) for name, shape in shapes.items()}
        for name, n in entries.items():
            if name in self._matrices:
                experts = shapes[name][0] if len(shapes[name]) == 3 else 1
                flops += 2.0 * n * min(self._given, experts) / experts
        if not layer.attention:
            flops += 4.0 * self.context * self._fixed
        return Amounts(sum(entries.values()), flops, cache)

    def total(self, kept: Mapping[str, int], alive: Sequence[bool]) -> Amounts:
        """What the model has with so many units in the layers that are alive."""
        found = self.outside
        for layer in self.layers:
            if alive[layer.number]:
                found += self.of(layer.number, kept)
        return found


def amounts(model: Any) -> Amounts:
    """What the model has of everything that a budget may limit."""
    layers = layers_of(model)
    sizes = {g.name: g.size for layer in layers for g in layer.groups}
    return ledger(model, layers).total(sizes, [True] * len(layers))


def ledger(
    model: Any,
    layers: Sequence[Layer],
    *,
    context: int = 256,
    bytes_per_parameter: int | None = None,
) -> Ledger:
    """What the model as it is has in which layer; `context` as in `cost.flops_per_token`.

    Sizes in bytes are those of the model's precision unless `bytes_per_parameter` is given.
    """
    params: Params = dict(model.named_parameters())
    shapes = tuple(
        {n: tuple(p.shape) for n, p in params.items() if n.startswith(f"{layer.name}.")}
        for layer in layers
    )
    groups = [g for layer in layers for g in layer.groups]
    entry = bytes_per_parameter or next(iter(params.values())).element_size()
    found = Ledger(
        layers=tuple(layers),
        outside=Amounts(),
        bytes_per_parameter=entry,
        context=context,
        _shapes=shapes,
        _axes={g.name: tuple(_Axis(s.param, s.dim, s.block) for s in g.slices) for g in groups},
        _matrices=frozenset(
            f"{name}.{leaf}"
            for name, m in model.named_modules()
            for leaf, p in m.named_parameters(recurse=False)
            if is_matrix(m) and p.dim() in (2, 3)
        ),
        _given=experts_per_token(model),
        _per_channel=2.0 * channels_times(model.config),
        _fixed=fixed_width(model.config) if not any(g.kind == "heads" for g in groups) else 0,
        _cache=tuple(entry * n for n in _cached(model, len(layers))),
        _own_cache=_owners(model, layers),
    )
    whole = {g.name: g.size for g in groups}
    inside = found.total(whole, [True] * len(layers))
    everything = Amounts(size(model).parameters, flops_per_token(model, context=context))
    outside = everything - inside
    return Ledger(**{**vars(found), "outside": Amounts(outside.parameters, outside.flops, 0.0)})


def kinds_of(groups: Sequence[Group]) -> tuple[PricedKind, ...]:
    """The kinds of thing that a model of these groups has, in the order of `PRICED`."""
    there = {g.kind for g in groups}
    found: set[PricedKind] = {kind for kind in KINDS if kind in there}
    found |= {"layers"} if there else set()
    found |= {"attention"} if "heads" in there else set()
    found |= {"mlp"} if there - {"heads"} else set()
    return tuple(kind for kind in PRICED if kind in found)


def _owners(model: Any, layers: Sequence[Layer]) -> frozenset[str]:
    """The groups of heads that have keys and values of their own, so that fewer cache less.

    Not so where all heads share them, or where what is cached is what they grow from. Found by
    removing a head from one layer, which is put back.
    """
    heads = [g for layer in layers for g in layer.attention]
    for layer in layers:
        for g in layer.attention:
            if g.size < 2:
                continue
            stack = model.get_submodule(layer.name.rpartition(".")[0])
            whole, before = stack[layer.number], _cached(model, len(layers))
            stack[layer.number] = copy.deepcopy(whole)
            try:
                remove(model, [g], {g.name: torch.arange(g.size) > 0})
                after = _cached(model, len(layers))
            finally:
                stack[layer.number] = whole
            return frozenset(h.name for h in heads) if after != before else frozenset()
    return frozenset(h.name for h in heads)


@torch.no_grad()
def _cached(model: Any, layers: int) -> list[int]:
    """Numbers that one token leaves in the cache of each layer, by running the model on one."""
    device = next(model.parameters()).device
    out = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=True)
    held = getattr(out.past_key_values, "layers", [])
    found = [layer.keys.numel() + layer.values.numel() if layer.is_initialized else 0
             for layer in held]  # fmt: skip
    return found if len(found) == layers else [0] * layers
