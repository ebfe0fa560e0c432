"""Whole layers, attention blocks and MLP blocks as things that can be removed.

A *layer* is an entry of the model's list of layers. Without it the model is a stock model of fewer
layers. A *block* is one half of a layer: its attention (all groups of heads) or its MLP (all other
groups). Without it the layer adds only what its other half adds. That is exact in two forms:

* `silence` fills what reads the block's units with zeros. The shape stays, so any layout holds it.
* `take_out` removes its units: attention becomes `Skipped`, an MLP `Nothing`. No stock class has
  such a layer, so this is for the uneven layout.
"""

import copy
import inspect
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .channels import skeleton
from .errors import BadInput, problems
from .families import find_groups
from .refit import LAYER
from .units import ROUTED, Group, Keep, remove

Half = Literal["attention", "mlp"]
NUMBERS = ("layer_idx", "layer_id")  # module attributes that say which layer a module is of


@dataclass(frozen=True)
class Layer:
    """One layer of a model: its place, the name of its module, and the groups of either half."""

    number: int
    name: str
    attention: tuple[Group, ...]
    mlp: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups of the layer."""
        return self.attention + self.mlp

    def half(self, half: Half) -> tuple[Group, ...]:
        """The groups of one half."""
        return self.attention if half == "attention" else self.mlp


def layers_of(model: Any, groups: Sequence[Group] | None = None) -> tuple[Layer, ...]:
    """The layers of the model, in order. Raises BadInput for a model without layers."""
    groups = find_groups(model) if groups is None else groups
    stack = stack_of(model, groups)
    found = []
    for number in range(len(model.get_submodule(stack))):
        name = f"{stack}.{number}"
        own = [g for g in groups if f"{g.name}.".startswith(f"{name}.")]
        found.append(
            Layer(
                number, name,
                attention=tuple(g for g in own if g.kind == "heads"),
                mlp=tuple(g for g in own if g.kind != "heads"),
            )
        )  # fmt: skip
    return tuple(found)


def stack_of(model: Any, groups: Sequence[Group]) -> str:
    """The name of the list of layers. Raises BadInput where there is none."""
    for g in groups:
        if found := LAYER.match(f"{g.name}."):
            stack = found.group(1).rpartition(".")[0]
            if isinstance(model.get_submodule(stack), nn.ModuleList):
                return stack
    raise BadInput("The model has no list of layers, so that no layer can go. Leave `layers` out.")


@torch.no_grad()
def remove_layers(model: Any, keep: Tensor) -> None:
    """Shrink the model in place to the layers that `keep`, (layers,) bool, holds; config included.

    What is left is what the model of the shorter config is. Raises BadInput for a wrong mask, and
    where a layer's place decides what it does in a way that no config can say.
    """
    stack = stack_of(model, find_groups(model))
    layers = model.get_submodule(stack)
    if keep.shape != (len(layers),) or keep.dtype != torch.bool or not keep.any():
        raise BadInput(
            f"keep must be {len(layers)} bools with at least one True, got {keep.tolist()}."
        )
    if keep.all():
        return
    changes = _changes(model.config, keep)
    _check(model.config, stack, changes, keep)
    _shorten(model, stack, keep)
    if earlier := getattr(model, "narrow_keep", None):  # of a model that was narrowed before
        model.narrow_keep = carried(earlier, keep, stack)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        _set(config, changes)


def shortened(config: Any, keep: Tensor) -> Any:
    """A copy of the config for the layers that `keep`, (layers,) bool, holds."""
    copied = copy.deepcopy(config)
    _set(copied, _changes(config, keep) if not keep.all() else {})
    return copied


def carried(keep: Mapping[str, Tensor], layers: Tensor, stack: str) -> Keep:
    """`keep` under the names that groups have once `remove_layers` took the others away."""
    numbers = (layers.long().cumsum(0) - 1).tolist()
    found = {}
    for name, stay in keep.items():
        inside = re.match(rf"{re.escape(stack)}\.(\d+)(\..*)?$", name)
        if inside is None:
            found[name] = stay
        elif layers[int(inside[1])]:
            found[f"{stack}.{numbers[int(inside[1])]}{inside[2] or ''}"] = stay
    return found


@torch.no_grad()
def silence(model: Any, groups: Collection[Group]) -> None:
    """Fill what reads the units of the groups with zeros, bias included, in place.

    Exact for kinds of every sort, routed ones too, where all groups of a half are given: the half
    then adds nothing to the residual stream.
    """
    for g in groups:
        for s in g.reads:
            reader = model.get_submodule(s.module)
            model.get_parameter(s.param).zero_()
            if s.param.endswith(".weight") and getattr(reader, "bias", None) is not None:
                reader.bias.zero_()


def counted(half: Sequence[Group]) -> tuple[Group, ...]:
    """The groups that say whether a half is empty: without experts, whose neurons say it."""
    return tuple(g for g in half if g.kind not in ROUTED)


@torch.no_grad()
def take_out(model: Any, groups: Sequence[Group], keep: Keep) -> None:
    """`units.remove`, but a half of a layer of which no unit stays does nothing from then on.

    Its modules stay under their names with weights of no size, so that `find_groups` finds groups
    of size 0 and everything that loops over slices goes on working. Works on meta tensors too, as
    loading needs. Raises BadInput where a half would lose all units of one of its groups and keep
    some of another.
    """
    if all(keep[g.name].any() for g in groups):
        return remove(model, groups, keep)
    halves = [half for at in layers_of(model, groups) for half in (at.attention, at.mlp)]
    emptied = [h for h in halves if counted(h) and not any(keep[g.name].any() for g in counted(h))]
    whole = {g.name for half in emptied for g in half}
    wrong = [
        f"{g.name} must keep at least one of its {g.kind}, as the rest of the half stays"
        for g in groups
        if g.name not in whole and not keep[g.name].any()
    ]
    if wrong:
        raise problems("units to remove", wrong)
    for half in emptied:
        silence(model, half)
    remove(model, groups, keep)
    modules = dict(model.named_modules())
    for half in emptied:
        place = _place(half)
        if place not in modules:
            continue  # its matrices stand on the layer itself: of no width, they give nothing
        parent, _, leaf = place.rpartition(".")
        stand_in: type[Any] = Skipped if half[0].kind == "heads" else Nothing
        setattr(modules[parent], leaf, stand_in(modules[place]))


def _place(half: Sequence[Group]) -> str:
    """The module that all groups of a half lie in."""
    parts = zip(*(g.name.split(".") for g in half), strict=False)
    return ".".join(part[0] for part in itertools.takewhile(lambda p: len(set(p)) == 1, parts))


class Nothing(nn.Module):
    """What stands in the place of an MLP without neurons: nothing is added to the stream."""

    def __init__(self, instead_of: Any) -> None:
        """`instead_of` is the module, whose parameters are taken over by name."""
        super().__init__()
        for name, child in instead_of.named_children():
            self.add_module(name, child)
        for name, parameter in instead_of.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        names = list(inspect.signature(instead_of.forward).parameters)
        # Where the module itself adds to the stream (Bloom): which of its arguments that is.
        self.residual = names.index("residual") if "residual" in names else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of the hidden states, or the residual stream as it is."""
        if self.residual is None:
            return torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return args[self.residual] if len(args) > self.residual else kwargs["residual"]


