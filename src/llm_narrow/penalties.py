"""Group lasso and its relatives: what draws whole units to zero during training.

Two ways to apply a penalty of strength s to units of norm v:

- *proximal*: after each optimizer step, `proximal_step` shortens every unit by lr * s * weight.
  Zeros are exact, and the moments of AdamW never see the penalty (as with its weight decay).
- *sub-gradient* (Michaud et al. 2025, arXiv 2505.15811): `add_gradient` adds s * dR/dparams to the
  gradients once per optimizer step. Norms shrink but never become 0.

Their neuron penalties are these functions with weights "one" on the groups of kind "neurons":
l1_of_l2_of_mlps = group_lasso, lhalf_of_l2_of_mlps = l_half_of_l2, group_hoyer_neurons = hoyer,
l1_sparsity_loss_mlps = l1 (where neurons own the whole MLP, as in Llama). Their parity networks
include biases in a unit, as `Group.slices` does; their MNIST ones do not: see `without_biases`.

Under AdamW an entry moves by about lr whatever the size of its gradient, so a strength below about
1 (with weights "size") lets units hover above zero, and "sub-gradient" strengths mean something
else altogether. With plain SGD the proximal step minimises loss + strength * sum(weight * norm).

**Sharded parameters** (FSDP2's DTensor): every process sums what it holds of each unit, `reduce`
adds these sums up over the processes (one call for all units), and each process then scales its
own part. Pass `reduce=over_shards(params)`; with plain tensors, or DDP, leave it out.

**Units that share entries** (the matrix between two hidden layers of a plain MLP belongs to the
units on both sides): all norms are taken before anything is scaled, and a shared entry is scaled by
both. The order of the groups then does not matter, an entry is zero as soon as one owner is, and
the result is the proximal point of the sum up to terms of order (lr * s)^2.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .errors import BadInput, UnknownName
from .plan import Allocation
from .units import Group, Keep, Kind, Params, Scores, Slice, positions, unit_rows

Weighting = Literal["size", "one"]
WEIGHTINGS: tuple[Weighting, ...] = ("size", "one")
PerUnit = Mapping[str, Tensor]  # group name -> (size,) float32
Reduce = Callable[[Tensor], Tensor]  # sums of one process, (units,) -> sums of all, (units,)

EPS = 1e-12  # under the root, whose gradient at 0 is NaN without


@dataclass(frozen=True)
class Penalty:
    """A number made of the norms of units, each norm being over everything the unit owns.

    `inner` is the norm within a unit (1 or 2), `of` maps weighted norms (units,) to a scalar ().
    """

    inner: Literal[1, 2]
    of: Callable[[Tensor], Tensor]

    def __call__(self, groups: Sequence[Group], params: Params, weights: PerUnit) -> Tensor:
        """The penalty, (), differentiable. Plain tensors only: see `add_gradient` for sharded."""
        entry = torch.square if self.inner == 2 else torch.abs
        sums = torch.cat([_sums_of(g, params, entry) for g in groups])
        return self.of(_flat(weights, groups, sums.device) * self.norm(sums))

    def norm(self, sums: Tensor) -> Tensor:
        """Norms from sums of squares, or of absolute values, (units,)."""
        return (sums + EPS).sqrt() if self.inner == 2 else sums


def _half(norms: Tensor) -> Tensor:
    return norms.sqrt().sum().square()


def _hoyer(norms: Tensor) -> Tensor:
    return norms.sum() / norms.square().sum().sqrt()


PENALTIES: dict[str, Penalty] = {
    "group_lasso": Penalty(2, torch.sum),
    "hoyer": Penalty(2, _hoyer),
    "l1": Penalty(1, torch.sum),
    "l_half_of_l2": Penalty(2, _half),
}


def penalty(name: str) -> Penalty:
    """The penalty of that name. Raises UnknownName."""
    if name not in PENALTIES:
        raise UnknownName("penalty", name, PENALTIES)
    return PENALTIES[name]


def without_biases(groups: Sequence[Group]) -> list[Group]:
    """The groups for norms that leave biases out. Not for the proximal step: a unit whose bias is
    left still acts."""
    return [
        replace(g, writes=tuple(s for s in g.writes if not s.param.endswith(".bias")))
        for g in groups
    ]


def unit_weights(
    groups: Sequence[Group], params: Params, weighting: Weighting = "size"
) -> dict[str, Tensor]:
    """The weight of every unit: the root of the number of its entries, or 1. Raises UnknownName."""
    if weighting not in WEIGHTINGS:
        raise UnknownName("group weighting", weighting, WEIGHTINGS)
    if weighting == "one":
        return {g.name: torch.ones(g.size) for g in groups}
    return {g.name: torch.full((g.size,), _entries(g, params) ** 0.5) for g in groups}


def _entries(g: Group, params: Params) -> int:
    """How many numbers a unit owns."""
    shapes = [(params[s.param].shape, s) for s in g.slices]
    return sum(shape.numel() // shape[s.dim] * s.block for shape, s in shapes)


def weights_from_scores(
    scores: Scores,
    groups: Sequence[Group],
    *,
    sparsity: Mapping[Kind, float],
    times: PerUnit,
    allocation: Allocation = "uniform",
    spare: float = 0.25,
) -> dict[str, Tensor]:
    """`times` (as from `unit_weights`) x a factor from 1 for the lowest score down to 0.

    Norms of a trained model are almost equal, so with equal weights all units near zero together.
    Here the factor falls linearly with the rank of the score and is 0 from the share
    sparsity * (1 + spare) on: units go one after the other, and most of the kept are never pushed.
    Ranks, not values, as scores are heavy-tailed. `uniform` ranks within each group, `global`
    over all of a kind. Kinds that `sparsity` does not name get 0.
    """
    found = {}
    for g in groups:
        share = sparsity.get(g.kind, 0.0)
        if not 0 <= share < 1:
            raise BadInput(f"sparsity of {g.kind} must be at least 0 and below 1, got {share}")
        alike = [g] if allocation == "uniform" else [x for x in groups if x.kind == g.kind]
        pool = torch.cat([scores[x.name] for x in alike]).sort().values
        # The middle of equal scores, so that they get equal weights.
        below = torch.searchsorted(pool, scores[g.name], right=False)
        upto = torch.searchsorted(pool, scores[g.name], right=True)
        rank = (below + upto - 1).float() / 2 / len(pool)
        edge = min(share * (1 + spare), 1.0)
        factor = (1 - rank / edge).clamp_min(0) if edge else torch.zeros(g.size)
        found[g.name] = times[g.name] * factor
    return found


def unit_norms(
    groups: Sequence[Group], params: Params, *, reduce: Reduce | None = None
) -> dict[str, Tensor]:
    """The L2 norm of everything each unit owns, (size,) per group; exactly 0 for units of zeros."""
    return _by_group(_sums(groups, params, torch.square, reduce).sqrt(), groups)


@torch.no_grad()
def proximal_step(
    groups: Sequence[Group],
    params: Params,
    weights: PerUnit,
    amount: float,
    *,
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """Shorten every unit in place: theta * max(0, 1 - amount * weight / ||theta||).

    The minimiser of ||x - theta||^2 / 2 + amount * weight * ||x||. `amount` is lr * strength.
    Returns the norms after, (size,) per group: exactly 0 where the unit is. A unit of zeros stays.
    What the optimizer remembers of a unit may move it off zero again: see `hold_zero`.
    Raises BadInput where `amount` is below 0.
    """
    if not amount >= 0:
        raise BadInput(f"strength must be at least 0, got lr x strength = {amount}")
    norms = _sums(groups, params, torch.square, reduce).sqrt()
    tiny = torch.finfo(norms.dtype).tiny
    lost = amount * _flat(weights, groups, norms.device) / norms.clamp_min(tiny)
    factors = (1 - lost).clamp_min(0)
    scale_units(groups, params, _by_group(factors, groups))
    return _by_group(norms * factors, groups)


@torch.no_grad()
def scale_units(groups: Sequence[Group], params: Params, factors: PerUnit) -> None:
    """Multiply everything each unit owns by its factor, in place. Sharded or not."""
    for g in groups:
        for part in _parts(g, params):
            part.held.mul_(part.along(factors[g.name], part.held))


@torch.no_grad()
def add_gradient(
    chosen: Penalty,
    strength: float,
    groups: Sequence[Group],
    params: Params,
    weights: PerUnit,
    *,
    reduce: Reduce | None = None,
) -> Tensor:
    """Add strength * dR/dparams to the gradients, once per optimizer step; returns R, ().

    The same gradient as that of `chosen(groups, params, weights)`, without a graph the size of the
    model: dR/dtheta = dR/dv * theta / v for a unit of norm v. Call it after the gradients of all
    micro-batches and processes are in, and before clipping. Raises BadInput for a strength below 0.
    """
    if not strength >= 0:
        raise BadInput(f"strength must be at least 0, got {strength}")
    entry = torch.square if chosen.inner == 2 else torch.abs
    norms = chosen.norm(_sums(groups, params, entry, reduce))
    with torch.enable_grad():
        leaf = norms.detach().requires_grad_()
        value = chosen.of(_flat(weights, groups, norms.device) * leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    if chosen.inner == 2:
        slope = slope / norms
    slopes = _by_group(strength * slope, groups)
    for g in groups:
        for s, part in zip(g.slices, _parts(g, params), strict=True):
            p = params[s.param]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grad = _part(p.grad, s, g.size).held
            direction = part.held if chosen.inner == 2 else part.held.sign()
            grad.addcmul_(direction, part.along(slopes[g.name], grad))
    return value.detach()


def zero_groups(
    groups: Sequence[Group], params: Params, *, reduce: Reduce | None = None
) -> Keep:
    """False for every unit whose weights are all exactly zero: removing these changes nothing.

    Looks at entries, not at norms, since squares of tiny numbers are 0. In a group of nothing but
    zeros the first unit stays, as no layer can be of width 0.
    """
    alive = _sums(groups, params, lambda x: (x != 0).float(), reduce) > 0
    keep = {name: a.cpu() for name, a in _by_group(alive, groups).items()}
    for a in keep.values():
        if not a.any():
            a[0] = True
    return keep


def zero_share(keep: Mapping[str, Tensor]) -> float:
    """The share of units, 0 to 1, that a decision removes; of norms, the share that is 0."""
    gone = sum(int((k == 0).sum()) for k in keep.values())
    return gone / max(1, sum(k.numel() for k in keep.values()))


@torch.no_grad()
def hold_zero(optimizer: Any, groups: Sequence[Group], params: Params, keep: Keep) -> None:
    """Zero the removed units and all that the optimizer remembers of them (moments, momentum).

    A unit of zeros between activations that are 0 at 0 (SiLU, GELU, ReLU, attention) has an exactly
    zero gradient, and weight decay of zeros is nothing; but AdamW's first moment outlives it and
    moves every entry by up to about lr a step for tens of steps. `proximal_step` undoes that where
    strength * weight is at least the root of the number of entries (strength 1 with weights
    "size"); with less, the unit comes back. After this call it stays at zero by itself, so once,
    when a unit becomes zero, is enough. Where the activation is not 0 at 0 (sigmoid) what reads the
    unit does get a gradient: call it after every optimizer step.
    """
    for g in groups:
        gone = (~keep[g.name]).nonzero().flatten()
        if not len(gone):
            continue
        for s in g.slices:
            p = params[s.param]
            memory = optimizer.state.get(p, {}).values()
            alike = [m for m in memory if isinstance(m, Tensor) and m.shape == p.shape]
            for tensor in [p, *alike]:
                part = _part(tensor, s, g.size)
                here = positions(replace(s, start=-part.first), gone)
                here = here[(here >= 0) & (here < part.held.shape[s.dim])]
                part.held.index_fill_(s.dim, here.to(part.held.device), 0)


def over_shards(params: Params) -> Reduce | None:
    """The `reduce` for parameters that FSDP2 shards; None where nothing is sharded.

    Raises ValueError where parameters are not all sharded alike: sums would count some twice.
    """
    sharded = [p for p in params.values() if isinstance(p, DTensor)]
    if not sharded:
        return None
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    if len(sharded) < len(params) or any(
        p.device_mesh != mesh or p.placements != placements for p in sharded
    ):
        raise ValueError("Parameters that units own have to be sharded alike, by one fully_shard.")
    rings = [mesh.get_group(i) for i, place in enumerate(placements) if place.is_shard()]

    def reduce(sums: Tensor) -> Tensor:
        for ring in rings:
            torch.distributed.all_reduce(sums, group=ring)
        return sums

    return reduce


@dataclass(frozen=True)
class _Part:
    """What this process holds of a slice, and how many of its positions lie on others before."""

    held: Tensor  # a view, narrowed along the dim of the slice
    first: int
    slice: Slice

    def along(self, per_unit: Tensor, like: Tensor) -> Tensor:
        """Per unit (size,) -> per position held, shaped to be broadcast over `held`."""
        wide = per_unit.to(like).repeat_interleave(self.slice.block)
        shape = [1] * self.held.dim()
        shape[self.slice.dim] = -1
        return wide.narrow(0, self.first, self.held.shape[self.slice.dim]).view(shape)


def _part(p: Tensor, s: Slice, size: int) -> _Part:
    length = size * s.block
    if not isinstance(p, DTensor):
        return _Part(p.narrow(s.dim, s.start, length), 0, s)
    with torch.no_grad():
        local = p.to_local()
    _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    before = offsets[s.dim]
    begin = max(s.start, before)
    end = min(s.start + length, before + local.shape[s.dim])
    if end <= begin:
        return _Part(local.narrow(s.dim, 0, 0), 0, s)
    return _Part(local.narrow(s.dim, begin - before, end - begin), begin - s.start, s)


def _parts(g: Group, params: Params) -> Iterator[_Part]:
    return (_part(params[s.param], s, g.size) for s in g.slices)


def _sums_of(g: Group, params: Params, entry: Callable[[Tensor], Tensor]) -> Tensor:
    """Per unit of a group, the sum of `entry` over what it owns, (size,). Differentiable."""
    rows = [unit_rows(params[s.param], s, g.size).float() for s in g.slices]
    return torch.stack([entry(r).sum(1) for r in rows]).sum(0)


@torch.no_grad()
def _sums(
    groups: Sequence[Group],
    params: Params,
    entry: Callable[[Tensor], Tensor],
    reduce: Reduce | None,
) -> Tensor:
    """As `_sums_of` for all groups after one another, (units,); of shards, and copying nothing."""
    found = []
    for g in groups:
        per_slice = []
        for part in _parts(g, params):
            s, x = part.slice, entry(part.held.float())
            others = [d for d in range(x.dim()) if d != s.dim]
            each = x.sum(others) if others else x
            # A shard may begin or end within a unit.
            missing = g.size * s.block - part.first - len(each)
            if part.first or missing:
                each = torch.nn.functional.pad(each, (part.first, missing))
            per_slice.append(each.view(g.size, s.block).sum(1) if s.block > 1 else each)
        found.append(torch.stack(per_slice).sum(0))
    sums = torch.cat([f.to(found[0].device) for f in found])
    return sums if reduce is None else reduce(sums)


def _flat(per_unit: PerUnit, groups: Sequence[Group], device: torch.device) -> Tensor:
    return torch.cat([per_unit[g.name] for g in groups]).to(device)


def _by_group(flat: Tensor, groups: Sequence[Group]) -> dict[str, Tensor]:
    parts = flat.split([g.size for g in groups])
    return {g.name: part for g, part in zip(groups, parts, strict=True)}
