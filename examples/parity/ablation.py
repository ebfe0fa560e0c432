"""How much each hidden unit matters for a code, and which units stay at a sparsity.

The price of a unit is the loss added when it alone is silenced. The paper's score is its absolute
value, so that a unit whose removal *helps* is kept; ours is the price itself (the library's
`ablation`). The paper removes the lowest of all layers together, whatever that leaves of a layer;
ours leaves at least one unit in each (`plan.select`).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from network import Networks, PerUnit, activations, groups, losses, one
from task import Layout, sample
from torch import Tensor

from llm_narrow import plan, scores
from llm_narrow.families import find_groups

Way = Literal["paper", "signed", "random"]
WAYS: tuple[Way, ...] = ("paper", "signed", "random")
ENTRIES = 1 << 23  # of an activation held at a time


@torch.no_grad()
def prices(nets: Networks, asked: Layout, seeds: Tensor, *, entries: int = ENTRIES) -> PerUnit:
    """The mean loss added by silencing each unit, in nats, (networks, width) of each hidden layer.

    Over the samples of one batch, the same for all units of a network.
    """
    inputs, labels = sample(asked, seeds, stream="score", step=0)
    *inner, logits = activations(nets, inputs)
    whole = losses(logits, labels).mean(1)
    found = []
    for layer, active in enumerate(inner):
        count, wide, samples = active.shape
        price = torch.empty(count, wide, device=active.device)
        at_once = max(1, entries // active.numel())
        for units in torch.arange(wide, device=active.device).split(at_once):
            silenced = active[:, :, None].repeat(1, 1, len(units), 1)  # (N, width, units, B)
            silenced[:, units, torch.arange(len(units), device=active.device)] = 0
            onward = activations(nets, silenced.flatten(2), after=layer + 1)[-1]
            each = losses(onward, labels.repeat(1, len(units)))
            price[:, units] = each.view(count, len(units), samples).mean(2) - whole[:, None]
        found.append(price)
    return found


def decisions(
    nets: Networks, price: PerUnit, sparsities: Sequence[float], way: Way, seeds: Sequence[int]
) -> list[PerUnit]:
    """Which units stay at each sparsity, (networks, width) bool of each hidden layer."""
    if way == "paper":
        return [lowest_removed([p.abs() for p in price], sparsity) for sparsity in sparsities]
    found = [[torch.ones(p.shape, dtype=torch.bool) for p in price] for _ in sparsities]
    for n, seed in enumerate(seeds):
        net = one(nets, n)
        rows = find_groups(net)
        scored = {name: p[n].cpu() for name, p in zip(groups(nets), price, strict=True)}
        if way == "random":
            scored = scores.score(net, rows, [], criterion="random", seed=seed)
        for keep, sparsity in zip(found, sparsities, strict=True):
            chosen = plan.select(
                scored, rows, sparsity={"neurons": sparsity}, allocation="global"
            )
            for stays, name in zip(keep, groups(nets), strict=True):
                if name in chosen:
                    stays[n] = chosen[name]
    return found


def lowest_removed(scored: PerUnit, sparsity: float) -> PerUnit:
    """All but the int(units * sparsity) units of the lowest scores, of all layers together."""
    flat = torch.cat(scored, dim=1).cpu()
    order = flat.argsort(dim=1, stable=True)[:, : int(flat.shape[1] * sparsity)]
    stays = torch.ones(flat.shape, dtype=torch.bool).scatter_(1, order, False)
    return list(stays.split([s.shape[1] for s in scored], dim=1))
