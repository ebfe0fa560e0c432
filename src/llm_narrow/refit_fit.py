"""One reading matrix: the sums over text that its refit needs, and the solution."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .processes import summed
from .units import Group, Slice


@dataclass
class Fit:
    """One reading matrix on its way from statistics to a refitted weight."""

    group: Group
    slice: Slice
    kept: Tensor  # input positions that stay, (n,) int64
    given: Tensor  # output positions that stay, (out,) int64
    square: Tensor  # A A', (n, n) float32
    cross: Tensor  # A T', (n, out) float32
    energy: Tensor  # |T|^2 of each output, (out,) float64
    against: Tensor | None = None  # F F' of the text to forget, (n, n) float32; None without

    @classmethod
    def of(
        cls, model: Any, group: Group, s: Slice, gone: Mapping[tuple[str, int], Tensor]
    ) -> "Fit":
        """Empty statistics for a reader of the model before anything in `gone` is removed."""
        weight = model.get_parameter(s.param)

        def staying(dim: int) -> Tensor:
            stay = torch.ones(weight.shape[dim], dtype=torch.bool)
            if (s.param, dim) in gone:
                stay[gone[s.param, dim]] = False
            return stay.nonzero().flatten().to(weight.device)

        kept, given = staying(s.dim), staying(1 - s.dim)
        zeros = torch.zeros(len(kept), len(kept) + len(given), device=weight.device)
        square, cross = zeros.split([len(kept), len(given)], dim=1)
        energy = torch.zeros(len(given), dtype=torch.float64, device=weight.device)
        return cls(group, s, kept, given, square.contiguous(), cross.contiguous(), energy)

    def without(self, gone: Mapping[tuple[str, int], Tensor]) -> "Fit":
        """The same statistics for fewer inputs and outputs."""

        def places(held: Tensor, dim: int) -> Tensor:
            lost = gone.get((self.slice.param, dim), torch.empty(0, dtype=torch.int64))
            return (~torch.isin(held, lost.to(held.device))).nonzero().flatten()

        n, out = places(self.kept, self.slice.dim), places(self.given, 1 - self.slice.dim)
        return replace(
            self,
            kept=self.kept[n],
            given=self.given[out],
            square=self.square[n][:, n],
            cross=self.cross[n][:, out],
            energy=self.energy[out],
        )

    def add(self, activations: Tensor, wanted: Tensor, kept_only: bool = False) -> None:
        """Add the tokens of one batch: what the reader is fed, and what it is to give."""
        a = activations.reshape(-1, activations.shape[-1])
        a = (a if kept_only else a.index_select(1, self.kept)).float()
        t = wanted.reshape(-1, wanted.shape[-1]).index_select(1, self.given).float()
        self.square.addmm_(a.T, a)
        self.cross.addmm_(a.T, t)
        self.energy += t.square().sum(0, dtype=torch.float64)

    def open_against(self) -> None:
        """Begin to sum up text to forget: in every process, also where it has no share of it."""
        self.against = torch.zeros_like(self.square)

    def add_against(self, activations: Tensor) -> None:
        """Add what the reader is fed by one batch of text to forget, kept inputs only."""
        f = activations.reshape(-1, activations.shape[-1]).float()
        assert self.against is not None
        self.against.addmm_(f.T, f)

    def add_up(self) -> None:
        """Make the statistics those of the batches of all processes."""
        summed(self.square)
        if self.against is not None:
            summed(self.against)
        summed(self.cross)
        summed(self.energy)

    def weight(self, model: Any) -> Tensor:
        """The reading matrix as it stands in the model, (n, out); a view."""
        data: Tensor = model.get_parameter(self.slice.param).data
        return data if self.slice.dim == 0 else data.T

    def write(self, model: Any, damping: float, against: float = 0.0) -> float:
        """Put the solution into the cut model; the share |T - W'A|^2 / |T|^2 that is left.

        `against` is how much a token of the text to forget counts beside one of the text to keep.
        """
        weight = self.weight(model)
        ridge = damping * self.square.diagonal().mean().clamp_min(1e-12)
        system = self.square + ridge * torch.eye(len(self.square), device=weight.device)
        if self.against is not None:
            system += against * self.against
        fitted = torch.linalg.solve(system, self.cross + ridge * weight.float())
        weight.copy_(fitted)
        whole = float(self.energy.sum())
        left = whole - 2 * float((fitted * self.cross).sum())
        left += float((fitted * (self.square @ fitted)).sum())
        return max(left, 0.0) / max(whole, 1e-12)
