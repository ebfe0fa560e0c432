"""Architectures with separate query, key and value projections and one MLP in each layer."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .families_slices import Refused, has, head_size, inputs, outputs, width
from .units import Group, Slice

WHOLE_NORM = (
    "the norm of queries and keys takes its mean over all heads, so that removing one changes the "
    "others"
)
NORM_PER_HEAD = "queries and keys of every head have a norm module of their own"


def llama(m: Any) -> Iterator[Group | Refused]:
    """Separate q, k, v with grouped queries; gate, up, down. Also mistral, qwen, gemma, olmo, …"""
    for i in range(m.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield gated(m, f"{layer}.mlp", added=added(m, layer))
        yield attention(m, f"{layer}.self_attn", added=added(m, layer))


def gated(
    m: Any, name: str, *, key: str = "intermediate_size", block: int = 1, added: bool = True
) -> Group:
    """The neurons of an MLP of gate, up and down, `block` of them to a unit.

    `key` is what config.json calls the number of units.
    """
    return Group(
        name, "neurons", width(m, f"{name}.gate_proj") // block,
        writes=outputs(m, f"{name}.gate_proj", block) + outputs(m, f"{name}.up_proj", block),
        reads=inputs(m, f"{name}.down_proj", block),
        config=((key, 1),),
        added=added,
    )


def plain(m: Any, name: str, up: str, down: str, key: str, *, added: bool = True) -> Group:
    """The neurons of an MLP of two layers."""
    return Group(
        name, "neurons", width(m, up), writes=outputs(m, up), reads=inputs(m, down),
        config=((key, 1),), added=added,
    )


def attention(m: Any, name: str, *, read: str = "o_proj", added: bool = True) -> Group:
    """Key/value heads, each with its query heads; norms with a row for each head go with them."""
    c, d = m.config, head_size(m.config)
    queries = c.num_attention_heads // c.num_key_value_heads  # query heads of one key/value head
    norms = {"q_norm": queries, "k_norm": 1}
    rows = [
        Slice(f"{name}.{norm}.weight", 0, 0, block)
        for norm, block in norms.items()
        if has(m, f"{name}.{norm}") and m.get_submodule(f"{name}.{norm}").weight.dim() == 2
    ]
    return Group(
        name, "heads", width(m, f"{name}.k_proj") // d,
        writes=outputs(m, f"{name}.q_proj", queries * d)
        + outputs(m, f"{name}.k_proj", d)
        + outputs(m, f"{name}.v_proj", d)
        + tuple(rows),
        reads=inputs(m, f"{name}.{read}", queries * d),
        config=(("num_key_value_heads", 1), ("num_attention_heads", queries)),
        added=added,
    )


def added(m: Any, layer: str) -> bool:
    """Whether the layer adds what its blocks give as it is. Gemma 2 and 3 and OLMo 2 norm it,
    Granite multiplies it."""
    return (
        not has(m, f"{layer}.post_feedforward_layernorm")
        and getattr(m.config, "residual_multiplier", 1.0) == 1.0
    )


def olmo2(m: Any) -> Iterator[Group | Refused]:
    """As llama, but with a norm over all queries at once and one over all keys."""
    yield Refused("heads", WHOLE_NORM)
    for found in llama(m):
        if isinstance(found, Refused) or found.kind != "heads":
            yield found


def starcoder2(m: Any) -> Iterator[Group | Refused]:
    """Grouped queries with biases; an MLP without a gate."""
    for i in range(m.config.num_hidden_layers):
        at, ff = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        yield plain(m, ff, f"{ff}.c_fc", f"{ff}.c_proj", "intermediate_size")
        yield attention(m, at)


def nemotron(m: Any) -> Iterator[Group | Refused]:
    """Grouped queries; an MLP without a gate."""
    for i in range(m.config.num_hidden_layers):
        at, ff = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        yield plain(m, ff, f"{ff}.up_proj", f"{ff}.down_proj", "intermediate_size")
        yield attention(m, at)


def phi(m: Any) -> Iterator[Group | Refused]:
    """Attention and MLP side by side on one norm, with biases everywhere."""
    for i in range(m.config.num_hidden_layers):
        at, ff = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        heads = attention(m, at, read="dense")
        yield plain(m, ff, f"{ff}.fc1", f"{ff}.fc2", "intermediate_size")
        # Stock phi takes the size of these norms from hidden_size / num_attention_heads.
        yield replace(heads, config=None) if m.config.qk_layernorm else heads


def stablelm(m: Any) -> Iterator[Group | Refused]:
    """As llama, but the size of a head is always hidden_size / num_attention_heads."""
    if m.config.qk_layernorm:
        yield Refused("heads", NORM_PER_HEAD)
    queries = m.config.num_attention_heads // m.config.num_key_value_heads
    for i in range(m.config.num_hidden_layers):
        at = f"model.layers.{i}.self_attn"
        yield gated(m, f"model.layers.{i}.mlp")
        if not m.config.qk_layernorm:
            sizes = ((f"{at}.num_heads", queries), (f"{at}.num_key_value_heads", 1))
            yield replace(attention(m, at), sizes=sizes, config=None)


def opt(m: Any) -> Iterator[Group | Refused]:
    """Separate q, k, v with biases; fc1 and fc2 stand directly on the layer."""
    added = m.config.do_layer_norm_before  # opt-350m norms the sum instead
    for i in range(m.config.num_hidden_layers):
        layer = f"model.decoder.layers.{i}"
        yield plain(m, f"{layer}.mlp", f"{layer}.fc1", f"{layer}.fc2", "ffn_dim", added=added)
        yield single(m, f"{layer}.self_attn", "num_heads", added=added)


def gpt_neo(m: Any) -> Iterator[Group | Refused]:
    """Separate q, k, v without biases; layers of global and of local attention."""
    for i in range(m.config.num_hidden_layers):
        ff = f"transformer.h.{i}.mlp"
        yield plain(m, ff, f"{ff}.c_fc", f"{ff}.c_proj", "intermediate_size")
        yield single(m, f"transformer.h.{i}.attn.attention", "num_heads")


def gptj(m: Any) -> Iterator[Group | Refused]:
    """Separate q, k, v without biases; attention and MLP side by side on one norm."""
    for i in range(m.config.num_hidden_layers):
        ff = f"transformer.h.{i}.mlp"
        yield plain(m, ff, f"{ff}.fc_in", f"{ff}.fc_out", "n_inner")
        yield single(m, f"transformer.h.{i}.attn", "num_attention_heads")


def single(m: Any, name: str, attribute: str, *, added: bool = True) -> Group:
    """One query head for each key/value head, and no stock config for heads of another size.

    `attribute` is what the module calls the number of heads.
    """
    d = head_size(m.config)
    q, k, v = (outputs(m, f"{name}.{p}_proj", d) for p in "qkv")
    return Group(
        name, "heads", width(m, f"{name}.q_proj") // d,
        writes=q + k + v, reads=inputs(m, f"{name}.out_proj", d),
        sizes=((f"{name}.{attribute}", 1),),
        added=added,
    )
