"""Scores by Optimal Brain Surgeon: what a unit costs once what stays was refitted to do its work.

A unit that others can stand in for is cheap, however active it is: the refit lets them. For a
matrix W that reads activations a (`square` is the sum of a a' over tokens), removing the units u
and refitting the rest adds, to second order, the loss

    1/2 / tokens * tr(F W_u ((A^-1)_uu)^-1 W_u'),      A = square + damping,  F = sum of g g'

with g the gradient of the loss by what W gives: the metric in which errors of its output count.
Units are taken away a few at a time, the cheapest first, and A^-1 and W become those of the units
that are left (Hassibi and Stork 1993; the two factors are those of Martens and Grosse 2015, arXiv
1503.05671).
A unit's score is what it adds at its turn, in nats over all the tokens, or a trace more than the
unit before it, where that was dearer.

The sums are (width, width) for each reader, in float32: unlike those of other criteria they grow
with the square of the width. They add up over text and processes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import BadInput
from .experts import fused
from .processes import share, summed
from .units import Group, Scores, Slice

if TYPE_CHECKING:
    from .scores import Data

DAMPING = 0.01  # of the mean of the diagonal of A, as in the refit
TURNS = 96  # in which a group's units are taken away, at most
RISE = 1e-6  # share by which a unit is dearer than the one before it at least, so that order shows
Sums = dict[str, Tensor]  # what a criterion adds up over text


def gathered(d: "Data") -> Sums:
    """`square` and `metric` of every reader by name, and the number of tokens."""
    check(d.model, d.groups)
    device = next(d.model.parameters()).device
    sums: Sums = {"tokens": torch.zeros((), dtype=torch.float64, device=device)}
    for g in d.groups:
        for s in g.reads:
            width, out = _matrix(d.model, g, s).shape
            sums[_square(g, s)] = torch.zeros(width, width, device=device)
            sums[_metric(s)] = torch.zeros(out, out, device=device)

    def fed(g: Group, s: Slice, x: Tensor) -> None:
        a = x.detach().reshape(-1, x.shape[-1]).narrow(1, s.start, g.size * s.block).float()
        sums[_square(g, s)].addmm_(a.T, a)

    def asked(s: Slice, gradient: Tensor) -> None:
        f = gradient.reshape(-1, gradient.shape[-1]).float()
        sums[_metric(s)].addmm_(f.T, f)

    with _between(d.model, d.groups, fed, asked):
        for batch in d.track(share(d.batches), "scoring"):
            sums["tokens"] += batch.numel()
            d.loss(d.model, batch.to(device)).backward()
    return {name: summed(total) for name, total in sums.items()}


def solved(d: "Data", sums: Mapping[str, Tensor]) -> Scores:
    """The scores that the sums come to, (size,) float32 each; not finite where the sums are not."""
    tokens = max(float(sums["tokens"]), 1.0)
    scores = {}
    for g in d.track(d.groups, "taking units away"):
        parts = [(_matrix(d.model, g, s), sums[_square(g, s)], sums[_metric(s)]) for s in g.reads]
        if not all(bool(matrix.isfinite().all()) for part in parts for matrix in part):
            scores[g.name] = torch.full((g.size,), math.nan)
            continue
        readers = [_Reader.of(*part, s.block) for part, s in zip(parts, g.reads, strict=True)]
        scores[g.name] = (_eliminated(g.size, readers) / (2 * tokens)).float().cpu()
    return scores


def bytes_of_sums(model: Any, groups: Sequence[Group]) -> int:
    """What `gathered` holds."""
    widths = {(s.param, g.name): g.size * s.block for g in groups for s in g.reads}
    outs: dict[str, int] = {
        s.param: model.get_parameter(s.param).shape[1 - s.dim] for g in groups for s in g.reads
    }
    return 4 * (sum(w * w for w in widths.values()) + sum(o * o for o in outs.values()))


def check(model: Any, groups: Sequence[Group]) -> None:
    """Raise BadInput where a group is read by what is not a plain matrix."""
    inside = sorted({g.name for g in groups if any(fused(model, s.param) for s in g.reads)})
    if inside:
        raise BadInput(
            "The criterion surgeon needs units that plain matrices read, and "
            f"{inside[0]} is inside fused experts. Choose attribution."
        )


class _Reader:
    """One matrix in the course of the elimination: of the units that are left."""

    def __init__(self, inverse: Tensor, weight: Tensor, block: int) -> None:
        """`inverse` is A^-1, (n * block)²; `weight` is (n * block, out), in the metric."""
        self.inverse, self.weight, self.block = inverse, weight, block

    @classmethod
    def of(cls, weight: Tensor, square: Tensor, metric: Tensor, block: int) -> "_Reader":
        def factor(matrix: Tensor, share: float) -> Tensor:
            matrix = _exact(matrix)
            ridge = share * matrix.diagonal().mean().clamp_min(1e-20)
            lower: Tensor = torch.linalg.cholesky(
                matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            )
            return lower

        inverse = torch.cholesky_inverse(factor(square, DAMPING))
        return cls(inverse, _exact(weight) @ factor(metric, 1e-4), block)

    def costs(self) -> Tensor:
        """What each unit adds if it goes next, (n,)."""
        if self.block == 1:
            return self.weight.square().sum(1) / self.inverse.diagonal()
        n = len(self.weight) // self.block
        at = torch.arange(n, device=self.weight.device)
        own = self.inverse.view(n, self.block, n, self.block)[at, :, at]  # (n, block, block)
        w = self.weight.view(n, self.block, -1)
        total: Tensor = (w * torch.linalg.solve(own, w)).sum((1, 2))
        return total

    def without(self, units: Tensor, rest: Tensor) -> None:
        """Take units away, numbers among those that are left."""

        def places(of: Tensor) -> Tensor:
            inner = torch.arange(self.block, device=of.device)
            return (of[:, None] * self.block + inner).flatten()

        u, r = places(units), places(rest)
        across = self.inverse[r][:, u]
        own = self.inverse[u][:, u]
        self.weight = self.weight[r] - across @ torch.linalg.solve(own, self.weight[u])
        self.inverse = self.inverse[r][:, r] - across @ torch.linalg.solve(own, across.T)


def _exact(matrix: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none: an inverse carried on loses digits."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def _eliminated(size: int, readers: Sequence[_Reader]) -> Tensor:
    """What each unit costs at its turn, (size,) float64, rising in the order of the turns."""
    device = readers[0].weight.device
    left = torch.arange(size, device=device)
    scores = torch.zeros(size, dtype=torch.float64, device=device)
    at_once = max(1, -(-size // TURNS))
    dearest = 0.0
    while len(left):
        costs = torch.stack([r.costs() for r in readers]).sum(0).double().clamp_min(0)
        order = costs.argsort(stable=True)
        for unit in order[:at_once].tolist():
            dearest = max(float(costs[unit]), dearest * (1 + RISE))
            scores[left[unit]] = dearest
        rest = order[at_once:].sort().values
        for reader in readers:
            reader.without(order[:at_once], rest)
        left = left[rest]
    return scores


@contextlib.contextmanager
def _between(
    model: Any, groups: Sequence[Group], fed: Callable[[Group, Slice, Tensor], None],
    asked: Callable[[Slice, Tensor], None],
) -> Iterator[None]:  # fmt: skip
    """Within, `fed` sees what each reader is fed, `asked` the gradient by what it gives."""
    from .scores import watched

    def begin(g: Group, s: Slice, x: Tensor) -> Tensor | None:
        fed(g, s, x)
        # Weights being frozen, the first reader's input is where gradients have to begin.
        return None if x.requires_grad else x.detach().requires_grad_()

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(watched(model, groups, begin))
        for s in {s.param: s for g in groups for s in g.reads}.values():

            def given(_: Any, args: Any, out: Tensor, s: Slice = s) -> None:
                out.register_hook(lambda gradient: asked(s, gradient))

            handle = model.get_submodule(s.module).register_forward_hook(given)
            hooks.callback(handle.remove)
        yield


def _matrix(model: Any, g: Group, s: Slice) -> Tensor:
    """The rows of a reading matrix that are the group's, (width, out)."""
    weight: Tensor = model.get_parameter(s.param).detach().movedim(s.dim, 0)
    return weight.narrow(0, s.start, g.size * s.block)


def _square(g: Group, s: Slice) -> str:
    return f"{g.name} {s.param} {s.start}"


def _metric(s: Slice) -> str:
    return f"metric {s.param}"
