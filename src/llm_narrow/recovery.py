"""The commands that train a model that is there already, and that go on with a stopped run."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from . import checkpoint, inputs, outcome, training
from . import recipe as recipes
from .cost import size
from .errors import BadInput
from .inputs import begin
from .manifest import Clock, begun
from .plan import priced
from .recipe import Recipe
from .scores import CRITERIA
from .stages import Pruned, prune, unfinished
from .units import keep_all
from .work import Job, read


def origin(model: str) -> tuple[Path | None, dict[str, object]]:
    """The recipe of the run that made a model, and the settings that follow from it.

    What is trained is not pruned again, and learns from the model that the run began with. For a
    model of no run there are neither.
    """
    file = _run_of(model) / "recipe.yaml"
    if not file.is_file():
        return None, {"distill": "none"}
    was = recipes.load(file, criteria=CRITERIA)
    return file, {"method": "oneshot", "teacher": was.train.teacher or was.model.name}


def recover(
    recipe: Recipe | Path | str | None = None,
    *,
    out: Path | str,
    force: bool = False,
    command: str | None = None,
    console: Console | None = None,
    **given: object,
) -> Pruned:
    """Train the model that the recipe names as its section `recover` says; nothing is removed.

    Writes the run folder `out`, whole or not at all; what is done so far is kept beside it. Raises
    BadInput where there is nothing to train on.
    """
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    recipe, console, track = begin(recipe, given, console)
    if not recipe.recover.tokens:
        raise BadInput("recover.tokens must be above 0 to train. Give --tokens, e.g. 200k.")
    place, source = Path(out), _run_of(recipe.model.name)
    clock = Clock()
    line = command or f"llm_narrow.recover({told})"
    job = Job("recover", line, recipe.resolved())
    with (
        outcome.run_folder(place, force=force) as run,
        unfinished(place, job, recipe, console, wanted=True, force=force) as left,
    ):
        assert left is not None
        with clock.stage("load"):
            start = inputs.gather(recipe, track=track)
        model = start.loaded.model
        parameters = size(model).parameters
        facts = begun(line, recipe, start.loaded, parameters, start.domain, {}, clock)
        facts |= _pruning_of(source)
        before = outcome.measured_before(recipe, start, facts, track, clock)
        with clock.stage("text to train on"):
            text = training.text(start, recipe, track=track)
        facts["domain"]["tokens"] |= text.tokens()
        original_config = copy.deepcopy(model.config)
        lessons = training.Lessons(start, recipe, text, left, console, track)
        with clock.stage("recover"):
            facts["recover"] = training.recover(lessons)
        keep = keep_all(start.all_groups)
        rows = outcome.finished(
            run, place, recipe, start, before, facts, original_config=original_config,
            groups=start.all_groups, keep=keep, track=track, clock=clock,
        )  # fmt: skip
        told_by = source / "model" / checkpoint.KEEP  # a stock folder has none
        if rows and facts["checkpoint"]["layout"] == "uniform" and told_by.is_file():
            # What was removed from the original is still what its run said.
            shutil.copyfile(told_by, run / "model" / checkpoint.KEEP)
        outcome.take_training(run, left.folder)
        outcome.write_run(run, recipe, facts, rows, console)
    left.done()
    plan = priced(model, start.all_groups, keep)
    return Pruned(model, start.loaded.tokenizer, place, rows, plan, facts)


def resume(place: Path | str, *, console: Console | None = None) -> Pruned:
    """Go on with the unfinished run of a run folder, by the job that it was begun with.

    Raises BadInput where there is none.
    """
    place = Path(place)
    job = read(place)
    recipe = recipes.of(job.recipe, criteria=CRITERIA)
    same: dict[str, Any] = {"out": place, "force": True, "command": job.line, "console": console}
    if job.command == "recover":
        return recover(recipe, **same)
    return prune(recipe, scores=job.scores, **same)


def _run_of(model: str) -> Path:
    """The run folder that a model's name stands for, if it is one: given itself or its model/."""
    folder = Path(model)
    return folder.parent if folder.name == "model" else folder


def _pruning_of(source: Path) -> dict[str, Any]:
    """What the manifest of the run before tells of the removal; nothing for other models."""
    try:
        manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kept = {key: manifest[key] for key in ("plan", "refit", "lasso") if key in manifest}
    return {**kept, "made_from": {"model": manifest["model"], "command": manifest["command"]}}
