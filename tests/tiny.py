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
CONFIGS: dict[str, dict[str, object]] = {
    "gemma3_text": {**GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"intermediate_size": 48},
    "llama": {**GATED, "tie_word_embeddings": True},
    "mistral": {**GATED, "head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": GATED,
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 16},
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
        keep[x.name][order[-1]] = True
    return keep


def even(groups: Sequence[Group], *, neurons: int = 0, heads: int = 0, seed: int = 0) -> Keep:
    """A random decision that takes so many units of each kind from every group."""
    g = torch.Generator().manual_seed(seed)
    keep = {}
    for x in groups:
        keep[x.name] = torch.ones(x.size, dtype=torch.bool)
        taken = neurons if x.kind == "neurons" else heads
        keep[x.name][torch.randperm(x.size, generator=g)[:taken]] = False
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