class Skipped(nn.Module):
    """What stands in the place of attention without heads.

    One number per token goes into the cache, whose length tells the model which position is next.
    """

    def __init__(self, instead_of: Any) -> None:
        """`instead_of` is the attention module, whose parameters are taken over by name."""
        super().__init__()
        nothing = Nothing(instead_of)
        self._modules.update(nothing._modules)
        self._parameters.update(nothing._parameters)
        self.residual = nothing.residual
        self.layer_idx = next(
            getattr(m, n) for m in instead_of.modules() for n in NUMBERS if hasattr(m, n)
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        """What `Nothing` gives, and no attention weights."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            none = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
            cache.update(none, none, self.layer_idx)
        return Nothing.forward(self, *args, **kwargs), None  # type: ignore[arg-type]


def _changes(config: Any, keep: Tensor) -> dict[str, Any]:
    """The fields of the config that follow the layers, with their new values."""
    stay = keep.nonzero().flatten().tolist()
    new = {old: number for number, old in enumerate(stay)}
    found: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        if "layer" not in key and key != "attention_types":
            continue
        if key == "attention_types" and value:  # GPT-Neo: [[[kinds], times], …]
            kinds = [kind for kinds, times in value for kind in kinds * times]
            found[key] = [[[kinds[i] for i in stay], 1]]
        elif key == "per_layer_config" and value:
            found[key] = {new[int(k)]: v for k, v in value.items() if int(k) in new}
        elif key == "mlp_only_layers" and value:
            found[key] = [new[i] for i in value if i in new]
        elif isinstance(value, list | tuple) and len(value) == len(keep):
            found[key] = [value[i] for i in stay]
    if dense := getattr(config, "first_k_dense_replace", None):
        found["first_k_dense_replace"] = int(keep[:dense].sum())
    return {**found, "num_hidden_layers": len(stay)}


def _set(config: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, value)


def _shorten(model: Any, stack: str, keep: Tensor) -> None:
    """Take layers out of their list and number the modules of the others anew."""
    owner, _, leaf = stack.rpartition(".")
    layers = model.get_submodule(stack)
    stay = [layer for layer, kept in zip(layers, keep.tolist(), strict=True) if kept]
    for number, layer in enumerate(stay):
        for module in layer.modules():
            for name in NUMBERS:
                if hasattr(module, name):
                    setattr(module, name, number)
    setattr(model.get_submodule(owner), leaf, nn.ModuleList(stay))


def _check(config: Any, stack: str, changes: Mapping[str, Any], keep: Tensor) -> None:
    """Raise BadInput unless a model of the changed config is the old one without the layers.

    Both are made without memory and compared module by module, so that this knows no architecture.
    """
    kind = config.model_type
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise BadInput(
            f"No layer of this {kind} can go: its attention is divided by the number of the layer "
            "(scale_attn_by_inverse_layer_idx). Leave `layers` out."
        )
    shorter = shortened(config, keep)
    with torch.device("meta"):
        whole, wanted = skeleton(config), skeleton(shorter)
    _shorten(whole, stack, keep)
    ours, theirs = (dict(_traits(m)) for m in (whole, wanted))
    differ = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if differ:
        raise BadInput(
            f"These layers of a {kind} cannot go: {differ[0]} would be {theirs.get(differ[0])} "
            f"instead of {ours.get(differ[0])}, as the config counts layers by a rule of its own. "
            "Remove other layers, or leave `layers` out."
        )


def _traits(model: Any) -> Iterator[tuple[str, object]]:
    """What distinguishes modules: shapes, and the plain values that they hold."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, tuple(tensor.shape)
    for name, module in model.named_modules():
        if not name:
            continue  # what the model says of itself as a whole follows its config
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, bool | int | float | str):
                yield f"{name}.{key}", value
