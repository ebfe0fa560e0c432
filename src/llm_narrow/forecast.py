"""What a run will take: time and memory of its parts, as a dry run tells them.

Operations are counted as `compare` counts them: a training step is three forward passes of what
learns (four with activation checkpointing) and one of its teacher, the refit two of the whole
model and two of the narrowed one. Seconds follow from one timed forward pass on this machine.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from . import cost, lora
from .blocks import Blocks
from .inputs import Inputs
from .losses import LEARNT, language_loss
from .plan import Plan
from .recipe import Recipe
from .scores import memory_estimate

# Bytes of a parameter that learns: weight, gradient, two moments and the best weights so far.
LEARNS = 5 * 4


@dataclass(frozen=True)
class Part:
    """A part of a run: tokens that it reads, operations, about how long, and memory at its peak."""

    name: str
    tokens: int
    flops: float
    seconds: float
    bytes: int


def forecast(recipe: Recipe, start: Inputs, plan: Plan, blocks: Blocks) -> tuple[Part, ...]:
    """What follows the plan of a dry run: refit, lasso, recovery, measurement.

    A teacher of its own is taken to be as large as the whole model. On several processes each
    learns from its share of the tokens.
    """
    model = start.loaded.model
    context = recipe.blocks.length // 2  # of a block, a token looks back at half on average
    whole = cost.flops_per_token(model, context=context)
    sizes = cost.size(model).parameters, plan.parameters_after
    gone = sizes[0] - sizes[1]
    narrow = whole - 2.0 * gone - 4.0 * context * _channels_gone(plan)
    per_second = rate(recipe, start, blocks, whole)

    def part(name: str, tokens: int, flops: float, held: int) -> Part:
        return Part(name, tokens, flops, flops / per_second, held)

    def learning(name: str, tokens: int, of: float, size: int, added: int | None = None) -> Part:
        t = recipe.train
        passes = 4 if t.checkpointing else 3
        taught = whole if t.distill != "none" else 0.0
        steps = tokens / (recipe.blocks.batch_size * t.accumulation * recipe.blocks.length)
        looked = (steps / t.evaluate_every + 2) * t.validation_tokens
        return part(name, tokens, tokens * (passes * of + taught) + looked * of,
                    _learning_bytes(recipe, start, sizes[0], size, added))  # fmt: skip

    parts: list[Part] = []
    calibration = recipe.tokens_to_refit
    scoring = memory_estimate(
        model, start.groups, batch_size=recipe.blocks.batch_size, length=recipe.blocks.length,
        criterion=recipe.score.criterion,
    )  # fmt: skip
    if recipe.prune.method == "lasso":
        parts.append(learning("lasso", recipe.lasso.tokens, whole, sizes[0]))
    if recipe.prune.refit != "none":
        parts.append(part("refit", calibration, 2 * calibration * (whole + narrow), scoring))
    if recipe.recover.tokens:
        added = _added(recipe, model)
        parts.append(learning("recovery", recipe.recover.tokens, narrow, sizes[1], added))
    tokens = recipe.measure.held_out_tokens
    parts.append(part("measurement, before and after", tokens, tokens * (whole + narrow), scoring))
    return tuple(parts)


@torch.no_grad()
def rate(recipe: Recipe, start: Inputs, blocks: Blocks, flops: float) -> float:
    """FLOP per second of a forward pass over one batch, after one that is not timed."""
    batch = blocks.tokens[: recipe.blocks.batch_size].long().to(start.device)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(start.device.type, torch.bfloat16, enabled=start.bf16):
            float(language_loss(start.loaded.model, batch))  # waits for a GPU
        seconds = time.perf_counter() - began
    return batch.numel() * flops / seconds


def _channels_gone(plan: Plan) -> int:
    """Channels of query heads that go, of all layers."""
    heads = [g for g in plan.groups if g.kind == "heads"]
    return sum(int((~plan.keep[g.name]).sum()) * s.block for g in heads for s in g.reads)


def _added(recipe: Recipe, model: Any) -> int | None:
    """Parameters that LoRA adds, going by the whole model; None where all weights learn."""
    if recipe.recover.method != "lora":
        return None
    weights = [model.get_submodule(name).weight for name in lora.layers(model)]
    return recipe.recover.lora_rank * sum(sum(weight.shape) for weight in weights)


def _learning_bytes(
    recipe: Recipe, start: Inputs, whole: int, size: int, added: int | None
) -> int:
    """What training holds: of every parameter that learns, of the teacher, and activations.

    `size` are the parameters of the model; with LoRA those learn that are `added`.
    """
    model, t = start.loaded.model, recipe.train
    batch = {"batch_size": recipe.blocks.batch_size, "length": recipe.blocks.length}
    scoring = memory_estimate(model, start.groups, criterion="attribution", **batch)
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = scoring - weights
    config: Any = model.config
    if t.checkpointing:  # what enters each layer, and the inside of one
        tokens = recipe.blocks.batch_size * recipe.blocks.length
        entered = tokens * config.hidden_size * config.num_hidden_layers * 4
        activations = entered + activations // config.num_hidden_layers
    logits = LEARNT * config.vocab_size * 3 * 4
    teacher = {"none": 0, "cached": 0, "teacher": 2 if start.bf16 else 4}[t.distill] * whole
    learning = LEARNS * size if added is None else 4 * size + LEARNS * added
    held: int = learning + teacher + activations + logits
    return held
