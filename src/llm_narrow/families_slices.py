"""The words that declarations of architectures are made of: the sides of layers, and refusals."""

from dataclasses import dataclass
from typing import Any

from .units import Kind, Slice


@dataclass(frozen=True)
class Refused:
    """A kind of unit that the architecture has and that cannot be removed exactly, with why."""

    kind: Kind
    reason: str


def outputs(model: Any, name: str, block: int = 1, start: int = 0) -> tuple[Slice, ...]:
    """The output side of a linear layer, its bias included. Conv1D stores the transpose."""
    layer = model.get_submodule(name)
    dim = 1 if type(layer).__name__ == "Conv1D" else 0
    bias = (Slice(f"{name}.bias", 0, start, block),) if layer.bias is not None else ()
    return (Slice(f"{name}.weight", dim, start, block), *bias)


def width(model: Any, name: str) -> int:
    """How many outputs a linear layer has."""
    layer = model.get_submodule(name)
    return int(layer.weight.shape[1 if type(layer).__name__ == "Conv1D" else 0])


def inputs(model: Any, name: str, block: int = 1) -> tuple[Slice, ...]:
    """The input side of a linear layer."""
    dim = 0 if type(model.get_submodule(name)).__name__ == "Conv1D" else 1
    return (Slice(f"{name}.weight", dim, 0, block),)


def has(model: Any, name: str) -> bool:
    """Whether the model has a module of that name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf, None) is not None


def head_size(config: Any) -> int:
    """Channels of one head, where config.json may say so."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
