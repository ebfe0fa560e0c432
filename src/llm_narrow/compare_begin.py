"""What a comparison begins from: what it needs, whether it can be run, and what it found before."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import compare_jobs, cost, inputs, outcome, processes, work
from .blocks import Blocks
from .cache import written_whole
from .claims import claimed
from .compare_cells import Ground, apart
from .compare_cost import Forecast, Prices, forecast, timed_rate
from .compare_shapes import METHODS, Asked, Attempt, Shape, forward_flops, recipe_of, shapes_of
from .errors import BadInput
from .inputs import Inputs
from .manifest import Clock
from .measure import DocumentSums
from .outcome import Before
from .progress import Track
from .recipe import Recipe
from .rows import Row
from .work import Job, Work

WORK = "work"  # of the folder of a comparison: what was asked for, and what is not finished


@dataclass(frozen=True)
class Basis:
    """What a comparison is made from, before anything of it is done."""

    start: Inputs
    shapes: dict[str, Shape]
    prices: Prices
    train: Blocks
    calibration: Blocks
    validation: Blocks


def foreseen(
    recipe: Recipe, asked: Asked, place: Path, jobs: int, track: Track
) -> tuple[dict[str, Shape], Forecast]:
    """What a dry run finds."""
    b = gathered(recipe, asked, place, track)
    threads = torch.get_num_threads()
    if own := compare_jobs.share(b.start.device, 0, jobs).get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(own))
    try:
        rate = timed_rate(asked, recipe, b.start, b.shapes, b.prices, b.train)
    finally:
        torch.set_num_threads(threads)
    tried = _tried(place, asked, recipe)
    found = forecast(
        asked, recipe, b.shapes, b.prices, place, tried=tried, rate=rate, jobs=jobs
    )
    return b.shapes, found


def opened(
    recipe: Recipe, asked: Asked, place: Path, line: str, jobs: int, console: Console, track: Track
) -> tuple[Ground, Before]:
    """The comparison in the folder, begun or gone on with, and the whole model's measurement."""
    clock = Clock()
    with clock.stage("load"):
        b = gathered(recipe, asked, place, track)
    left = _begun(place, _settings(recipe, asked))
    with claimed(left.folder, "whole-model", wait=True):
        before = _whole(recipe, b.start, left, console, track, clock)
    # The whole model is loaded again where a run begins with it.
    start = replace(b.start, loaded=replace(b.start.loaded, model=None))
    ground = Ground(
        asked, recipe, start, b.shapes, b.prices, b.train, b.calibration, b.validation, left, line,
        console, track, jobs,
    )  # fmt: skip
    return ground, before


def progress(ground: Ground) -> Forecast:
    """What is left of a comparison."""
    return forecast(
        ground.asked, ground.recipe, ground.shapes, ground.prices, ground.work.place,
        tried=_tried(ground.work.place, ground.asked, ground.recipe), jobs=ground.jobs,
    )  # fmt: skip


