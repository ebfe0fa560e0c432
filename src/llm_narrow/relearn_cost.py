"""What a relearning audit takes: operations of each training, and how long all of them will be.

A training step is three forward passes (four with activation checkpointing).
"""

from collections.abc import Sequence

from .compare_cost import Forecast
from .compare_shapes import tokens_per_step
from .recipe import Recipe
from .relearn_answers import Subject
from .relearn_cells import Ground, attempt_name, cell_name, places, steps_of
from .report import read_manifest

PASSES = 3


def forecast(ground: Ground, subjects: Sequence[Subject], rate: float | None) -> Forecast:
    """What the audit takes, and what is left; finished trainings say how long, else `rate`."""
    asked = ground.asked
    steps = steps_of(ground.recipe, asked.tokens)
    lrs = asked.lrs if len(asked.lrs) > 1 else ()
    sweeps = {attempt_name(s, lr): _attempt_flops(ground, s) for s in subjects for lr in lrs}
    cells = {
        cell_name(s, seed): _cell_flops(ground, s, steps)
        for s in subjects for seed in seeds_of(ground)
    }  # fmt: skip
    every = sweeps | cells
    ready = [name for name in every if done(ground, name)]
    seconds = flops = 0.0
    for name in ready:
        told = read_manifest(ground.work.folder / name / "facts.json")
        if told.get("seconds"):
            seconds, flops = seconds + float(told["seconds"]), flops + every[name]
    timed = "finished runs" if seconds else "a timed pass" if rate else "nothing timed"
    rate = flops / seconds if seconds else rate
    attempt = steps_of(ground.recipe, asked.sweep_share * asked.tokens)
    return Forecast(
        len(sweeps), len(cells), len([n for n in ready if n in sweeps]),
        len([n for n in ready if n in cells]),
        tokens=(len(sweeps) * attempt + len(cells) * steps) * tokens_per_step(ground.recipe),
        flops=sum(every.values()),
        bytes=0,
        seconds=sum(f for n, f in every.items() if n not in ready) / rate if rate else None,
        timed=timed,
    )  # fmt: skip


def seeds_of(ground: Ground) -> list[int]:
    """The seeds of the audit."""
    return [ground.recipe.seed + n for n in range(ground.asked.seeds)]


def done(ground: Ground, name: str) -> bool:
    """Whether a training is finished."""
    return (ground.work.folder / name / "facts.json").is_file()


def _cell_flops(ground: Ground, subject: Subject, steps: int) -> float:
    """Operations of a training with all its validations and looks."""
    recipe, test = ground.recipe, ground.test.tokens.numel()
    looks = len(places(steps, ground.asked.points)) + 1
    return subject.flops * (_learning(recipe, steps) + looks * test)


def _attempt_flops(ground: Ground, subject: Subject) -> float:
    """Operations of an attempt."""
    steps = steps_of(ground.recipe, ground.asked.sweep_share * ground.asked.tokens)
    return subject.flops * _learning(ground.recipe, steps)


def _learning(recipe: Recipe, steps: int) -> float:
    """What training and validations come to, in tokens of a forward pass."""
    passes = PASSES + recipe.train.checkpointing
    validations = steps // recipe.train.evaluate_every + 2
    trained = steps * tokens_per_step(recipe)
    return passes * trained + validations * recipe.train.validation_tokens
