"""Mixtures of experts: the neurons inside the experts, and whole experts.

transformers 5 holds the experts of a layer in two tensors, `gate_up_proj` (experts, gate|up,
hidden) and `down_proj` (experts, hidden, neurons), so that all have the same number of neurons.
Neuron `u` of a layer is therefore the u-th neuron of every one of its experts. An expert is its
slab of both tensors and its row of the router, who chooses among those that are left.
"""

from collections.abc import Iterator
from typing import Any

from .families_dense import attention, gated
from .families_slices import Refused, has, inputs, outputs, width
from .units import Group, Slice

LIMITED = (
    "the router first chooses among groups of experts that lie side by side, so that removing one "
    "would shift the others into other groups"
)
CORRECTED = "the router corrects its choice by a buffer with a number for each expert"


def mixtral(m: Any) -> Iterator[Group | Refused]:
    """Every layer has experts."""
    for i in range(m.config.num_hidden_layers):
        yield from experts(
            m, f"model.layers.{i}.mlp", width_key="intermediate_size", key="num_local_experts"
        )
        yield attention(m, f"model.layers.{i}.self_attn")


def qwen_moe(m: Any) -> Iterator[Group | Refused]:
    """Layers with experts, for Qwen 2 with a shared one that serves every token, and without."""
    key = m.config.attribute_map.get("num_experts", "num_experts")
    for i in range(m.config.num_hidden_layers):
        ff = f"model.layers.{i}.mlp"
        if has(m, f"{ff}.experts"):
            yield from experts(m, ff, width_key="moe_intermediate_size", key=key)
            if has(m, f"{ff}.shared_expert"):  # times a gate of its own, hence not added as it is
                key_ = "shared_expert_intermediate_size"
                yield gated(m, f"{ff}.shared_expert", key=key_, added=False)
        else:
            yield gated(m, ff)
        yield attention(m, f"model.layers.{i}.self_attn")


def deepseek(m: Any) -> Iterator[Group | Refused]:
    """Latent attention: keys and values of all heads grow out of one small vector."""
    c = m.config
    corrected = c.model_type == "deepseek_v3"
    limited = corrected or c.topk_method != "greedy"
    if limited:
        yield Refused("experts", CORRECTED if corrected and c.n_group == 1 else LIMITED)
    for i in range(c.num_hidden_layers):
        ff, at = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
        if has(m, f"{ff}.experts"):
            # The shared experts run last, so that their refit mends the stream for both.
            found = experts(
                m, ff, width_key="moe_intermediate_size", key="n_routed_experts", added=False
            )
            yield from (g for g in found if g.kind != "experts" or not limited)
            # As wide as `n_shared_experts` of the others, and config.json has one key for both.
            shared = f"{ff}.shared_experts"
            yield gated(m, shared, key="moe_intermediate_size", block=c.n_shared_experts)
        else:
            yield gated(m, ff)
        query = f"{at}.q_proj" if has(m, f"{at}.q_proj") else f"{at}.q_b_proj"
        turned = c.qk_nope_head_dim + c.qk_rope_head_dim
        grown = c.qk_nope_head_dim + c.v_head_dim
        yield Group(
            at, "heads", width(m, query) // turned,
            writes=outputs(m, query, turned) + outputs(m, f"{at}.kv_b_proj", grown),
            reads=inputs(m, f"{at}.o_proj", c.v_head_dim),
            # Version 3 takes the `head_dim` that goes with fewer heads for its rotary part.
            config=None if corrected else (("num_key_value_heads", 1), ("num_attention_heads", 1)),
        )


def experts(
    m: Any, name: str, *, width_key: str, key: str, added: bool = True
) -> Iterator[Group]:
    """The neurons of a layer's experts and, where one can go, the experts.

    `width_key` and `key` are what config.json calls the numbers of neurons and of experts. A token
    is given to `num_experts_per_tok` experts, so that so many have to stay.
    """
    up, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    number, _, neurons = m.get_parameter(down).shape
    least = m.config.num_experts_per_tok
    yield Group(
        f"{name}.experts", "neurons", neurons,
        writes=(Slice(up, 1), Slice(up, 1, start=neurons)), reads=(Slice(down, 2),),
        config=((width_key, 1),),
        added=added,
    )
    if number > least:
        yield Group(
            f"{name}.gate", "experts", number,
            writes=(Slice(f"{name}.gate.weight", 0), Slice(up, 0)), reads=(Slice(down, 0),),
            sizes=((f"{name}.gate.num_experts", 1), (f"{name}.experts.num_experts", 1)),
            config=((key, 1),),
            added=added,
            least=least,
        )
