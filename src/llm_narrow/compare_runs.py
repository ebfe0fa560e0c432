"""Narrowed models against distilled, from-scratch and random ones of the same shape: `compare`.

Each run is a run folder of its own below the comparison's. What is not finished is kept beside
them in `work`, so that the same call goes on where it was stopped, and nothing is done twice.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from . import cost, inputs, outcome, processes, work
from . import recipe as recipes
from .cache import written_whole
from .compare_answers import Answers, answers
from .compare_cells import Ground, apart, attempted, chosen, written
from .compare_cost import Forecast, Prices, forecast, timed_rate
from .compare_shapes import METHODS, Asked, Attempt, Shape, forward_flops, recipe_of, shapes_of
from .compare_text import compared, left_text, markdown, planned
from .errors import BadInput
from .inputs import Inputs
from .manifest import Clock
from .measure import DocumentSums
from .outcome import Before
from .progress import Track
from .recipe import Recipe
from .rows import Row
from .scores import CRITERIA
from .work import Job, Work

WORK = "work"  # of the folder of a comparison: what was asked for, and what is not finished


@dataclass(frozen=True)
class Compared:
    """What `compare` did: the forecast of a dry run, or the answers and where they are."""

    folder: Path | None
    shapes: tuple[Shape, ...]
    forecast: Forecast | None
    answers: Answers | None

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        sizes = [
            {"size": s.size, "kinds": s.kinds, "parameters": s.parameters,
             "parameters_without_embeddings": s.without_embeddings, "flops": s.flops}
            for s in self.shapes
        ]  # fmt: skip
        return {
            "folder": self.folder,
            "sizes": sizes,
            "forecast": self.forecast and asdict(self.forecast),
            "answers": self.answers and self.answers.to_dict(),
        }

    def shown(self) -> RenderableType:
        """What the command line prints."""
        if self.answers is not None:
            return compared(self.answers, self.folder)
        assert self.forecast is not None
        return planned(self.shapes, self.forecast)


def compare(
    recipe: Recipe | Path | str | None = None,
    *,
    sizes: str | Sequence[str | int],
    tokens: str | int,
    out: Path | str,
    seeds: int = 2,
    methods: str | Sequence[str] = tuple(METHODS),
    lrs: str | Sequence[float] = (1e-4, 3e-4, 1e-3),
    sweep_share: float = 0.2,
    targets: Sequence[float] | None = None,
    dry_run: bool = False,
    command: str | None = None,
    console: Console | None = None,
    **given: object,
) -> Compared:
    """Train every method at every size with every seed, and answer what each is worth.

    `sizes` are parameters to end with, as target_params; `tokens` is what each run is trained on.
    For every method and size the learning rates are tried on `sweep_share` of the tokens, and the
    best by the loss on blocks of the calibration part that nothing is scored on is taken; held-out
    text is measured once per run, at its end. `targets` are losses to ask the tokens and sizes for,
    chosen from what was reached unless given. Writes run folders, compare.json and compare.md
    below `out`; with `dry_run` nothing.

    Raises TargetOutOfReach for sizes that cannot be reached, before anything is run, and BadInput
    where `out` holds a comparison with other settings, with every one that differs.
    """
    call: dict[str, object] = {
        **given, "sizes": sizes, "tokens": tokens,
        "seeds": seeds, "methods": methods, "lrs": lrs, "sweep_share": sweep_share,
        "out": str(out),
    }  # fmt: skip
    if isinstance(recipe, Recipe):
        # Not `resolved()`, which settles the kinds that may go: what is open depends on the size.
        data = recipe.model_dump(mode="json", exclude_none=True)
        data["recover"] |= {"tokens": tokens}
        recipe = recipes.of(data, criteria=CRITERIA)
    else:
        given = {**given, "recover_tokens": tokens}
    told = ", ".join(f"{name}={value!r}" for name, value in call.items())
    recipe, console, track = inputs.begin(recipe, given, console)
    asked = Asked.of(
        sizes=sizes, methods=methods, lrs=lrs, seeds=seeds, tokens=recipe.recover.tokens,
        sweep_share=sweep_share,
    )  # fmt: skip
    _check(recipe)
    place = Path(out)
    settings = {"compare": asdict(asked), **_same(recipe)}
    _check_same(place, settings)
    clock = Clock()
    with clock.stage("load"):
        start = inputs.gather(recipe, track=track)
    shapes = shapes_of(recipe, start, asked.sizes)
    for shape in shapes.values():  # what cannot be run is told before anything is
        for method in asked.methods:
            for share in (1.0, sweep_share):
                recipe_of(
                    recipe, asked, shape, method, seed=recipe.seed, lr=asked.lrs[0], share=share
                )
    prices = _prices(recipe, asked, start, track)
    packed = inputs.blocks_of(start.loaded, start.domain, "train", recipe, track=track)
    text = inputs.blocks_of(start.loaded, start.domain, "calibration", recipe, track=track)
    free, validation = apart(text, recipe.train.validation_tokens)
    if any(not METHODS[method] for method in asked.methods):
        free.take(recipe.score.tokens, seed=recipe.seed)
    if dry_run:
        rate = timed_rate(asked, recipe, start, shapes, prices, packed)
        found = forecast(
            asked, recipe, shapes, prices, place, tried=_tried(place, asked, recipe), rate=rate
        )
        return Compared(None, tuple(shapes.values()), found, None)
    left = _begun(place, settings)
    line = command or f"llm_narrow.compare({told})"
    before = _whole(recipe, start, left, console, track, clock)
    ground = Ground(
        asked, recipe, replace(start, loaded=replace(start.loaded, model=None)), shapes, prices,
        packed, free, validation, left, line, console, track,
    )  # fmt: skip
    del start  # the whole model is loaded where a run begins with it
    try:
        _run(ground, before)
    except BaseException as error:
        error.add_note("What is done is kept; go on with the same command.")
        raise
    found_answers = answers(
        [place / cell.name for cell in asked.cells(recipe.seed)], targets=targets
    )
    write(place, found_answers, line)
    return Compared(place, tuple(shapes.values()), None, found_answers)


def recompute(
    folders: Sequence[Path | str],
    *,
    out: Path | str | None = None,
    targets: Sequence[float] | None = None,
    strict: bool = False,
    command: str | None = None,
) -> Compared:
    """The answers of runs that are there: run folders, or folders of comparisons.

    Runs that are missing or half-written are named in the warnings, and refused with `strict`.
    Writes compare.json and compare.md into `out`, if given. Raises BadInput for that, and for runs
    that cannot be compared.
    """
    runs = [run for folder in folders for run in runs_of(Path(folder))]
    found = answers(runs, targets=targets, strict=strict)
    place = None if out is None else Path(out)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        names = ", ".join(repr(str(folder)) for folder in folders)
        write(place, found, command or f"llm_narrow.compare_runs.recompute([{names}])")
    return Compared(place, (), None, found)


def runs_of(folder: Path) -> list[Path]:
    """The run folders that a folder stands for, those too that ought to be there and are not."""
    settings = folder / WORK / "settings.json"
    if (folder / "manifest.json").exists() or not folder.is_dir():
        return [folder]
    if not settings.exists():
        found = {
            p.with_name(p.name.removesuffix(work.SUFFIX))
            for p in folder.iterdir()
            if p.name.endswith(work.SUFFIX)
            or any((p / name).exists() for name in ("manifest.json", "rows.jsonl"))
        }
        return sorted(found) or [folder]
    held = _read(settings)
    try:
        cells = Asked(**held["compare"]).cells(int(held["seed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{settings} does not say what was compared: {error}.") from None
    return [folder / cell.name for cell in cells]


def write(place: Path, found: Answers, line: str) -> None:
    """Write compare.json and compare.md, each whole or not at all."""
    told = {"command": line, **found.to_dict()}
    texts = {
        "compare.json": json.dumps(told, indent=2, allow_nan=False) + "\n",
        "compare.md": markdown(found, line),
    }
    for name, text in texts.items():
        fresh = place / f".{name}.partial"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(place / name)


def _run(ground: Ground, before: Before) -> None:
    """All runs that are not finished, each method and size after its own sweep."""
    cells = ground.asked.cells(ground.recipe.seed)
    rates: dict[tuple[str, str], float] = {}
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, cell in enumerate(cells, 1):
        place = ground.work.place / cell.name
        if (place / "manifest.json").is_file():
            shutil.rmtree(work.unfinished(place), ignore_errors=True)  # stopped right at its end
            continue
        key = cell.method, cell.size
        if key not in rates:
            attempts = ground.asked.attempts(cell)
            for attempt in attempts:
                ground.console.print(
                    f"{cell.method} at {cell.size}: trying a learning rate of {attempt.lr:g}"
                )
                tried.setdefault(key, []).append(attempted(ground, attempt))
            rates[key] = chosen(tried[key]) if attempts else ground.asked.lrs[0]
        ground.console.print(
            f"Run {number} of {len(cells)}: {cell.method} at {cell.size}, seed {cell.seed}, "
            f"learning rate {rates[key]:g}"
        )
        written(ground, cell, rates[key], before, tried.get(key, []))
        found = forecast(
            ground.asked, ground.recipe, ground.shapes, ground.prices, ground.work.place,
            tried=_tried(ground.work.place, ground.asked, ground.recipe),
        )  # fmt: skip
        ground.console.print(left_text(found))


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
    differ = work.differences(_read(file), json.loads(json.dumps(settings)))
    if differ:
        raise BadInput(
            f"{place} is a comparison with other settings:\n"
            + "".join(f"  {line}\n" for line in differ)
            + "Go on with those, or choose another --out. `compare --from` then joins both."
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read: {error}. Choose another folder.") from None
    if not isinstance(found, dict):
        raise BadInput(f"{file} must hold a JSON object, got {type(found).__name__}.")
    return found
