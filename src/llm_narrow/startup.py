"""What a training run checks and sets up before its first step, and how it refuses to go on."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from . import state as states
from .errors import BadInput, NarrowError, UnknownName
from .settings import Settings


def adamw(params: Mapping[str, Tensor], s: Settings) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": s.weight_decay},
        {"params": [p for p in params.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in params.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], s.lr, s.betas, fused=fused)


def learned(model: Any) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def check_weights(params: Mapping[str, Tensor]) -> None:
    """Raise BadInput where there is nothing to train, or not in float32."""
    if not params:
        raise BadInput("No parameter of the model requires a gradient: nothing can be trained.")
    for name, p in params.items():
        if p.dtype != torch.float32:
            raise BadInput(
                f"Training needs float32 weights, {name} is {str(p.dtype).removeprefix('torch.')}. "
                "Load the model in float32; bf16 then still computes in bfloat16."
            )


def check_processes(running: int, expected: int | None) -> None:
    """Raise NarrowError where processes do not know of each other, or Accelerate is to shard.

    Several ways to start two end, without a word, in one process or in two unconnected trainings.
    `expected` None is what torchrun says. Accelerate on CPUs takes FSDP for DDP as silently.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise NarrowError(
                f"ACCELERATE_USE_{name} is set, and training shards by itself (FSDP2) where it is "
                "asked to. Leave it out of the configuration of accelerate."
            )
    wanted = expected or int(os.environ.get("WORLD_SIZE", "1"))
    if running != wanted:
        raise NarrowError(
            f"{wanted} processes were asked for, and this one knows of {running}. On CPUs start "
            f"them with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node {wanted} …` "
            "(`accelerate launch --cpu` starts one only), on GPUs with "
            f"`accelerate launch --num_processes {wanted} …`."
        )


def tracker_names(names: Sequence[str] | None, logs: Path | None) -> list[str]:
    """The trackers to use; for None tensorboard where it is installed and there are logs."""
    there = {str(name) for name in get_available_trackers()}
    if names is None:
        return ["tensorboard"] if logs is not None and "tensorboard" in there else []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UnknownName("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in there:
            raise BadInput(f"Tracker {name!r} is not installed: pip install {name}.")
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and logs is None:
            raise BadInput(f"Tracker {name!r} writes files: give it a folder for logs.")
    return list(names)


@contextmanager
def training(model: Any, settings: Settings) -> Iterator[None]:
    """The model in training mode, with or without activation checkpointing; then as it was."""
    was = model.training
    model.train()
    if settings.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise BadInput(
                f"{type(model).__name__} has no activation checkpointing. Leave it off."
            )
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    try:
        yield
    finally:
        if settings.checkpointing:
            model.activation_checkpointing_disable()
        model.train(was)


def cut_rows(rows: Path, step: int) -> None:
    """Drop the rows after the step, and a last one that was not written to its end."""
    if not rows.exists():
        rows.parent.mkdir(parents=True, exist_ok=True)
        return
    lines = rows.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    fresh = rows.with_name(f".{rows.name}.{os.getpid()}")
    fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    fresh.replace(rows)


def not_finite(
    step: int, steps: int, loss: float, norm: float, lr: float, state: Path | None
) -> NarrowError:
    """The error for a step whose loss or gradient norm is not finite."""
    last = states.latest(state) if state else None
    kept = "No state was saved." if last is None else f"The state of step {last} is kept."
    return NarrowError(
        f"Step {step} of {steps}: the loss is {loss:.4g} and the norm of its gradient {norm:.4g}; "
        f"both must be finite. The step was not taken. {kept} "
        f"Lower the learning rate ({lr:g}), or warm up for longer."
    )
