"""Inside fused experts: what the readers of neurons and of whole experts are fed.

transformers computes the experts of a layer in one call of one module, given hidden states
(tokens, hidden), and for each token the experts chosen and their weights, (tokens, chosen) both.
What `down_proj` reads never crosses the border of a module. Here the same is computed expert by
expert, in the open: scores watch it there, and the refit takes its statistics there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .units import Group, Slice

See = Callable[[Group, Slice, Tensor], Tensor | None]  # what a reader is fed -> what instead


def fused(model: Any, param: str) -> bool:
    """Whether a parameter holds the matrices of all experts of a layer."""
    return bool(model.get_parameter(param).dim() == 3)


def fed(args: tuple[Any, ...]) -> Any:
    """What a linear layer is fed, or all three that experts are called with."""
    return args[0] if len(args) == 1 else args


def by_expert(chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that a token chose, and where in the flattened `chosen`, (tokens, chosen)."""
    flat = chosen.reshape(-1)
    for expert in flat.unique().tolist():
        yield expert, (flat == expert).nonzero().flatten()


def activations(
    act: Callable[[Tensor], Tensor], up: Tensor, hidden: Tensor, weights: Tensor
) -> Tensor:
    """What one expert's `down_proj` reads, (n, neurons), times the weights (n,) of its tokens.

    `up` is the expert's slab, (gate|up, hidden). The weight may as well stand before `down_proj` as
    behind it, where transformers has it: that is linear.
    """
    gate, rest = F.linear(hidden, up.to(hidden.dtype)).chunk(2, dim=-1)
    return act(gate) * rest * weights[:, None].to(rest.dtype)


@contextlib.contextmanager
def opened(model: Any, readers: Sequence[tuple[Group, Slice]], see: See) -> Iterator[None]:
    """Within the block, `see` is shown what `readers` (slices of 3-D parameters) are fed.

    Neurons are fed their activations, (tokens * chosen, neurons), experts the weights that tokens
    give them, (tokens, experts), 0 where they were not chosen.
    """
    modules: dict[str, list[tuple[Group, Slice]]] = {}
    for g, s in readers:
        modules.setdefault(s.module, []).append((g, s))
    with contextlib.ExitStack() as undo:
        for name, here in modules.items():
            experts: Any = model.get_submodule(name)

            def forward(
                hidden: Tensor,
                chosen: Tensor,
                weights: Tensor,
                experts: Any = experts,
                here: Sequence[tuple[Group, Slice]] = here,
            ) -> Tensor:
                return _computed(experts, here, see, hidden, chosen, weights)

            experts.forward = forward
            undo.callback(delattr, experts, "forward")
        yield


def _computed(
    experts: Any,
    readers: Sequence[tuple[Group, Slice]],
    see: See,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    """What the module gives, (tokens, hidden), with `see` asked on the way."""
    tokens, number = chosen.shape
    for g, s in readers:
        if s.dim == 0:
            dense = weights.new_zeros(tokens, experts.num_experts).scatter(1, chosen, weights)
            instead = see(g, s, dense)
            weights = (dense if instead is None else instead).gather(1, chosen)
    parts = list(by_expert(chosen))
    order = torch.cat([at for _, at in parts]).argsort()
    flat = weights.reshape(-1)
    read = torch.cat(
        [
            activations(experts.act_fn, experts.gate_up_proj[e], hidden[at // number], flat[at])
            for e, at in parts
        ]
    )[order]
    for g, s in readers:
        if s.dim == 2:
            instead = see(g, s, read)
            read = read if instead is None else instead
    down = experts.down_proj
    given = torch.cat([F.linear(read[at].to(down.dtype), down[e]) for e, at in parts])[order]
    return given.view(tokens, number, -1).sum(1).to(hidden.dtype)
