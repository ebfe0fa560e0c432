"""Training a few added numbers per layer instead of the weights themselves (LoRA, through peft)."""

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import BadInput, problems
from .families import find_groups


def layers(model: Any) -> list[str]:
    """The names of the linear layers that units live in, of any declared architecture.

    Not those of fused experts and their routers, which are no linear layers, and none without
    weights, as halves of layers have that are gone.
    """
    found = {s.module for g in find_groups(model) if g.size for s in g.slices}
    return sorted(n for n in found if isinstance(model.get_submodule(n), nn.Linear | Conv1D))


def with_lora(model: Any, *, rank: int, alpha: int | None = None) -> Any:
    """Add to every layer that units live in a trainable product of two matrices of rank `rank`.

    In place; everything else is frozen. The product is scaled by alpha / rank; `alpha` None is
    2 x rank. Until trained, the product is zero and the model's outputs are the same. Raises
    BadInput where the rank is below 1 or above the width of a layer.
    """
    targets = layers(model)
    if rank < 1:
        raise BadInput(f"The rank of LoRA must be at least 1, got {rank}.")
    narrow = [
        f"the rank of LoRA must be at most {width}, the width of {name}, got {rank}"
        for name in targets
        if rank > (width := min(model.get_submodule(name).weight.shape))
    ]
    if narrow:
        more = [f"… and {len(narrow) - 3} more layers"] if len(narrow) > 3 else []
        raise problems("LoRA", narrow[:3] + more)
    transposed = {type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=[f"model.{name}" for name in targets],
        fan_in_fan_out=transposed == {True},
    )
    # Inside of something without a config: for models with experts peft takes gate_proj and up_proj
    # for parts of these wherever they are, and leaves them out.
    inject_adapter_in_model(config, nn.ModuleDict({"model": model}))
    return model


def merged(model: Any) -> Any:
    """Add the trained products to the weights they belong to, and leave plain layers, in place.

    All parameters require gradients again. Raises BadInput where a merged weight is not finite.
    """
    added = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in added.items():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise BadInput(
                f"The LoRA weights of {name} cannot be merged: {error}. Train at a lower rate."
            ) from error
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    for p in model.parameters():
        p.requires_grad_()
    return model
