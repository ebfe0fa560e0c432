"""One run of a comparison, from the weights that it begins with to its run folder.

All are trained by the same loop on the same blocks in the same order, and validated on the same
blocks of the calibration part, which nothing is scored or refitted on. Methods differ in nothing
but the weights that they begin with and the loss that they learn by.
"""

import copy
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import inputs, outcome, removal, scoring, stages, train, training, work
from .blocks import Blocks
from .cache import written_whole
from .claims import claimed
from .compare_cost import Prices, run_flops
from .compare_shapes import (
    METHODS,
    Asked,
    Attempt,
    Cell,
    Shape,
    check_shape,
    fresh,
    recipe_of,
    tokens_per_step,
    trained_tokens,
)
from .errors import BadInput, NarrowError
from .families import find_groups
from .inputs import Inputs
from .manifest import Clock, begun
from .outcome import Before
from .plan import Plan
from .progress import Track
from .recipe import Recipe
from .training import Lessons, Text
from .units import Group, Keep, keep_all
from .work import Work

# Parts that runs take from each other, as they do not depend on the learning rate. What the lasso
# leaves does depend on it.
TEACHER, REFITTED = "teacher-loss", "refitted"


@dataclass(frozen=True)
class Ground:
    """What all runs of a comparison share. `start` holds no model: each run loads its own."""

    asked: Asked
    recipe: Recipe
    start: Inputs
    shapes: Mapping[str, Shape]
    prices: Prices
    train: Blocks
    calibration: Blocks  # of which some are scored and refitted on
    validation: Blocks  # of the calibration part too, of other documents
    work: Work  # of the comparison; its place is the folder of all runs
    command: str
    console: Console
    track: Track
    jobs: int = 1  # processes that share the runs


@dataclass(frozen=True)
class Made:
    """A trained model, with what `checkpoint.save` has to know of it."""

    lessons: Lessons
    facts: dict[str, Any]
    original_config: Any
    groups: Sequence[Group]
    keep: Keep
    clock: Clock


