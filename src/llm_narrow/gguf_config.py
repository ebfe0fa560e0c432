"""Which configs llama.cpp computes as transformers does, and as what."""

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig

from . import channels
from .checkpoint import layout
from .errors import BadInput, problems

# Mistral, and granite with its multipliers at 1, compute what llama does.
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "granite": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
}
PAIRED = (MODEL_ARCH.LLAMA, MODEL_ARCH.DECI)  # rotary pairs side by side, not half a head apart
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # all of them one there


def config_of(folder: Path) -> Any:
    """The config of what the folder computes. Raises BadInput for what llama.cpp would not."""
    uneven = layout(folder) == "uneven"
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        if uneven:
            fields["model_type"] = fields["narrow"]["of"]
            if channels.NAME in fields["narrow"]:
                raise BadInput(
                    f"{folder}: its norms take the mean over channels that are gone, which "
                    "llama.cpp does not know. Prune without --channels for GGUF."
                )
        kind = str(fields["model_type"])
        if kind not in ARCHITECTURES:
            raise BadInput(
                f"{folder}: model type {kind!r} cannot be written as GGUF yet. "
                f"Known: {', '.join(sorted(ARCHITECTURES))}."
            )
        config = AutoConfig.for_model(**fields)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise BadInput(f"{folder}/config.json is damaged: {reason}") from error
    if found := _strange(config):
        raise problems(f"{folder} would be computed otherwise by llama.cpp", found)
    return config


def _strange(c: Any) -> list[str]:
    """What in the config llama.cpp has no way of computing, or computes without being told."""
    found, neox = [], c.model_type == "gpt_neox"
    known = GELU if neox else ("silu", "swish")
    if c.hidden_act not in known:
        found.append(f"hidden_act is {c.hidden_act!r}; it has to be {known[0]!r}")
    window = getattr(c, "sliding_window", None)
    if window and getattr(c, "use_sliding_window", True) and window < c.max_position_embeddings:
        found.append(f"sliding_window is {window}; it has to be null: attention to all tokens")
    rope = c.rope_parameters
    scaled = rope.get("rope_type", "default")
    allowed = ("default", "llama3") if ARCHITECTURES[c.model_type] in PAIRED else ("default",)
    if scaled not in allowed:
        found.append(f"rope_type is {scaled!r}; it has to be {' or '.join(map(repr, allowed))}")
    if not neox and rope.get("partial_rotary_factor", 1) != 1:
        found.append("partial_rotary_factor has to be 1: whole heads are rotated")
    if c.model_type == "qwen3" and c.attention_bias:
        found.append("attention_bias has to be false")
    if c.model_type == "granite":
        neutral = {"embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1}
        for key, value in {**neutral, "attention_multiplier": head_size(c) ** -0.5}.items():
            if abs(getattr(c, key) - value) > 1e-6:
                found.append(f"{key} is {getattr(c, key)}; it has to be {value:g}, as in llama")
    return found


def head_size(config: Any) -> int:
    """How many dimensions a head has."""
    own = None if config.model_type == "gpt_neox" else getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> Tensor:
    """By what llama.cpp divides the rotary frequencies of a head, (d / 2,); empty where by none.

    Llama 3.1's rule: wavelengths that fit `high` times into the original context stay, those that
    fit `low` times are stretched by `factor`, those between by what lies between.
    """
    rope, d = config.rope_parameters, head_size(config)
    if rope.get("rope_type", "default") == "default":
        return torch.empty(0)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    powers: Tensor = rope["rope_theta"] ** (torch.arange(0, d, 2).double() / d)
    fits = rope["original_max_position_embeddings"] / (2 * torch.pi * powers)
    stay: Tensor = ((fits - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal(stay + (1 - stay) / rope["factor"]).float()
