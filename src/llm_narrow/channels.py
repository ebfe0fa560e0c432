"""Channels of the residual stream: fewer of them in every layer at once.

A channel is a place of the hidden states. Everything reads it or writes to it, so there is one
group of channels for the whole model, whose slices are found by making the model's config wider.

Removing channels is exact where norms are root-mean-square: with N channels of which n stay, the
model left computes what the whole one does whose writers put zeros into the others. The mean of the
squares is then over fewer places, so with s^2 = N / n either every norm's weight is multiplied by s
and its epsilon by s^2; or, where other norms share the epsilon, the weights are multiplied by s and
everything that writes to the stream is divided by s. A LayerNorm subtracts the mean over all
channels, which no weight makes up for: it is refused.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .errors import BadInput
from .families_slices import head_size
from .stock import uniform_config
from .units import Group, Slice, mask, remove
from .verify import TOLERANCE

NAME = "channels"
EPSILONS = ("variance_epsilon", "eps")  # what norm modules call theirs
WIDTHS = ("hidden_size", "hidden_dim")  # what modules that reshape call the number of channels
STOCK: Any = AutoModelForCausalLM
MULTIPLE = 8
PROBES = 24  # tokens that exactness is looked at on


def group_of(model: Any) -> Group:
    """The channels of the model as one group. Raises BadInput where none can go exactly."""
    for module in model.modules():
        name = type(module).__name__
        if "LayerNorm" in name and "RMS" not in name:
            raise BadInput(
                f"No channels of a {model.config.model_type} can go: its LayerNorm takes the mean "
                "over all of them. Leave prune.channels out."
            )
    axes = _axes(model)
    reads = [Slice(n, d) for n, d in axes.items() if _reads(model, n, d)]
    read = {s.param for s in reads}
    writes = [Slice(n, d) for n, d in axes.items() if n not in read]
    size = int(model.config.hidden_size)
    return Group(NAME, "neurons", size, writes=tuple(writes), reads=tuple(reads), added=False)


def chosen(scores: Tensor, stay: int) -> Tensor:
    """The best-scored channels, (channels,) bool."""
    best = scores.argsort(descending=True, stable=True)[:stay]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)


def check(config: Any, stay: int) -> None:
    """Raise BadInput unless there are stock models of so many channels."""
    whole = int(config.hidden_size)
    found = [
        f"a multiple of {MULTIPLE}, which fast products need" * bool(stay % MULTIPLE),
        f"from 1 to {whole - 1}, as the model has {whole}" * (not 0 < stay < whole),
    ]
    smaller = _narrower(config, stay)
    if not any(found) and uniform_config(smaller, [], {}, {}) is None:
        found = [f"a multiple of {config.num_attention_heads}, the heads of this model"]
    if any(found):
        rules = " and ".join(rule for rule in found if rule)
        raise BadInput(f"prune.channels must be {rules}, got {stay}.")


@torch.no_grad()
def thin(model: Any, keep: Tensor) -> None:
    """Take the channels that `keep`, (channels,) bool, drops out of the model, config included.

    Raises BadInput where what is left is not the model with zeros in their place.
    """
    group = group_of(model)
    kept, whole = int(keep.sum()), group.size
    check(model.config, kept)
    device = next(model.parameters()).device
    tokens = torch.arange(PROBES, device=device)[None] * 7919 % int(model.config.vocab_size)
    masked = copy.deepcopy(model)
    mask(masked, [group], {NAME: keep})
    wanted = masked(tokens).logits.float()
    del masked
    grow = math.sqrt(whole / kept)
    norms = _norms(model, group)
    shared = _epsilon_shared(model, norms)
    remove(model, [group], {NAME: keep})
    if shared:
        _shrink_stream(model, group, norms, grow)
    else:
        _grow_epsilons(model, norms, grow)
    for norm in norms:
        norm.weight.mul_(grow)
    for module in model.modules():
        for name in WIDTHS:
            if getattr(module, name, None) == whole:
                setattr(module, name, kept)
    vars(model.config).update(vars(_narrower(model.config, kept)))
    off = float((model(tokens).logits.float() - wanted).abs().max() / wanted.abs().max())
    if not off <= TOLERANCE[model.dtype]:
        raise BadInput(
            f"No channels of a {model.config.model_type} can go: what it does with the hidden size "
            f"changes with it (logits by {off:.1e} of the largest). Leave prune.channels out."
        )


def _narrower(config: Any, stay: int) -> Any:
    found = copy.deepcopy(config)
    found.head_dim = head_size(config)
    found.hidden_size = stay
    return found


def _axes(model: Any) -> dict[str, int]:
    """The parameters with an axis over the channels, and which."""
    step = int(model.config.num_attention_heads)
    before, after = (_shapes(model.config, more) for more in (0, 8 * step))
    axes = {}
    for name, shape in before.items():
        grown = [d for d, n in enumerate(shape) if after[name][d] != n]
        if len(grown) > 1 or (grown and after[name][grown[0]] - shape[grown[0]] != 8 * step):
            raise BadInput(
                f"No channels of a {model.config.model_type} can go: {name} changes with the "
                "hidden size in a way of its own. Leave prune.channels out."
            )
        if grown:
            axes[name] = grown[0]
    return axes


def _shapes(config: Any, more: int) -> dict[str, tuple[int, ...]]:
    wider = copy.deepcopy(config)
    wider.head_dim = head_size(config)
    wider.hidden_size += more
    with torch.device("meta"):
        model = STOCK.from_config(wider)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _reads(model: Any, name: str, axis: int) -> bool:
    """Whether it is a linear layer that takes something from the channels; these are scored by."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and axis == 1


def _norms(model: Any, group: Group) -> list[Any]:
    """The norms over the stream: modules of one row of weights, a number for each channel."""
    rows = [s.module for s in group.writes if model.get_parameter(s.param).dim() == 1]
    found = [model.get_submodule(name) for name in rows]
    return [m for m in found if not isinstance(m, nn.Linear) and _epsilon(m) is not None]


def _epsilon(module: Any) -> str | None:
    return next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)


def _epsilon_shared(model: Any, norms: Sequence[Any]) -> bool:
    """Whether norms of something else have an epsilon, which config.json says once for all."""
    own = {id(m) for m in norms}
    return any(_epsilon(m) is not None and id(m) not in own for m in model.modules())


def _grow_epsilons(model: Any, norms: Sequence[Any], grow: float) -> None:
    for norm in norms:
        name = _epsilon(norm)
        assert name is not None
        setattr(norm, name, getattr(norm, name) * grow**2)
    keys = [k for k in model.config.to_dict() if k.endswith(("norm_eps", "norm_epsilon"))]
    for key in keys:
        setattr(model.config, key, getattr(model.config, key) * grow**2)


def _shrink_stream(model: Any, group: Group, norms: Sequence[Any], grow: float) -> None:
    """Divide what is written to the stream; a head that is the embedding is made up for."""
    own = {id(m.weight) for m in norms}
    for s in group.writes:
        owner, parameter = model.get_submodule(s.module), model.get_parameter(s.param)
        writes = isinstance(owner, nn.Embedding) or s.dim == max(0, parameter.dim() - 2)
        if writes and id(parameter) not in own:
            parameter.div_(grow)
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        norms[-1].weight.mul_(grow)  # the last one, before the head
