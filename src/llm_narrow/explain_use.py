"""How much each unit is used at each place of a text, and the places that use a unit most.

The use of a neuron is |its activation| x the norm of what it is multiplied with in the matrix that
reads it; that of a head is the norm of what the head adds: its part of what the output projection
is fed, times its part of that matrix. Both are the length of what the unit writes for a token. The
u-th neuron of a layer of experts is that of each of them, and its use the sum over the experts that
the token was given to.

Only sums by unit, and for the units asked for their strongest uses, are ever held.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks
from .experts import fused
from .progress import Track, silent
from .scores import watched
from .units import Group, Slice

STRONGEST = 100  # uses of a unit that are held
LONGEST = 2048  # tokens of a block up to which attention weights, (heads, tokens, tokens), are seen

UseOf = Callable[[Tensor], Tensor]  # what a reader is fed -> (positions, units)


@dataclass(frozen=True)
class Top:
    """The strongest uses of a unit, the strongest first, of equal ones the first in the text.

    places:    int64, among all positions of the blocks.
    uses:      float32, above 0.
    attended:  int64, the position in its block that a head looked at most, -1 where not known.
    attention: float32, the share of its attention that this had.
    """

    places: Tensor
    uses: Tensor
    attended: Tensor
    attention: Tensor

    def joined(self, other: "Top") -> "Top":
        """The strongest of both; the places of `other` come later."""
        order = torch.cat([self.uses, other.uses]).argsort(descending=True, stable=True)
        best = order[:STRONGEST]
        return Top(
            *(
                torch.cat([getattr(self, name), getattr(other, name)])[best]
                for name in ("places", "uses", "attended", "attention")
            )
        )


@dataclass(frozen=True)
class Uses:
    """What was found. `totals`: by group, the summed use of each unit, (size,) float64."""

    positions: int
    totals: dict[str, Tensor]
    tops: tuple[Top, ...]  # of the units asked for, in their order


def measured(
    model: Any,
    groups: Sequence[Group],
    units: Sequence[tuple[Group, int]],
    blocks: Blocks,
    counted: Tensor,
    *,
    batch_size: int = 2,
    track: Track = silent,
) -> Uses:
    """Run the model over the blocks and see how much each unit of the groups is used.

    `units` are those whose strongest uses are wanted, of these groups; `counted`, (n, length) bool,
    says which positions count.
    """
    device = next(model.parameters()).device
    totals = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
    tops = [Top(torch.empty(0, dtype=torch.int64), torch.empty(0),
                torch.empty(0, dtype=torch.int64), torch.empty(0)) for _ in units]  # fmt: skip
    here: dict[int, Tensor] = {}  # unit asked for -> its uses in this batch, (positions,)
    looked: dict[int, tuple[Tensor, Tensor]] = {}
    counts = torch.empty(0)

    def see(g: Group, s: Slice, x: Tensor) -> None:
        found = uses[g.name](x)
        totals[g.name] += (found * counts[:, None]).sum(0).cpu().double()
        for n, (group, unit) in enumerate(units):
            if group.name == g.name:
                here[n] = found[:, unit].float().cpu()

    with torch.inference_mode(), ExitStack() as undo:
        uses = {g.name: undo.enter_context(_use_of(model, g)) for g in groups}
        heads = [(n, g, unit) for n, (g, unit) in enumerate(units) if g.kind == "heads"]
        if heads and blocks.tokens.shape[1] <= LONGEST:
            undo.enter_context(_attention(model, heads, looked))
        undo.enter_context(watched(model, groups, see))
        first = 0
        for batch in track(blocks.batches(batch_size), "reading what uses them"):
            own = counted[first : first + len(batch)].flatten()
            counts = own.to(device).float()
            model.base_model(input_ids=batch.to(device), use_cache=False)
            begin = first * batch.shape[1]
            for n, found in here.items():
                fits = (own & (found > 0)).nonzero().flatten()
                place, share = looked.get(n, (torch.full_like(own, -1, dtype=torch.int64),
                                              torch.zeros(len(own))))  # fmt: skip
                new = Top(fits + begin, found[fits], place[fits], share[fits])
                tops[n] = tops[n].joined(new)
            here.clear()
            looked.clear()
            first += len(batch)
    return Uses(int(counted.sum()), totals, tuple(tops))


def rows_of(model: Any, group: Group) -> Tensor:
    """What the activations of each unit are multiplied with, (size, block, …, hidden) float32.

    In between stand the experts, where the group has some.
    """
    (s,) = group.reads
    weight: Tensor = model.get_parameter(s.param).detach()
    own: Tensor = weight.narrow(s.dim, s.start, group.size * s.block).movedim(s.dim, 0)
    return own.reshape(group.size, s.block, *own.shape[1:]).float()


def added(x: Tensor, rows: Tensor, group: Group, unit: int) -> Tensor:
    """What one unit adds to what its reader gives, (positions, hidden).

    `x` is what the reader is fed, (…, inputs), and `rows` are those of `rows_of`.
    """
    (s,) = group.reads
    at = s.start + unit * s.block
    own = x.flatten(0, -2)[:, at : at + s.block].float()
    return own @ rows[unit]


@contextmanager
def _use_of(model: Any, group: Group) -> Iterator[UseOf]:
    """Within the block: from what the group's reader is fed to the use of each of its units."""
    (s,) = group.reads
    if s.block > 1:

        def by_block(x: Tensor) -> Tensor:
            rows = rows_of(model, group)  # made here, since in bfloat16 they are a copy
            found = (added(x, rows, group, unit).norm(dim=-1) for unit in range(group.size))
            return torch.stack(list(found), dim=1)

        yield by_block
        return
    norms = rows_of(model, group)[:, 0].norm(dim=-1)  # (size, …)
    if not fused(model, s.param):
        yield lambda x: x.flatten(0, -2)[:, s.start : s.start + group.size].float().abs() * norms
        return
    chosen: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        chosen[:] = [args[1]]  # (positions, chosen): which experts

    handle = model.get_submodule(s.module).register_forward_pre_hook(keep)
    try:
        yield lambda x: (x.unflatten(0, chosen[0].shape).float().abs() * norms.T[chosen[0]]).sum(1)
    finally:
        handle.remove()


