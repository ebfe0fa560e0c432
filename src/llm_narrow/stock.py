"""Which stock configuration says what is left of a model."""

from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from .units import Group, Keep

WIDE = "norm_width"  # in a config: how many channels norms take the mean of, where fewer are left


def uniform_config(original: Any, groups: Sequence[Group], whole: Keep, keep: Keep) -> Any | None:
    """The config of a stock class that says what is left; None if there is none."""
    if getattr(original, WIDE, None):
        return None
    sizes: dict[str, int] = {}
    for g in groups:
        left = int(keep[g.name].sum())
        if not left:  # a half of a layer is gone
            return None
        if g.config is None:
            if left < len(whole[g.name]):
                return None
            continue
        for key, per_unit in g.config:
            if sizes.setdefault(key, per_unit * left) != per_unit * left:
                return None
        if queries := dict(g.config).get("num_attention_heads"):
            # Left unsaid it is hidden_size / num_attention_heads, which is false once heads go.
            sizes["head_dim"] = g.reads[0].block // queries
    for kind, fields in _stock_classes(public(original), sizes):
        try:
            config = AutoConfig.for_model(kind, **fields)
            config.validate()
        except StrictDataclassError:
            continue
        return config
    return None


def _stock_classes(
    original: dict[str, Any], sizes: dict[str, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The model types, with the fields of their configs, that compute what the original does."""
    fields = {**original, **sizes}
    kind = fields.pop("model_type")
    yield kind, fields
    if kind != "llama":
        return
    # Llama refuses a hidden size that the number of heads does not divide; these do not.
    fields = {key: fields[key] for key in fields if key not in ("architectures", "pretraining_tp")}
    if not (fields.get("attention_bias") or fields.get("mlp_bias")):
        plain = {key: fields[key] for key in fields if key not in ("attention_bias", "mlp_bias")}
        yield "mistral", {**plain, "sliding_window": None}
    yield "granite", {
        **fields,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": fields["head_dim"] ** -0.5,
    }


def public(config: Any) -> dict[str, Any]:
    """The fields of a config, but for where on this machine it came from."""
    fields: dict[str, Any] = config.to_dict()
    fields.pop("_name_or_path", None)
    return fields
