"""Architectures whose queries, keys and values come out of one matrix."""

from collections.abc import Iterator
from typing import Any

from .families_dense import plain
from .families_slices import Refused, head_size, inputs, outputs, width
from .units import Group

ALIBI = (
    "the position bias of a head (ALiBi) follows from its place and from the number of heads, so "
    "that removing one changes the others"
)


def gpt_neox(m: Any) -> Iterator[Group | Refused]:
    """Pythia. One fused projection laid out as (head, q|k|v, dim)."""
    c = m.config
    d = head_size(c)
    for i in range(c.num_hidden_layers):
        at, ff = f"gpt_neox.layers.{i}.attention", f"gpt_neox.layers.{i}.mlp"
        yield plain(m, ff, f"{ff}.dense_h_to_4h", f"{ff}.dense_4h_to_h", "intermediate_size")
        yield Group(
            at, "heads", width(m, f"{at}.query_key_value") // (3 * d),
            writes=outputs(m, f"{at}.query_key_value", 3 * d), reads=inputs(m, f"{at}.dense", d),
        )


def gpt2(m: Any) -> Iterator[Group | Refused]:
    """One fused projection laid out as (q|k|v, head, dim)."""
    c = m.config
    d = head_size(c)
    for i in range(c.num_hidden_layers):
        at, ff = f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp"
        heads = width(m, f"{at}.c_attn") // (3 * d)
        q, k, v = (outputs(m, f"{at}.c_attn", d, start=p * heads * d) for p in range(3))
        yield plain(m, ff, f"{ff}.c_fc", f"{ff}.c_proj", "n_inner")
        yield Group(
            at, "heads", heads,
            writes=q + k + v, reads=inputs(m, f"{at}.c_proj", d),
            sizes=((f"{at}.split_size", d),),
        )


def gpt_bigcode(m: Any) -> Iterator[Group | Refused]:
    """(all q, k, v) with one key/value head for all, which stays; else (head, q|k|v, dim)."""
    c = m.config
    d = head_size(c)
    for i in range(c.num_hidden_layers):
        at, ff = f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp"
        block, rest = (d, 2 * d) if c.multi_query else (3 * d, 0)
        shared = ((f"{at}.embed_dim", d), (f"{at}.num_key_value_groups", 1))
        yield plain(m, ff, f"{ff}.c_fc", f"{ff}.c_proj", "n_inner")
        yield Group(
            at, "heads", (width(m, f"{at}.c_attn") - rest) // block,
            writes=outputs(m, f"{at}.c_attn", block), reads=inputs(m, f"{at}.c_proj", d),
            sizes=((f"{at}.num_heads", 1), *(shared if c.multi_query else ())),
        )


def falcon(m: Any) -> Iterator[Group | Refused]:
    """Three layouts: (key/value head, its queries|k|v, dim) with the new decoder architecture,
    (all q, k, v) with one key/value head for all, which stays, else (head, q|k|v, dim)."""
    c = m.config
    d = head_size(c)
    if c.alibi:
        yield Refused("heads", ALIBI)
    if c.new_decoder_architecture:
        queries = c.num_attention_heads // c.num_kv_heads
        block, rest = (queries + 2) * d, 0
    else:
        queries = 1
        block, rest = (d, 2 * d) if c.multi_query else (3 * d, 0)
    one_for_all = c.multi_query and not c.new_decoder_architecture
    for i in range(c.num_hidden_layers):
        at, ff = f"transformer.h.{i}.self_attention", f"transformer.h.{i}.mlp"
        yield plain(m, ff, f"{ff}.dense_h_to_4h", f"{ff}.dense_4h_to_h", "ffn_hidden_size")
        if not c.alibi:
            own = () if one_for_all else ((f"{at}.num_kv_heads", 1),)
            yield Group(
                at, "heads", (width(m, f"{at}.query_key_value") - rest) // block,
                writes=outputs(m, f"{at}.query_key_value", block),
                reads=inputs(m, f"{at}.dense", queries * d),
                sizes=((f"{at}.num_heads", queries), *own),
            )


def bloom(m: Any) -> Iterator[Group | Refused]:
    """MLPs whose width no config can say: it is always 4 x hidden_size."""
    yield Refused("heads", ALIBI)
    for i in range(m.config.num_hidden_layers):
        ff = f"transformer.h.{i}.mlp"
        yield _unnamed(m, ff, f"{ff}.dense_h_to_4h", f"{ff}.dense_4h_to_h")


def mpt(m: Any) -> Iterator[Group | Refused]:
    """MLPs whose width no config can say: it is always 4 x d_model."""
    yield Refused("heads", ALIBI)
    for i in range(m.config.num_hidden_layers):
        ff = f"transformer.blocks.{i}.ffn"
        yield _unnamed(m, ff, f"{ff}.up_proj", f"{ff}.down_proj")


def _unnamed(m: Any, name: str, up: str, down: str) -> Group:
    """The neurons of an MLP of two layers whose width no stock config can say."""
    return Group(
        name, "neurons", width(m, up), writes=outputs(m, up), reads=inputs(m, down)
    )


def phi3(m: Any) -> Iterator[Group | Refused]:
    """Fused (all q, all k, all v) and fused (gate, up)."""
    c, d = m.config, head_size(m.config)
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
