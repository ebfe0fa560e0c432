"""Where the units of each architecture live: one function per family, one entry per model type."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .errors import NarrowError
from .units import Group, Slice


class UndeclaredArchitecture(NarrowError):
    """A model type that `FAMILIES` does not hold."""


def find_groups(model: Any) -> list[Group]:
    """Every group of units that the model's architecture declares.

    Sizes are those of the weights as they are now, so a model that has lost units already is told
    apart from what its config says. Raises UndeclaredArchitecture: guessing a layout would corrupt
    the model silently.
    """
    kind = model.config.model_type if hasattr(model, "config") else "mlp"
    if kind not in FAMILIES:
        raise UndeclaredArchitecture(
            f"No unit declaration for model type {kind!r}. "
            f"Declared: {', '.join(sorted(FAMILIES))}. "
            "To add one, see docs/adding-an-architecture.md."
        )
    return list(FAMILIES[kind](model))


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


def llama(m: Any) -> Iterator[Group]:
    """Separate q, k, v with grouped queries; gate, up, down. Also mistral, qwen2, qwen3, gemma3."""
    c = m.config
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries = c.num_attention_heads // c.num_key_value_heads  # query heads of one key/value head
    for i in range(c.num_hidden_layers):
        at, ff = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        # Gemma 3 norms what attention and MLP give before it is added.
        added = not hasattr(m.get_submodule(f"model.layers.{i}"), "post_feedforward_layernorm")
        yield Group(
            ff, "neurons", width(m, f"{ff}.gate_proj"),
            writes=outputs(m, f"{ff}.gate_proj") + outputs(m, f"{ff}.up_proj"),
            reads=inputs(m, f"{ff}.down_proj"),
            config=(("intermediate_size", 1),),
            added=added,
        )
        yield Group(
            at, "heads", width(m, f"{at}.k_proj") // d,
            writes=outputs(m, f"{at}.q_proj", queries * d)
            + outputs(m, f"{at}.k_proj", d)
            + outputs(m, f"{at}.v_proj", d),
            reads=inputs(m, f"{at}.o_proj", queries * d),
            config=(("num_key_value_heads", 1), ("num_attention_heads", queries)),
            added=added,
        )


def gpt_neox(m: Any) -> Iterator[Group]:
    """Pythia. One fused projection laid out as (head, q|k|v, dim)."""
    c = m.config
    d = c.hidden_size // c.num_attention_heads
    for i in range(c.num_hidden_layers):
        at, ff = f"gpt_neox.layers.{i}.attention", f"gpt_neox.layers.{i}.mlp"
        yield Group(
            ff, "neurons", width(m, f"{ff}.dense_h_to_4h"),
            writes=outputs(m, f"{ff}.dense_h_to_4h"), reads=inputs(m, f"{ff}.dense_4h_to_h"),
            config=(("intermediate_size", 1),),
        )
        yield Group(
            at, "heads", width(m, f"{at}.query_key_value") // (3 * d),
            writes=outputs(m, f"{at}.query_key_value", 3 * d), reads=inputs(m, f"{at}.dense", d),
        )


def gpt2(m: Any) -> Iterator[Group]:
    """One fused projection laid out as (q|k|v, head, dim)."""
    c = m.config
    d = c.hidden_size // c.num_attention_heads
    for i in range(c.num_hidden_layers):
        at, ff = f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp"
        heads = width(m, f"{at}.c_attn") // (3 * d)
        q, k, v = (outputs(m, f"{at}.c_attn", d, start=p * heads * d) for p in range(3))
        yield Group(
            ff, "neurons", width(m, f"{ff}.c_fc"),
            writes=outputs(m, f"{ff}.c_fc"), reads=inputs(m, f"{ff}.c_proj"),
            config=(("n_inner", 1),),
        )
        yield Group(
            at, "heads", heads,
            writes=q + k + v, reads=inputs(m, f"{at}.c_proj", d),
            sizes=((f"{at}.split_size", d),),
        )


def phi3(m: Any) -> Iterator[Group]:
    """Fused (all q, all k, all v) and fused (gate, up)."""
    c = m.config
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries = c.num_attention_heads // c.num_key_value_heads
    q = queries * d
    for i in range(c.num_hidden_layers):
        at, ff = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        kv = width(m, f"{at}.qkv_proj") // (q + 2 * d)
        up = width(m, f"{ff}.gate_up_proj") // 2
        yield Group(
            ff, "neurons", up,
            writes=outputs(m, f"{ff}.gate_up_proj") + outputs(m, f"{ff}.gate_up_proj", start=up),
            reads=inputs(m, f"{ff}.down_proj"),
            config=(("intermediate_size", 1),),
        )
        yield Group(
            at, "heads", kv,
            writes=outputs(m, f"{at}.qkv_proj", q)
            + outputs(m, f"{at}.qkv_proj", d, start=kv * q)
            + outputs(m, f"{at}.qkv_proj", d, start=kv * (q + d)),
            reads=inputs(m, f"{at}.o_proj", q),
            sizes=((f"{at}.config.num_attention_heads", queries), (f"{at}.num_key_value_heads", 1)),
            config=(("num_key_value_heads", 1), ("num_attention_heads", queries)),
        )


def opt(m: Any) -> Iterator[Group]:
    """Separate q, k, v with biases; fc1 and fc2 stand directly on the layer."""
    c = m.config
    d = c.hidden_size // c.num_attention_heads
    added = c.do_layer_norm_before  # opt-350m norms the sum instead
    for i in range(c.num_hidden_layers):
        layer = f"model.decoder.layers.{i}"
        at = f"{layer}.self_attn"
        q, k, v = (outputs(m, f"{at}.{p}_proj", d) for p in "qkv")
        yield Group(
            f"{layer}.mlp", "neurons", width(m, f"{layer}.fc1"),
            writes=outputs(m, f"{layer}.fc1"), reads=inputs(m, f"{layer}.fc2"),
            config=(("ffn_dim", 1),),
            added=added,
        )
        yield Group(
            at, "heads", width(m, f"{at}.q_proj") // d,
            writes=q + k + v, reads=inputs(m, f"{at}.out_proj", d), sizes=((f"{at}.num_heads", 1),),
            added=added,
        )


def mlp(m: Any) -> Iterator[Group]:
    """A plain stack of linear layers: every hidden layer is a group (the toy experiments)."""
    names = [name for name, layer in m.named_modules() if isinstance(layer, nn.Linear)]
    for here, after in itertools.pairwise(names):
        size = width(m, here)
        yield Group(here, "neurons", size, writes=outputs(m, here), reads=inputs(m, after))


FAMILIES: dict[str, Callable[[Any], Iterator[Group]]] = {
    "gemma3_text": llama,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": llama,
    "mlp": mlp,
    "opt": opt,
    "phi3": phi3,
    "qwen2": llama,
    "qwen3": llama,
}