@contextmanager
def _attention(
    model: Any, heads: Sequence[tuple[int, Group, int]], looked: dict[int, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Within the block, `looked` tells for every position what each of the heads looks at most.

    The first token of a block is left out: models rest attention there that they have no use for.
    Query heads that go together are averaged. Where a model does not tell its weights, nothing is
    told.
    """

    def hook(group: Group) -> Callable[[Any, Any, Any], None]:
        def see(_: Any, __: Any, output: Any) -> None:
            weights = _weights(output, group)
            if weights is None:
                return
            together = weights.unflatten(1, (group.size, -1))
            for n, unit in ((n, unit) for n, g, unit in heads if g.name == group.name):
                own = together[:, unit].float().mean(1)  # (batch, queries, keys)
                own[..., 0] = -1
                share, place = own.max(-1)
                looked[n] = (place.flatten().cpu(), share.flatten().cpu())

        return see

    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation("eager")  # the only one that tells its weights
        for group in {g.name: g for _, g, _ in heads}.values():
            handle = model.get_submodule(group.name).register_forward_hook(hook(group))
            undo.callback(handle.remove)
        yield


def _weights(output: Any, group: Group) -> Tensor | None:
    """The attention weights, (batch, heads, queries, keys), in what a module gave."""
    for part in output[1:] if isinstance(output, tuple) else ():
        if isinstance(part, Tensor) and part.dim() == 4 and part.shape[-1] == part.shape[-2]:
            return part if part.shape[1] % group.size == 0 else None
    return None