def read(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises BadInput where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read: {error}. Choose another folder.") from None
    if not isinstance(found, dict):
        raise BadInput(f"{file} must hold a JSON object, got {type(found).__name__}.")
    return found


def gathered(recipe: Recipe, asked: Asked, place: Path, track: Track) -> Basis:
    """The basis. Raises BadInput for all that cannot be run, before anything is."""
    _check(recipe)
    _check_same(place, _settings(recipe, asked))
    start = inputs.gather(recipe, track=track)
    shapes = shapes_of(recipe, start, asked.sizes)
    for shape in shapes.values():
        for method in asked.methods:
            for share in (1.0, asked.sweep_share):
                recipe_of(
                    recipe, asked, shape, method, seed=recipe.seed, lr=asked.lrs[0], share=share
                )
    prices = _prices(recipe, asked, start, track)
    packed = inputs.blocks_of(start.loaded, start.domain, "train", recipe, track=track)
    text = inputs.blocks_of(start.loaded, start.domain, "calibration", recipe, track=track)
    free, validation = apart(text, recipe.train.validation_tokens)
    if any(not METHODS[method] for method in asked.methods):
        free.take(max(recipe.score.tokens, recipe.tokens_to_refit), seed=recipe.seed)
    return Basis(start, shapes, prices, packed, free, validation)


def _check(recipe: Recipe) -> None:
    """Refuse what cannot be compared."""
    if processes.count() > 1:
        raise BadInput(
            f"`compare` runs in one process, and this is one of {processes.count()}. Start it "
            "without torchrun; runs made elsewhere can be joined with `compare --from`."
        )
    if recipe.prune.allocation != "uniform":
        raise BadInput(
            "prune.allocation must be uniform to compare: models of fresh weights need a shape "
            f"that a stock config has. It is {recipe.prune.allocation}."
        )
    if recipe.score.forget:
        raise BadInput(
            "score.forget must be empty to compare: fresh weights have nothing to forget. Compare "
            "without it; `prune --forget` measures what was forgotten."
        )
    p = recipe.prune
    if p.query_heads is not None or p.channels is not None or p.parts:
        raise BadInput(
            "compare narrows by units alone: leave prune.query_heads and prune.channels out, and "
            "layers, attention and mlp out of prune.kinds."
        )
    if recipe.prune.vocabulary != "whole":
        raise BadInput(
            "prune.vocabulary must be whole to compare: all models of a comparison read the same "
            f"tokens. It is {recipe.prune.vocabulary}."
        )
    if recipe.recover.method != "full":
        raise BadInput(
            f"recover.method must be full to compare, got {recipe.recover.method}: fresh weights "
            "have nothing for low-rank products to be added to."
        )
    if not recipe.lasso.fill:
        raise BadInput(
            "lasso.fill must be true to compare: else the lasso's models have a size of their own."
        )


def _prices(recipe: Recipe, asked: Asked, start: Inputs, track: Track) -> Prices:
    model = start.loaded.model
    whole = forward_flops(model, recipe)
    teacher = whole
    if recipe.train.teacher and set(asked.methods) != {"scratch"}:
        teacher = forward_flops(
            inputs.model_of(recipe, recipe.train.teacher, track=track).model, recipe
        )
    return Prices(cost.size(model).parameters, whole, teacher)


def _tried(place: Path, asked: Asked, recipe: Recipe) -> list[Attempt]:
    """The attempts that are done; those of finished runs too."""
    attempts = {a for cell in asked.cells(recipe.seed) for a in asked.attempts(cell)}
    return [a for a in attempts if (place / WORK / a.name / "facts.json").is_file()]


def _whole(
    recipe: Recipe, start: Inputs, left: Work, console: Console, track: Track, clock: Clock
) -> Before:
    """The whole model on held-out text, measured once for all runs."""
    if (held := left.part("whole")) is not None:
        tensors, facts = held
        blocks = inputs.held_out(start.loaded, start.domain, recipe, track=track)
        sums = DocumentSums(**tensors)
        texts = tuple(facts["prompts"]), tuple(facts["written"])
        return Before(blocks, sums, Row.from_dict(facts["row"]), *texts)
    console.print("Measuring the whole model")
    told: dict[str, Any] = {"domain": {"tokens": {}}}
    before = outcome.measured_before(recipe, start, told, track, clock)
    assert before is not None  # there is but one process
    left.finish(
        "whole",
        dict(vars(before.sums)),
        {"row": before.row.to_dict(), "prompts": before.prompts, "written": before.written},
    )
    return before


def _settings(recipe: Recipe, asked: Asked) -> dict[str, Any]:
    return {"compare": asdict(asked), **_same(recipe)}


def _same(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe has to be the same to go on."""
    found = Job("prune", "", recipe.resolved()).same()
    return {key: found[key] for key in found if key not in ("command", "scores")}


def _begun(place: Path, settings: dict[str, Any]) -> Work:
    """The folder of what is not finished; new where there is none."""
    folder = place / WORK
    resumed = folder.exists()
    if not resumed:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise BadInput(f"{place} exists already, and is no comparison. Choose another --out.")
        with written_whole(folder) as fresh:
            (fresh / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return Work(folder, place, resumed)


def _check_same(place: Path, settings: dict[str, Any]) -> None:
    """Raise BadInput where the folder holds a comparison of other settings."""
    file = place / WORK / "settings.json"
    if not file.exists():
        return
    differ = work.differences(read(file), json.loads(json.dumps(settings)))
    if differ:
        raise BadInput(
            f"{place} is a comparison with other settings:\n"
            + "".join(f"  {line}\n" for line in differ)
            + "Go on with those, or choose another --out. `compare --from` then joins both."
        )
