"""Channels of the residual stream: fewer of them in every layer at once.

A channel is a place of the hidden states. Everything reads it or writes to it, so there is one
group of channels for the whole model, whose slices are found by making the model's config wider.

Removing channels is exact where norms are root-mean-square: with N channels of which n stay, the
model left computes what the whole one does whose writers put zeros into the others. The mean of the
squares is then over fewer places, so with s^2 = N / n either every norm's weight is multiplied by s
and its epsilon by s^2; or, where other norms share the epsilon, the weights are multiplied by s and
everything that writes to the stream is divided by s. A LayerNorm subtracts the mean over all
channels, which no weight makes up for: there a norm of ours takes its place, that remembers how
many there were (norms.py), and the folder is one for our own loader. A config of such a model has
`norm_width`, the channels of before, beside the hidden size.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from .errors import BadInput
from .families import find_groups
from .families_slices import head_size
from .norms import WideNorm, epsilon_name, over
from .stock import WIDE, uniform_config
from .units import Group, Slice, mask, remove
from .verify import TOLERANCE

NAME = "channels"
FOLLOWING = "word_embed_proj_dim"  # of OPT: mostly the hidden size under another name
WIDTHS = ("hidden_size", "hidden_dim")  # what modules that reshape call the number of channels
STOCK: Any = AutoModelForCausalLM
MULTIPLE = 8
PROBES = 24  # tokens that exactness is looked at on


def group_of(model: Any) -> Group:
    """The channels of the model as one group. Raises BadInput where none can go exactly."""
    if wide(model.config):
        raise BadInput(
            f"Channels of this {model.config.model_type} have gone before, and its norms remember "
            "how many there were. Start from the original model."
        )
    if getattr(model.get_input_embeddings(), "scalar_embed_scale", 1) != 1:
        raise BadInput(
            f"No channels of a {model.config.model_type} can go: its embeddings are multiplied by "
            "the root of their number. Leave prune.channels out."
        )
    axes = _axes(model)
    reads = [Slice(n, d) for n, d in axes.items() if _reads(model, n, d)]
    read = {s.param for s in reads}
    writes = [Slice(n, d) for n, d in axes.items() if n not in read]
    size = int(model.config.hidden_size)
    return Group(NAME, "neurons", size, writes=tuple(writes), reads=tuple(reads), added=False)


def wide(config: Any) -> int:
    """How many channels the norms of a model take the mean of, where fewer are left; else 0."""
    return int(getattr(config, WIDE, None) or 0)


def whole_config(config: Any) -> Any:
    """The config of before channels went, as stock classes know it; a copy if none went so."""
    full = wide(config)
    found = _of_width(config, full or int(config.hidden_size))
    if full:
        delattr(found, WIDE)
    return found


def narrowed(config: Any, stay: int) -> Any:
    """The config of a model whose norms remember its channels, of which `stay` are left."""
    found = _narrower(config, stay)
    setattr(found, WIDE, int(config.hidden_size))
    return found


def skeleton(config: Any, **options: Any) -> Any:
    """A new model of a config; `options` are those of `from_config`.

    The only way to make one of a config whose channels went where norms take the mean.
    """
    model = STOCK.from_config(whole_config(config), **options)
    if wide(config):
        with torch.device("cpu"):  # indices, where parameters are made without memory
            stay = torch.arange(wide(config)) < config.hidden_size
            _cut(model, group_of(model), stay)
    return model


def chosen(scores: Tensor, stay: int) -> Tensor:
    """The best-scored channels, (channels,) bool."""
    best = scores.argsort(descending=True, stable=True)[:stay]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)


def check(config: Any, stay: int, *, stock: bool = True) -> None:
    """Raise BadInput unless there are (stock) models of so many channels."""
    whole = int(config.hidden_size)
    found = [
        f"a multiple of {MULTIPLE}, which fast products need" * bool(stay % MULTIPLE),
        f"from 1 to {whole - 1}, as the model has {whole}" * (not 0 < stay < whole),
    ]
    smaller = _narrower(config, stay)
    if stock and not any(found) and uniform_config(smaller, [], {}, {}) is None:
        found = [f"a multiple of {config.num_attention_heads}, the heads of this model"]
    if any(found):
        rules = " and ".join(rule for rule in found if rule)
        raise BadInput(f"prune.channels must be {rules}, got {stay}.")


def allowed(model: Any, most: int) -> int:
    """The largest number of channels up to `most` that `thin` takes; 0 if there is none."""
    for stay in range(most // MULTIPLE * MULTIPLE, 0, -MULTIPLE):
        with contextlib.suppress(BadInput):
            check(model.config, stay, stock=stock_norms(model))
            return stay
    return 0


def stock_norms(model: Any) -> bool:
    """Whether the norms of the model stay exact as they are, so that a stock class holds it."""
    return not any(over(m, int(model.config.hidden_size)) for m in model.modules())


@torch.no_grad()
def thin(model: Any, keep: Tensor) -> None:
    """Take the channels that `keep`, (channels,) bool, drops out of the model, config included.

    Raises BadInput where what is left is not the model with zeros in their place.
    """
    group = group_of(model)
    kept, whole = int(keep.sum()), group.size
    check(model.config, kept, stock=stock_norms(model))
    device = next(model.parameters()).device
    tokens = torch.arange(PROBES, device=device)[None] * 7919 % int(model.config.vocab_size)
    masked = copy.deepcopy(model)
    mask(masked, [group], {NAME: keep})
    wanted = masked(tokens).logits.float()
    del masked
    if stock_norms(model):
        norms = _norms(model, group)
        _cut(model, group, keep)
        grow = math.sqrt(whole / kept)
        if _epsilon_shared(model, norms):
            _shrink_stream(model, group, norms, grow)
        else:
            _grow_epsilons(model, norms, grow)
        for norm in norms:
            norm.weight.mul_(grow)
    else:
        _cut(model, group, keep)
    try:
        found = model(tokens).logits.float()
        off = float((found - wanted).abs().max() / wanted.abs().max())
    except RuntimeError:  # shapes that the code takes from elsewhere
        off = math.inf
    if not off <= TOLERANCE[model.dtype]:
        raise BadInput(
            f"No channels of a {model.config.model_type} can go: without them, and with zeros in "
            "their place, it computes two things. Leave prune.channels out."
        )


def _cut(model: Any, group: Group, keep: Tensor) -> None:
    """Remove the channels, and have modules, config and norms that take the mean follow."""
    kept, whole = int(keep.sum()), group.size
    meant = [name for name, m in model.named_modules() if over(m, whole)]
    remove(model, [group], {NAME: keep})
    for name in meant:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, WideNorm(model.get_submodule(name), whole))
    heads = _of_heads(model) if meant else set()
    for module in model.modules():
        for name in WIDTHS:
            if getattr(module, name, None) == whole and id(module) not in heads:
                setattr(module, name, kept)
    config = narrowed(model.config, kept) if meant else _narrower(model.config, kept)
    vars(model.config).update(vars(config))


def _of_heads(model: Any) -> set[int]:
    """Modules of attention: with heads of their own size, what they call hidden is of all heads."""
    names = {g.name for g in find_groups(model) if g.kind == "heads"}
    return {id(model.get_submodule(name)) for name in names}


def _narrower(config: Any, stay: int) -> Any:
    """The config with heads of the size that they have, whatever the hidden size."""
    found = _of_width(config, stay)
    try:
        found.head_dim = head_size(config)
    except AttributeError:
        raise BadInput(
            f"No channels of a {config.model_type} can go: its config takes the size of a head "
            "from the hidden size. Leave prune.channels out."
        ) from None
    return found


def _of_width(config: Any, channels: int) -> Any:
    found = copy.deepcopy(config)
    if getattr(found, FOLLOWING, None) == found.hidden_size:
        setattr(found, FOLLOWING, channels)
    found.hidden_size = channels
    return found


def _axes(model: Any) -> dict[str, int]:
    """The parameters with an axis over the channels, and which.

    An axis of units is none, though it grows too where a config knows only the hidden size.
    """
    step = 8 * int(model.config.num_attention_heads)
    units = {(s.param, s.dim) for g in find_groups(model) for s in g.slices}
    before, after = (_shapes(model.config, more) for more in (0, step))
    axes = {}
    for name, shape in before.items():
        grown = [d for d, n in enumerate(shape)
                 if after[name][d] != n and (name, d) not in units]  # fmt: skip
        if len(grown) > 1 or (grown and after[name][grown[0]] - shape[grown[0]] != step):
            raise BadInput(
                f"No channels of a {model.config.model_type} can go: {name} changes with the "
                "hidden size in a way of its own. Leave prune.channels out."
            )
        if grown:
            axes[name] = grown[0]
    return axes


def _shapes(config: Any, more: int) -> dict[str, tuple[int, ...]]:
    wider = _narrower(config, int(config.hidden_size) + more)
    with torch.device("meta"):
        model = STOCK.from_config(wider)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _reads(model: Any, name: str, axis: int) -> bool:
    """Whether it is a linear layer that takes something from the channels; these are scored by."""
    owner = model.get_submodule(name.rpartition(".")[0])
    into = {nn.Linear: 1, Conv1D: 0}
    return any(isinstance(owner, kind) and axis == d for kind, d in into.items()) and (
        model.get_parameter(name).dim() == 2
    )


def _norms(model: Any, group: Group) -> list[Any]:
    """The norms over the stream: modules of one row of weights, a number for each channel."""
    rows = [s.module for s in group.writes if model.get_parameter(s.param).dim() == 1]
    found = [model.get_submodule(name) for name in rows]
    return [m for m in found if not isinstance(m, nn.Linear) and epsilon_name(m) is not None]


def _epsilon_shared(model: Any, norms: Sequence[Any]) -> bool:
    """Whether norms of something else have an epsilon, which config.json says once for all."""
    own = {id(m) for m in norms}
    return any(epsilon_name(m) is not None and id(m) not in own for m in model.modules())


def _grow_epsilons(model: Any, norms: Sequence[Any], grow: float) -> None:
    for norm in norms:
        name = epsilon_name(norm)
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