def apart(packed: Blocks, tokens: int) -> tuple[Blocks, Blocks]:
    """A part of the domain without its last blocks, and these: `tokens` of other documents.

    Raises BadInput where nothing is left.
    """
    count, length = packed.tokens.shape
    begin = count - -(-tokens // length)
    free = begin
    # Documents lie end to end: only the last free blocks can share one with those set apart.
    while free > 0 and packed.documents[free - 1, -1] == packed.documents[begin, 0]:
        free -= 1
    if free < 1:
        raise BadInput(
            f"The calibration part has {count} blocks of {length} tokens, and nothing of it is "
            f"left to score beside {tokens:,} tokens of validation. Give more text, or a smaller "
            "--validation-tokens."
        )
    return packed.only(torch.arange(free)), packed.only(torch.arange(begin, count))


def stream(packed: Blocks, tokens: int, seed: int) -> Blocks:
    """The blocks of a run in the order in which it sees them; all of them again where they end."""
    count, length = packed.tokens.shape
    needed = -(-tokens // length)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-needed // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return packed.only(order[:needed])


def shuffled_back(blocks: Blocks, seed: int) -> Blocks:
    """The same blocks, so placed that `train`, which shuffles them, takes them in this order."""
    order = torch.tensor(train.order_of_blocks(len(blocks.tokens), seed, 0))
    return blocks.only(order.argsort())


def attempted(ground: Ground, attempt: Attempt) -> dict[str, Any]:
    """What a learning rate comes to on its share of the tokens; no weights are kept.

    A rate at which the loss is not finite has no validation loss, and why is told.
    """
    place = ground.work.folder / attempt.name
    if (known := ground.work.part(attempt.name)) is not None:
        shutil.rmtree(work.unfinished(place), ignore_errors=True)  # stopped right at its end
        return known[1]
    cell = Cell(attempt.method, attempt.size, ground.recipe.seed)
    left = _begun(ground, place)
    facts: dict[str, Any] = {"lr": attempt.lr, "validation": None}
    try:
        told = _trained(ground, cell, attempt.lr, left, ground.asked.sweep_share).facts["recover"]
    except NarrowError as error:
        if type(error) is not NarrowError:  # what the user can mend is no matter of the rate
            raise
        facts["error"] = str(error)
    else:
        finite = told["validation"] is not None and math.isfinite(told["validation"])
        facts |= {"validation": told["validation"]} if finite else {"error": "loss not finite"}
        facts |= {"tokens": told["tokens"], "seconds": told["seconds"]}
    ground.work.finish(attempt.name, {}, facts)
    left.done()
    return facts


def chosen(tried: Sequence[Mapping[str, Any]]) -> float:
    """The rate with the lowest validation loss. Raises NarrowError where none has a finite one."""
    able = [one for one in tried if one["validation"] is not None]
    if not able:
        why = "; ".join(f"{one['lr']:g}: {one['error']}" for one in tried)
        raise NarrowError(f"No learning rate comes to a finite loss. {why} Try lower --lrs.")
    return float(min(able, key=lambda one: float(one["validation"]))["lr"])


def written(
    ground: Ground, cell: Cell, lr: float, before: Before, tried: Sequence[Mapping[str, Any]]
) -> Path:
    """Train a cell, save and prove it, measure it once on held-out text; its run folder."""
    place = ground.work.place / cell.name
    left = _begun(ground, place)
    made = _trained(ground, cell, lr, left, 1.0)
    facts, recipe = made.facts, made.lessons.recipe
    facts["compare"] = _told(ground, cell, made, tried)
    facts["domain"]["tokens"]["held_out"] = before.held_out.tokens.numel()
    with written_whole(place) as run:
        rows = outcome.finished(
            run, place, recipe, made.lessons.start, before, facts,
            original_config=made.original_config, groups=made.groups, keep=made.keep,
            track=ground.track, clock=made.clock,
        )  # fmt: skip
        norms = left.folder / "norms.safetensors"
        if norms.exists():
            shutil.copyfile(norms, run / norms.name)
        outcome.take_training(run, left.folder)
        outcome.write_run(run, recipe, facts, rows, ground.console)
        if METHODS[cell.method]:
            _say_fresh(run, facts)
    left.done()
    if cell.seed == ground.recipe.seed:
        shutil.rmtree(_shelf(ground, cell), ignore_errors=True)
    return place


def _begun(ground: Ground, place: Path) -> Work:
    """The unfinished run of a folder, begun or gone on with.

    What it was asked for is not kept there but once, with the comparison.
    """
    folder = work.unfinished(place)
    resumed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if resumed:
        ground.console.print(f"Going on with {folder}.")
    return Work(folder, place, resumed)


def _trained(ground: Ground, cell: Cell, lr: float, left: Work, share: float) -> Made:
    shape, loaded = ground.shapes[cell.size], ground.start.loaded
    recipe = recipe_of(
        ground.recipe, ground.asked, shape, cell.method, seed=cell.seed, lr=lr, share=share
    )
    text = _text(ground, recipe)
    clock = Clock()
    facts = begun(
        ground.command, recipe, loaded, ground.prices.parameters, ground.start.domain,
        text.tokens(), clock,
    )  # fmt: skip
    with clock.stage("load"):
        if METHODS[cell.method]:
            model = fresh(shape, cell.seed).to(ground.start.device)
        else:
            model = inputs.model_of(recipe, recipe.model.name, track=ground.track).model
    groups: Sequence[Group] = find_groups(model)
    keep = keep_all(groups)
    original_config = copy.deepcopy(model.config)
    start = replace(ground.start, loaded=replace(loaded, model=model), groups=tuple(groups))
    shared = ground.work.folder / f"teacher-seed-{cell.seed}", _seen(ground, cell.seed)
    lessons = Lessons(start, recipe, text, left, ground.console, ground.track, shared)
    _lend(ground.work.folder, left.folder, TEACHER)
    if not METHODS[cell.method]:
        kinds = recipe.prune.chosen_kinds
        start = replace(start, groups=inputs.groups_of(start.all_groups, kinds))
        lessons = replace(lessons, start=start)
        plan = _narrowed(ground, lessons, cell, facts, clock, keeps=share < 1)
        groups, keep = plan.groups, plan.keep
    check_shape(model, shape)
    with clock.stage("recover"):
        facts["recover"] = training.recover(lessons)
    _lend(left.folder, ground.work.folder, TEACHER)
    return Made(lessons, facts, original_config, groups, keep, clock)


def _narrowed(
    ground: Ground, lessons: Lessons, cell: Cell, facts: dict[str, Any], clock: Clock, *,
    keeps: bool,
) -> Plan:  # fmt: skip
    """Choose, refit and remove, in place, as `prune` does; `keeps` for runs at other rates."""
    recipe, start, left = lessons.recipe, lessons.start, lessons.work
    lasso = recipe.prune.method == "lasso"
    blocks = ground.calibration.take(recipe.score.tokens, seed=recipe.seed)
    fitted = ground.calibration.take(recipe.tokens_to_refit, seed=recipe.seed)
    read = max(blocks.tokens.numel(), fitted.tokens.numel())
    facts["domain"]["tokens"]["calibration"] = read
    with clock.stage("score"):
        scored = scoring.made(start, recipe, blocks, track=ground.track)
    plan = stages.planned(recipe, start, scored.scores)
    facts |= {"plan": [asdict(row) for row in plan.rows], "scores": scored.facts()}
    shelf = _shelf(ground, cell)
    if lasso:
        plan = stages.drawn_to_zero(left.folder, recipe, lessons, scored, plan, facts, clock)
    elif cell.seed == ground.recipe.seed:
        _lend(shelf, left.folder, REFITTED)
    with clock.stage("refit and remove"):
        facts["refit"] = removal.refitted(recipe, start, fitted, plan, facts, left, ground.track)
    if keeps and not lasso:
        _lend(left.folder, shelf, REFITTED)
    return plan


def _text(ground: Ground, recipe: Recipe) -> Text:
    """The blocks of a run: those of the lasso are the first of what all others learn from."""
    lasso, after = trained_tokens(recipe)
    seen = stream(ground.train, lasso + after, recipe.seed)
    first = lasso // recipe.blocks.length
    parts = seen.only(torch.arange(first)), seen.only(torch.arange(first, len(seen.tokens)))
    placed = [shuffled_back(part, recipe.seed) if len(part.tokens) else None for part in parts]
    return Text(placed[0], placed[1], ground.validation)


def _seen(ground: Ground, seed: int) -> Blocks:
    """All that a run of the seed trains on; the text of a sweep is the beginning of it."""
    per_step = tokens_per_step(ground.recipe)
    tokens = math.ceil(ground.asked.tokens / per_step) * per_step
    return stream(ground.train, tokens, seed)


def _told(
    ground: Ground, cell: Cell, made: Made, tried: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the manifest says of the comparison that the run belongs to."""
    recipe, shape = made.lessons.recipe, ground.shapes[cell.size]
    lasso, after = trained_tokens(recipe)
    flops = run_flops(recipe, shape, cell.method, ground.prices)
    validation = ground.validation
    return {
        "method": cell.method, "size": cell.size, "seed": cell.seed, "lr": recipe.recover.lr,
        "tokens": lasso + after, "lasso_tokens": lasso,
        "calibration_tokens": made.facts["domain"]["tokens"].get("calibration", 0),
        "flops": asdict(flops), "flops_per_token": flops.training / (lasso + after),
        "text_sha256": _seen(ground, cell.seed).sha256,
        "validation": {
            "part": "calibration", "sha256": validation.sha256,
            "targets": validation.tokens[:, 1:].numel(),
            "bytes": int(validation.sizes[:, 1:].sum()),
        },
        "sweep": {"share": ground.asked.sweep_share, "tried": [dict(one) for one in tried]},
    }  # fmt: skip


def _shelf(ground: Ground, cell: Cell) -> Path:
    """Where the refitted weights lie that all learning rates of a method and size begin with."""
    return ground.work.folder / f"begin-{cell.name}"


def _lend(source: Path, target: Path, part: str) -> None:
    """Let a finished part be one of another run too; the disk holds it once where it can."""
    if not (source / part).exists() or (target / part).exists():
        return
    with claimed(target, part, wait=True):  # two processes may lend the same
        if (target / part).exists():
            return
        with written_whole(target / part) as fresh_folder:
            shutil.copytree(source / part, fresh_folder, dirs_exist_ok=True, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _say_fresh(run: Path, facts: Mapping[str, Any]) -> None:
    """Nothing of the original is in a model of fresh weights: have its texts say so."""
    told, model = facts["compare"], facts["model"]["name"]
    learnt = {"distilled": f"the predictions of `{model}` on the text and the text itself"}
    text = (
        f"A baseline of `llm-narrow compare`, method `{told['method']}`: a model of the shape that "
        f"`{model}` has when it is narrowed to {told['size']}, with fresh weights (seed "
        f"{told['seed']}), trained on {told['tokens']:,} tokens of `{facts['domain']['name']}`. It "
        f"learnt from {learnt.get(told['method'], 'the text alone')}; none of the weights of "
        f"`{model}` are in it, and nothing was removed."
    )
    card = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---"
    report = run / "report.md"
    (run / "model" / "README.md").write_text(f"{card}\n\n# A baseline\n\n{text}\n", "utf-8")
    report.write_text(f"> {text}\n\n{report.read_text('utf-8')}", "utf-8")
