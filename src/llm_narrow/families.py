"""Where the units of each architecture live: one function per family, one entry per model type."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .errors import NarrowError
from .families_dense import (
    gpt_neo,
    gptj,
    llama,
    nemotron,
    olmo2,
    opt,
    phi,
    stablelm,
    starcoder2,
)
from .families_experts import deepseek, mixtral, qwen_moe
from .families_fused import bloom, falcon, gpt2, gpt_bigcode, gpt_neox, mpt, phi3
from .families_slices import Refused, inputs, outputs, width
from .units import Group, Kind


class UndeclaredArchitecture(NarrowError):
    """A model type that `FAMILIES` does not hold."""


def find_groups(model: Any) -> list[Group]:
    """Every group of units that the model's architecture declares.

    Sizes are those of the weights as they are now, so a model that has lost units already is told
    apart from what its config says. Raises UndeclaredArchitecture: guessing a layout would corrupt
    the model silently.
    """
    return [found for found in _declared(model) if isinstance(found, Group)]


def refused_kinds(model: Any) -> dict[Kind, str]:
    """Why units of a kind that the model has cannot be removed exactly, by kind.

    Raises UndeclaredArchitecture.
    """
    return {found.kind: found.reason for found in _declared(model) if isinstance(found, Refused)}


def _declared(model: Any) -> Iterator[Group | Refused]:
    kind = model.config.model_type if hasattr(model, "config") else "mlp"
    if kind not in FAMILIES:
        raise UndeclaredArchitecture(
            f"No unit declaration for model type {kind!r}. "
            f"Declared: {', '.join(sorted(FAMILIES))}. "
            "To add one, see docs/adding-an-architecture.md."
        )
    return FAMILIES[kind](model)


def mlp(m: Any) -> Iterator[Group | Refused]:
    """A plain stack of linear layers: every hidden layer is a group (the toy experiments)."""
    names = [name for name, layer in m.named_modules() if isinstance(layer, nn.Linear)]
    for here, after in itertools.pairwise(names):
        size = width(m, here)
        yield Group(here, "neurons", size, writes=outputs(m, here), reads=inputs(m, after))


FAMILIES: dict[str, Callable[[Any], Iterator[Group | Refused]]] = {
    "bloom": bloom,
    "cohere": llama,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "falcon": falcon,
    "gemma": llama,
    "gemma2": llama,
    "gemma3_text": llama,
    "gpt2": gpt2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "granite": llama,
    "llama": llama,
    "mistral": llama,
    "mixtral": mixtral,
    "mlp": mlp,
    "mpt": mpt,
    "nemotron": nemotron,
    "olmo": llama,
    "olmo2": olmo2,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": llama,
    "qwen2_moe": qwen_moe,
    "qwen3": llama,
    "qwen3_moe": qwen_moe,
    "smollm3": llama,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
}
