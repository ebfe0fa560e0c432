"""What a comparison costs: the operations of each run, and how long all of them will take.

A training step is three forward passes of what learns (four with activation checkpointing), and
one of its teacher. Before it, scoring by gradients takes about two passes of the whole model, and
the refit two of the whole and two of the narrowed one, its statistics and solutions included.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import distill
from .blocks import Blocks
from .compare_shapes import METHODS, Asked, Attempt, Cell, Shape, fresh, recipe_of, trained_tokens
from .inputs import Inputs
from .losses import Loss, language_loss
from .recipe import Recipe
from .report import at
from .scores import GRADIENT_FREE


@dataclass(frozen=True)
class Prices:
    """FLOPs of a forward pass over one token of a block, and the parameters of the whole model."""

    parameters: int
    whole: float
    teacher: float


@dataclass(frozen=True)
class Flops:
    """Operations of a run: of all its scores, refit and training, and of a token trained on."""

    score: float
    refit: float
    training: float
    lasso: float  # for a token, while the model is still whole
    recover: float  # for a token after that


@dataclass(frozen=True)
class Forecast:
    """What is to be done. FLOPs and tokens are of all runs, seconds of those that are left."""

    sweeps: int
    runs: int
    sweeps_done: int
    runs_done: int
    tokens: int
    flops: float
    bytes: int  # of weights that are kept on the disk
    seconds: float | None  # None where nothing was timed
    timed: str  # what the seconds follow from


def run_flops(recipe: Recipe, shape: Shape, method: str, prices: Prices) -> Flops:
    """The operations of a run of the recipe."""
    lasso, after = trained_tokens(recipe)
    passes = 4 if recipe.train.checkpointing else 3
    teacher = 0.0 if recipe.train.distill == "none" else prices.teacher
    drawn, recovered = passes * prices.whole + teacher, passes * shape.flops + teacher
    training = lasso * drawn + after * recovered
    if METHODS[method]:
        return Flops(0.0, 0.0, training, 0.0, recovered)
    score = 0.0 if recipe.score.criterion in GRADIENT_FREE else 2 * prices.whole
    refit = 0.0 if recipe.prune.refit == "none" else 2 * (prices.whole + shape.flops)
    scored, refitted = recipe.score.tokens * score, recipe.tokens_to_refit * refit
    return Flops(scored, refitted, training, drawn if lasso else 0.0, recovered)


def forecast(
    asked: Asked, recipe: Recipe, shapes: Mapping[str, Shape], prices: Prices, out: Path,
    *, tried: Sequence[Attempt] = (), rate: float | None = None, jobs: int = 1,
) -> Forecast:  # fmt: skip
    """What the comparison in the folder `out` takes, and what is left of it.

    `tried` are the attempts that are done. `rate` in FLOP per second, of one process of `jobs`,
    holds where no run is finished that could tell it.
    """
    cells = asked.cells(recipe.seed)
    first = {(c.method, c.size): c for c in cells if c.seed == recipe.seed}
    attempts = [a for cell in first.values() for a in asked.attempts(cell)]
    done = [c for c in cells if (out / c.name / "manifest.json").is_file()]
    sweeps_done = [a for a in attempts if a in tried]

    scored: set[int] = set()  # seeds whose scores are there by then, for all methods and sizes

    def work(one: Cell | Attempt) -> tuple[int, float]:
        tried_only = isinstance(one, Attempt)
        shape = shapes[one.size]
        settled = recipe_of(
            recipe, asked, shape, one.method, seed=recipe.seed, lr=asked.lrs[0],
            share=asked.sweep_share if tried_only else 1.0,
        )  # fmt: skip
        tokens = sum(trained_tokens(settled))
        flops = run_flops(settled, shape, one.method, prices)
        # Refitted weights are shared by the rates of a sweep and the run after it.
        before = 0.0 if tried_only and one.method != "lasso" else flops.refit
        seed = one.seed if isinstance(one, Cell) else recipe.seed
        if flops.score and seed not in scored:
            scored.add(seed)
            before += flops.score
        return tokens, before + flops.training + _validations(settled, shape)

    each: list[Cell | Attempt] = [*attempts, *cells]
    all_work = {one: work(one) for one in each}
    left = [one for one in all_work if one not in done and one not in sweeps_done]
    measured = _rate([out / c.name for c in done])
    timed = "finished runs" if measured else "a timed step" if rate else "nothing timed"
    rate = measured or rate
    return Forecast(
        len(attempts), len(cells), len(sweeps_done), len(done),
        tokens=sum(tokens for tokens, _ in all_work.values()),
        flops=sum(flops for _, flops in all_work.values()),
        bytes=sum(4 * shapes[cell.size].parameters for cell in cells),
        seconds=_longest(left, all_work, jobs) / rate if rate else None,
        timed=timed,
    )  # fmt: skip


def _longest(
    left: Sequence[Cell | Attempt], work: Mapping[Cell | Attempt, tuple[int, float]], jobs: int
) -> float:
    """FLOPs of the process with the most of them; those of a method and size are done by one."""
    together: dict[tuple[str, str], float] = {}
    for one in left:
        key = one.method, one.size
        together[key] = together.get(key, 0.0) + work[one][1]
    each = [0.0] * jobs
    for flops in together.values():  # in turn, to the process that is free first
        each[each.index(min(each))] += flops
    return max(each)


def timed_rate(
    asked: Asked, recipe: Recipe, start: Inputs, shapes: Mapping[str, Shape], prices: Prices,
    blocks: Blocks,
) -> float:  # fmt: skip
    """FLOP per second, from one step at the largest size after one that is not timed."""
    shape = max(shapes.values(), key=lambda s: s.parameters)
    method = next((m for m in asked.methods if m != "scratch"), "scratch")
    settled = recipe_of(recipe, asked, shape, method, seed=recipe.seed, lr=asked.lrs[0])
    taught = settled.train.distill != "none"
    loss: Loss = language_loss
    if taught:  # by the whole model, which is at hand, whatever the teacher will be
        loss = distill.distill_loss(start.loaded.model, bf16=start.bf16)
    model = fresh(shape, recipe.seed).to(start.device).train()
    batch = blocks.tokens[: recipe.blocks.batch_size].long().to(start.device)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(start.device.type, torch.bfloat16, enabled=start.bf16):
            total = loss(model, batch)
        total.backward()
        float(total.detach())  # waits for a GPU
        model.zero_grad()
        seconds = time.perf_counter() - began
    return batch.numel() * (3 * shape.flops + (prices.whole if taught else 0.0)) / seconds


def _validations(recipe: Recipe, shape: Shape) -> float:
    """FLOPs of all that is measured on the way, and of the measurement at the end."""
    per_step = recipe.blocks.batch_size * recipe.train.accumulation * recipe.blocks.length
    times = sum(trained_tokens(recipe)) / per_step / recipe.train.evaluate_every + 2
    tokens = times * recipe.train.validation_tokens + recipe.measure.held_out_tokens
    return tokens * shape.flops


def _rate(folders: Sequence[Path]) -> float | None:
    """FLOP per second of training in finished runs; their validations make it a little low."""
    flops, seconds = 0.0, 0.0
    for folder in folders:
        manifest: Any = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        flops += float(at(manifest, "compare", "flops", "training") or 0.0)
        for part in ("lasso", "recover"):
            seconds += float(at(manifest, part, "seconds") or 0.0)
    return flops / seconds if flops and seconds else None
