"""A cut by Torch-Pruning, with the importances that it has for linear layers.

`magnitude-l2` is what its example for language models uses; `taylor` and `hessian` are its
gradient-based ones, after a backward pass over all calibration blocks; `taylor-3-steps` prunes in
three steps with gradients taken anew, as its guide does. Only the up and gate projections may
lose channels (every other layer is ignored, heads stay), each layer by itself. Twice a setting is
helped:

* GroupHessianImportance.accumulate_grad of 1.6.1 replaces what it holds by the last gradient
  (it looks names up among parameters). `hessian` is as released; `hessian-mended` is handed the
  sum over all sequences that it documents.
* ActivationImportance keeps the last forward pass only, so it is given all blocks in one pass.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cut
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def importances() -> dict[str, tuple[Callable[[], Any], str | None]]:
    """Setting -> its importance, and which gradients that needs."""
    from torch_pruning.pruner import importance as i

    return {
        "magnitude-l2": (lambda: i.GroupMagnitudeImportance(p=2), None),
        "magnitude-l1": (lambda: i.GroupMagnitudeImportance(p=1), None),
        "activation": (lambda: i.ActivationImportance(target_types=[nn.Linear]), None),
        "taylor": (lambda: i.GroupTaylorImportance(), "sum"),
        "taylor-first": (lambda: i.GroupTaylorImportance(group_reduction="first"), "sum"),
        "taylor-max": (lambda: i.GroupTaylorImportance(group_reduction="max"), "sum"),
        "taylor-multivariable": (lambda: i.GroupTaylorImportance(multivariable=True), "sum"),
        "hessian": (lambda: i.GroupHessianImportance(), "last"),
        "hessian-mended": (lambda: i.GroupHessianImportance(), "squares"),
        "taylor-3-steps": (lambda: i.GroupTaylorImportance(), "sum"),
    }


def main() -> None:
    """Cut and save."""
    import torch_pruning as tp

    known = importances()
    args = cut.options(list(known))
    make, needs = known[args.setting]
    steps = 3 if args.setting == "taylor-3-steps" else 1
    tokens = cut.tokens_of(args.calibration)
    model = cut.model_of(args.model)
    importance = make()
    seconds: dict[str, float] = {}
    peak = give_gradients(model, tokens, needs, importance, args, seconds)
    with cut.clock(seconds, "cut"):
        if args.setting == "activation":
            with torch.no_grad(), cut.autocast(args.bf16), importance.compute_importance(model):
                model.model(input_ids=tokens, use_cache=False)
        width = model.config.intermediate_size
        may_go = {m for n, m in model.named_modules() if n.endswith((".gate_proj", ".up_proj"))}
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=tokens[:1, :8],
            importance=importance,
            global_pruning=False,
            # It rounds the number kept down; half a neuron more keeps that from being one less.
            pruning_ratio=1 - (args.keep + 0.5) / width,
            iterative_steps=steps,
            ignored_layers=[
                m for m in model.modules()
                if isinstance(m, nn.Linear | nn.Embedding) and m not in may_go
            ],
            prune_num_heads=False,
            prune_head_dims=False,
            output_transform=lambda out: out.logits,
        )  # fmt: skip
        for step in range(steps):
            if step:
                model.zero_grad()
                backward(model, tokens, args)
            pruner.step()
        model.zero_grad(set_to_none=True)
        model.config.intermediate_size = args.keep
    peak = max(peak, cut.peak_bytes())
    cut.save(model, args.out, tool="torch-pruning", seconds=seconds, peak=peak)


def give_gradients(
    model: Any, tokens: Tensor, needs: str | None, importance: Any, args: Any,
    seconds: dict[str, float],
) -> int:  # fmt: skip
    """The gradients that the importance reads, from the shared folder if they are there.

    Returns the peak memory of the process that made them; their seconds count as this cut's.
    """
    if needs is None:
        return 0
    file: Path = args.shared / f"{needs}.safetensors"
    about = file.with_suffix(".json")
    if not about.exists():
        with cut.clock(seconds, "gradients"):
            made = gradients(model, tokens, needs, args)
        args.shared.mkdir(parents=True, exist_ok=True)
        save_file(made, file)
        about.write_text(json.dumps({"seconds": seconds["gradients"], "peak": cut.peak_bytes()}))
    told = json.loads(about.read_text())
    seconds["gradients"] = told["seconds"]
    found = load_file(file)
    for name, parameter in model.named_parameters():
        parameter.grad = found[name]
    if needs == "last":
        importance.accumulate_grad(model)
    elif needs == "squares":
        importance._accu_grad = {p: p.grad.clone() for p in model.parameters()}
        importance._counter = {p: len(tokens) for p in model.parameters()}
    return int(told["peak"])


def gradients(model: Any, tokens: Tensor, needs: str, args: Any) -> dict[str, Tensor]:
    """Per parameter: the sum over batches, the last sequence's, or the sum of squares over all."""
    if needs == "sum":
        backward(model, tokens, args)
        return {name: p.grad for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sequence in tokens[-1:] if needs == "last" else tokens:
        model.zero_grad()
        loss_of(model, sequence[None], args).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad if needs == "last" else p.grad.square()
    return sums


def backward(model: Any, tokens: Tensor, args: Any) -> None:
    """Add up the gradients of the mean loss of every batch."""
    for batch in tokens.split(args.batch_size):
        loss_of(model, batch, args).backward()


def loss_of(model: Any, batch: Tensor, args: Any) -> Tensor:
    """The model's own loss."""
    with cut.autocast(args.bf16):
        loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


if __name__ == "__main__":
    main()
