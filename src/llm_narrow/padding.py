"""Uneven widths in a stock layout: every layer filled with units of zeros up to the widest.

A unit of zeros says nothing, so the model computes what it did, in any runtime that knows its
architecture; it has the parameters of its widest layer everywhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .families import find_groups
from .stock import uniform_config
from .units import Group, Keep, positions


def padded_config(original: Any, groups: Sequence[Group], whole: Keep, keep: Keep) -> Any | None:
    """The stock config that holds every layer at the width of the widest; None if there is none.

    Units of a kind that no stock config can have fewer of are filled up to all that there were.
    """
    widest = {
        kind: max(int(keep[g.name].sum()) for g in groups if g.kind == kind)
        for kind in dict.fromkeys(g.kind for g in groups)
    }
    filled = {}
    for g in groups:
        size = len(whole[g.name])
        width = size if g.config is None else widest[g.kind]
        filled[g.name] = torch.arange(size) < width
    return uniform_config(original, groups, whole, filled)


@torch.no_grad()
def padded_state(model: Any, twin: Any) -> dict[str, Tensor]:
    """The weights of a model in the shapes of a wider twin of it: kept units first, then zeros."""
    own, wide = find_groups(model), {g.name: g for g in find_groups(twin)}
    places: dict[str, dict[int, list[Tensor]]] = {}  # parameter -> axis -> where zeros are
    for g in own:
        gone = torch.arange(g.size, wide[g.name].size)
        for s in wide[g.name].slices:
            places.setdefault(s.param, {}).setdefault(s.dim, []).append(positions(s, gone))
    shapes = {name: tuple(t.shape) for name, t in twin.state_dict().items()}
    found = {}
    for name, held in model.state_dict().items():
        if tuple(held.shape) == shapes[name]:
            found[name] = held.detach().cpu()
            continue
        new = held.detach().cpu()
        for dim, parts in places[name].items():
            stay = torch.ones(shapes[name][dim], dtype=torch.bool)
            stay[torch.cat(parts)] = False
            spread = new.new_zeros([*new.shape[:dim], len(stay), *new.shape[dim + 1 :]])
            new = spread.index_copy(dim, stay.nonzero().flatten(), new)
        found[name] = new
    return found
