"""The refit of fused experts: for each of them a ridge solution on the tokens that it is given.

An expert e that is left is to give what the whole one gives for the same token, and its share of
what the layer as a whole then still lacks: of experts that were removed and of earlier layers.

    T_e = w_e W_e a_e + w_e^2 / (sum of w^2) * (T - sum of w W a),    A_e = w_e a_e (kept neurons)

where w are the weights that the router gives, a the activations of the whole experts, T the outputs
wanted of the layer, and sums go over the experts chosen for the token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .experts import activations, by_expert
from .processes import summed
from .units import Group, Slice


@dataclass
class ExpertFit:
    """The reading tensor of a layer's experts on its way from statistics to refitted weights.

    `up` and `down` are those of the whole experts; E of them were left, with n neurons each.
    """

    group: Group
    slice: Slice
    act: Any
    up: Tensor  # (experts, gate|up, hidden)
    down: Tensor  # (experts, hidden, neurons)
    experts: Tensor  # those that stay, (E,) int64
    kept: Tensor  # neurons that stay, (n,) int64
    square: Tensor  # A A' of each expert, (E, n, n) float32
    cross: Tensor  # A T', (E, n, hidden) float32
    energy: Tensor  # |T|^2 of each expert, (E,) float64

    @classmethod
    def of(
        cls, model: Any, group: Group, s: Slice, gone: Mapping[tuple[str, int], Tensor]
    ) -> "ExpertFit":
        """Empty statistics for the experts of a layer before anything in `gone` is removed."""
        module: Any = model.get_submodule(s.module)
        down = model.get_parameter(s.param).detach()

        def staying(dim: int) -> Tensor:
            stay = torch.ones(down.shape[dim], dtype=torch.bool)
            stay[gone.get((s.param, dim), torch.empty(0, dtype=torch.int64))] = False
            return stay.nonzero().flatten().to(down.device)

        experts, kept = staying(0), staying(2)
        n, hidden = len(kept), down.shape[1]
        zeros = torch.zeros(len(experts), n, n + hidden, device=down.device)
        square, cross = zeros.split([n, hidden], dim=2)
        energy = torch.zeros(len(experts), dtype=torch.float64, device=down.device)
        return cls(
            group, s, module.act_fn, module.gate_up_proj.detach(), down, experts, kept,
            square.contiguous(), cross.contiguous(), energy,
        )  # fmt: skip

    def without(self, gone: Mapping[tuple[str, int], Tensor]) -> "ExpertFit":
        """The same statistics for fewer neurons and experts."""

        def places(held: Tensor, dim: int) -> Tensor:
            lost = gone.get((self.slice.param, dim), torch.empty(0, dtype=torch.int64))
            return (~torch.isin(held, lost.to(held.device))).nonzero().flatten()

        e, n = places(self.experts, 0), places(self.kept, 2)
        return replace(
            self,
            experts=self.experts[e],
            kept=self.kept[n],
            square=self.square[e][:, n][:, :, n],
            cross=self.cross[e][:, n],
            energy=self.energy[e],
        )

    def add(self, fed: tuple[Tensor, ...], wanted: Tensor, kept_only: bool = False) -> None:
        """Add the tokens of one batch: what the module is called with, and what it is to give.

        Experts are those of `experts`, by their place there. `kept_only` is for a call of the cut
        module and changes nothing, as the activations are always those of the whole experts.
        """
        hidden, chosen, weights = fed
        hidden, flat = hidden.reshape(-1, hidden.shape[-1]), weights.reshape(-1)
        rest = wanted.reshape(-1, wanted.shape[-1]).float()
        share = (weights.square() / weights.square().sum(1, keepdim=True).clamp_min(1e-30)).float()
        own: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for place, at in by_expert(chosen):
            expert, token = int(self.experts[place]), at // chosen.shape[1]
            a = activations(self.act, self.up[expert], hidden[token], flat[at])
            given = (a @ self.down[expert].to(a.dtype).T).float()
            rest = rest.index_add(0, token, -given)
            own.append((place, at, a.index_select(1, self.kept).float(), given))
        for place, at, a, given in own:
            t = given + share.reshape(-1)[at, None] * rest[at // chosen.shape[1]]
            self.square[place].addmm_(a.T, a)
            self.cross[place].addmm_(a.T, t)
            self.energy[place] += t.square().sum(dtype=torch.float64)

    def add_up(self) -> None:
        """Make the statistics those of the batches of all processes."""
        summed(self.square)
        summed(self.cross)
        summed(self.energy)

    def open_against(self) -> None:
        """Refuse: what experts are fed by other text is not summed up."""
        raise BadInput(
            "prune.forget_refit cannot be done to experts: which of them reads a token is the "
            "router's choice. Leave experts and the neurons in them out of prune.kinds, or give 0."
        )

    def write(self, model: Any, damping: float, against: float = 0.0) -> float:
        """Put the solutions into the cut model; the share |T - W'A|^2 / |T|^2 that is left."""
        data: Tensor = model.get_parameter(self.slice.param).data
        whole, left = float(self.energy.sum()), 0.0
        matrices = zip(self.square, self.cross, data.transpose(1, 2), strict=True)
        for square, cross, weight in matrices:
            ridge = damping * square.diagonal().mean().clamp_min(1e-12)
            system = square + ridge * torch.eye(len(square), device=weight.device)
            fitted = torch.linalg.solve(system, cross + ridge * weight.float())
            weight.copy_(fitted)
            left += float((fitted * (square @ fitted - 2 * cross)).sum())
        return max(whole + left, 0.0) / max(whole, 1e-12)
