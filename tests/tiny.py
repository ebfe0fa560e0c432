"""A tiny model of every declared architecture, with weights large enough to tell what is right."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_narrow.families import find_groups
from llm_narrow.units import Group, Keep, Slice

VOCAB = 64
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
GATED = {"num_key_value_heads": 2, "intermediate_size": 48}
# Every token goes to every expert: what no small change of the weights can alter.
ROUTED = {**GATED, "num_experts_per_tok": 3}
LATENT = {
    **ROUTED, "num_key_value_heads": 4, "n_routed_experts": 3, "n_shared_experts": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 6,
}
CONFIGS: dict[str, dict[str, object]] = {
    "bloom": {"hidden_size": 16},  # its MLP is always four times as wide
    "cohere": {**GATED, "use_qk_norm": True, "logit_scale": 0.5},
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "n_group": 1, "topk_group": 1},
    "falcon": {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {**GATED, "head_dim": 8},
    "gemma2": {**GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {**GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt2": {"n_inner": 48},
    "gpt_bigcode": {"n_inner": 48, "multi_query": False},
    "gpt_neo": {
        "intermediate_size": 48, "attention_types": [[["global", "local"], 1]], "window_size": 4,
    },
    "gpt_neox": {"intermediate_size": 48},
    "gptj": {"n_inner": 48, "rotary_dim": 4},
    "granite": {
        **GATED, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "llama": {**GATED, "tie_word_embeddings": True},
    "mistral": {**GATED, "head_dim": 8},
    "mixtral": {**ROUTED, "num_local_experts": 3},
    "mpt": {"hidden_size": 16, "max_seq_len": 64},
    "nemotron": {**GATED, "attention_bias": True, "mlp_bias": True},
    "olmo": {**GATED, "clip_qkv": 3.0},
    "olmo2": GATED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": GATED,
    "phi3": GATED,
    "qwen2": GATED,
    "qwen2_moe": {
        **ROUTED, "num_experts": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3": {**GATED, "head_dim": 16},
    "qwen3_moe": {**ROUTED, "num_experts": 3, "moe_intermediate_size": 32, "head_dim": 16},
    "smollm3": {**GATED, "no_rope_layers": [1, 0]},
    "stablelm": {**GATED, "use_qkv_bias": True},
    "starcoder2": {**GATED, "use_bias": True, "sliding_window": None},
}

# What a config can change about where the units are, by the name that the page of architectures
# gives to it.
ALIBI = {"alibi": True, "new_decoder_architecture": False, "ffn_hidden_size": 48}
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "deepseek_v2, experts to spare": (
        "deepseek_v2", {"n_routed_experts": 6, "num_experts_per_tok": 2, "q_lora_rank": None}
    ),
    "deepseek_v2, group-limited router": (
        "deepseek_v2",
        {"n_routed_experts": 6, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy",
         "n_group": 3, "topk_group": 2},
    ),
    "deepseek_v3, group-limited router": (
        "deepseek_v3",
        {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2},
    ),
    "falcon, ALiBi": ("falcon", {**ALIBI, "multi_query": False, "num_kv_heads": None}),
    "falcon, multi-query": ("falcon", {"new_decoder_architecture": False}),
    "falcon, one key/value head per head": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None,
         "bias": True, "parallel_attn": False},
    ),
    "gpt_bigcode, multi-query": ("gpt_bigcode", {"multi_query": True}),
    "granite, multipliers of Llama": (
        "granite",
        {"residual_multiplier": 1.0, "attention_multiplier": 8**-0.5, "logits_scaling": 1.0},
    ),
    "mixtral, experts to spare": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "phi, norms of queries and keys": ("phi", {"qk_layernorm": True}),
    "qwen2_moe, experts to spare": (
        "qwen2_moe", {"num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    ),
    "qwen3_moe, experts to spare": (
        "qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
    ),
    "stablelm, norms of queries and keys": ("stablelm", {"qk_layernorm": True}),
    "stablelm, parallel residual": ("stablelm", {"use_parallel_residual": True}),
}


def tiny(kind: str, *, seed: int = 0, std: float = 0.3, **changes: object) -> nn.Module:
    """A model of the kind with normal(0, std) weights; default ones give logits too small to tell.

    `changes` go to its config.
    """
    torch.manual_seed(seed)
    if kind == "mlp":
        m: nn.Module = nn.Sequential(
            nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3)
        )
    else:
        m = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**SHARED, **CONFIGS.get(kind, {}), **changes})
        )
        if hasattr(m, "set_experts_implementation") and "experts" in str(m):
            m.set_experts_implementation("eager")  # the usual one has no float64
    for p in m.parameters():
        nn.init.normal_(p, std=std)
    return m.eval()


def batch(kind: str, *, seed: int = 1, rows: int = 2, length: int = 9) -> Tensor:
    """Inputs for a model of the kind: token ids (rows, length), or (5, 6) floats for an MLP."""
    g = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        return torch.randn(5, 6, generator=g)
    return torch.randint(3, VOCAB, (rows, length), generator=g)


@torch.no_grad()
def outputs(m: nn.Module, kind: str) -> Tensor:
    """The logits of the model on `batch(kind)`, in the model's own precision."""
    if kind == "mlp":
        return m(batch(kind).to(next(m.parameters()).dtype))
    return m(batch(kind)).logits


def uneven(groups: Sequence[Group], *, seed: int = 0, share: float = 0.6) -> Keep:
    """A random decision: of each group at least one unit stays and, where it has two, one goes."""
    g = torch.Generator().manual_seed(seed)
    keep = {x.name: torch.rand(x.size, generator=g) < share for x in groups}
    for x in groups:
        order = torch.randperm(x.size, generator=g)
        keep[x.name][order[0]] = False
        keep[x.name][order[-max(x.least, 1) :]] = True
    return keep


def even(
    groups: Sequence[Group], *, neurons: int = 0, heads: int = 0, experts: int = 0, seed: int = 0
) -> Keep:
    """A random decision that takes so many units of each kind from every group."""
    g = torch.Generator().manual_seed(seed)
    keep = {}
    taken = {"neurons": neurons, "heads": heads, "experts": experts}
    for x in groups:
        keep[x.name] = torch.ones(x.size, dtype=torch.bool)
        keep[x.name][torch.randperm(x.size, generator=g)[: taken[x.kind]]] = False
    return keep


def parts(kind: str, **changes: object) -> tuple[nn.Module, list[Group], dict[str, nn.Parameter]]:
    """A tiny model, its groups and its parameters by name."""
    model = tiny(kind, **changes)
    return model, find_groups(model), dict(model.named_parameters())


def two_units() -> tuple[list[Group], dict[str, Tensor]]:
    """Two units of three entries, norms 5 and 13: (3, 0; 4) and (0, 12; 5)."""
    params = {"in": torch.tensor([[3.0, 0.0], [0.0, 12.0]]), "out": torch.tensor([[4.0, 5.0]])}
    for p in params.values():
        p.requires_grad_()
    return [Group("g", "neurons", 2, (Slice("in", 0),), (Slice("out", 1),))], params
