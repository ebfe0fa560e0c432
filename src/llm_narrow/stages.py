"""The commands that score and prune: gather the inputs, call the parts, write the result whole.

Each takes a recipe, or the settings of one by name (`sparsity=0.5`), and returns a frozen result.
Everything that is told on the way goes to `console`, which is silent unless it is given.
"""

import copy
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file

from . import (
    beginning,
    forecast,
    inputs,
    joint,
    outcome,
    removal,
    report,
    show,
    training,
    trimming,
    work,
)
from .cost import size
from .errors import BadInput
from .inputs import Inputs, begin
from .manifest import Clock, begun
from .plan import Plan, by_parameters, by_sparsity, of_zeros, priced, select
from .precision import widened
from .progress import Track
from .recipe import Recipe
from .rows import Row
from .scores import overlap
from .scoring import Scored
from .units import Scores, keep_all
from .work import Job, Work


@dataclass(frozen=True)
class Pruned:
    """What `prune` did. After a dry run `folder` is None and the model is the whole one."""

    model: Any
    tokenizer: Any
    folder: Path | None
    rows: tuple[Row, ...]
    plan: Plan
    manifest: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        rows = [row.to_dict() for row in self.rows]
        return {"folder": self.folder, **self.manifest, "rows": rows}


def prune(
    recipe: Recipe | Path | str | None = None,
    *,
    out: Path | str | None = None,
    force: bool = False,
    dry_run: bool = False,
    scores: Path | str | None = None,
    command: str | None = None,
    console: Console | None = None,
    **given: object,
) -> Pruned:
    """Score, choose, refit and remove, recover, save and verify, measure before and after.

    Writes the run folder `out` (`runs/MODEL-DOMAIN-SIZE`) whole or not at all; with `dry_run`
    writes nothing and stops at the plan. `scores` is a file that `score` made. With training, what
    is done so far is kept beside `out`, and the same call, or `resume`, goes on from there.
    """
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    recipe, console, track = begin(recipe, given, console)
    place = Path(out) if out is not None else default_folder(recipe)
    clock = Clock()
    line = command or f"llm_narrow.prune({told})"
    job = Job("prune", line, recipe.resolved(), None if scores is None else str(scores))
    with (
        nullcontext() if dry_run else outcome.run_folder(place, force=force) as run,
        unfinished(place, job, recipe, console, wanted=not dry_run, force=force) as left,
    ):
        found = beginning.begun(recipe, scores, console, track, clock, left)
        start, cut, blocks, scored = found.start, found.cut, found.blocks, found.scored
        parameters = found.parameters
        scores_found = scored.scores if scored else {}
        bought: dict[str, Any] = {}
        loaded = found.loaded
        if loaded and (wanted := joint.limits(recipe, start.loaded.model, loaded)):
            with clock.stage("price"):
                plan, bought = joint.planned(
                    recipe, start, scores_found, wanted, parameters, console=console, track=track
                )
            console.print(report.budget_line(bought))
        else:
            plan = planned(recipe, start, scores_found, parameters)
        fitted = inputs.fitted(start, recipe, blocks, track=track)
        used = {"calibration": max(blocks.tokens.numel(), fitted.tokens.numel())}
        facts = begun(line, recipe, start.loaded, parameters, start.domain, used, clock)
        facts |= {
            "plan": [asdict(row) for row in plan.rows],
            "scores": scored and scored.facts(),
            "stability": _stability(recipe, plan, scored) if scored and not bought else {},
            **({"joint": bought} if bought else {}),
            **({"layers_gone": plan.layers_gone} if plan.layers_gone else {}),
            **({"vocabulary": cut.facts} if cut else {}),
            **found.thin,
            **found.told,
        }
        if run is None:
            facts["forecast"] = [asdict(p) for p in forecast.forecast(recipe, start, plan, blocks)]
            model, tokenizer = start.loaded.model, start.loaded.tokenizer
            return Pruned(model, tokenizer, None, (), plan, facts)
        console.print(show.plan(plan, facts["stability"]))
        if wide := widened(start.loaded.folder, recipe.dtype):
            console.print(wide + ("" if recipe.trains else " --dtype bfloat16 keeps them small."))
        whole = bool(cut or found.thin)  # which is no more in memory
        before = outcome.measured_before(recipe, start, facts, track, clock, trimmed=whole)
        original_config = copy.deepcopy(start.loaded.model.config)
        lessons = left and _lessons(recipe, start, left, facts, console, track, clock)
        if lessons and scored and recipe.prune.method == "lasso":
            plan = drawn_to_zero(run, recipe, lessons, scored, plan, facts, clock)
        groups, keep = plan.groups, plan.keep
        with clock.stage("refit and remove"):
            if plan.only_units:
                facts["refit"] = removal.refitted(recipe, start, fitted, plan, facts, left, track)
            else:
                groups, keep, original_config, facts["refit"] = removal.without_parts(
                    recipe, start, fitted, plan, left, track
                )
        if lessons and recipe.recover.tokens:
            with clock.stage("recover"):
                facts["recover"] = training.recover(lessons)
        rows = outcome.finished(
            run, place, recipe, start, before, facts, original_config=original_config,
            groups=groups, keep=keep, track=track, clock=clock, trimmed=cut,
        )  # fmt: skip
        if scored:
            shutil.copyfile(scored.path, run / "scores.safetensors")
        if left:
            outcome.take_training(run, left.folder)
        outcome.write_run(run, recipe, facts, rows, console)
    if left:
        left.done()
    return Pruned(start.loaded.model, start.loaded.tokenizer, place, rows, plan, facts)


@contextmanager
def unfinished(
    place: Path, job: Job, recipe: Recipe, console: Console, *,
    wanted: bool, force: bool,
) -> Iterator[Work | None]:  # fmt: skip
    """The folder of the unfinished run; None for runs that do not train.

    What ends the run before its time leaves with a note of how to go on.
    """
    if not (wanted and recipe.trains):
        yield None
        return
    left = work.begin(place, job, force=force)
    if left.resumed:
        console.print(f"Going on with {left.folder}.")
    try:
        yield left
    except BaseException as error:
        error.add_note(f"What is done is kept; go on with: llm-narrow resume {place}")
        raise


def score(
    recipe: Recipe | Path | str | None = None,
    *,
    out: Path | str,
    force: bool = False,
    console: Console | None = None,
    **given: object,
) -> Scored:
    """Score the units and write the score file `out`, which `prune` takes as `scores`."""
    recipe, console, track = begin(recipe, given, console)
    place = Path(out)
    if place.exists() and (place.is_dir() or not force):
        raise BadInput(f"{place} exists already. Choose another file, or replace it with --force.")
    scored = beginning.begun(recipe, None, console, track, Clock(), None).scored
    if scored is None:
        raise BadInput("No kind of unit is asked for: there is nothing to score. Give --kinds.")
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.partial")
    try:
        shutil.copyfile(scored.path, fresh)
        fresh.replace(place)
    finally:
        fresh.unlink(missing_ok=True)
    return replace(scored, path=place)


def default_folder(recipe: Recipe) -> Path:
    """runs/MODEL-DOMAIN-SIZE, from the last part of each name."""
    by_kind = recipe.prune.sparsity_by_kind
    if by_kind is None:
        named = recipe.prune.targets.items()
        wanted = "-".join(
            str(value) if name == "target_params" else f"{name.removeprefix('target_')}-{value}"
            for name, value in named
        )
    elif list(by_kind) == ["neurons"]:
        wanted = f"{by_kind['neurons']:g}"
    else:
        wanted = "-".join(f"{kind}-{share:g}" for kind, share in by_kind.items())
    names = [Path(name).resolve().name for name in (recipe.model.name, recipe.domain.name)]
    text = "-".join([names[0].removesuffix(".gguf"), names[1], wanted.replace("%", "-percent")])
    text += "-lasso" * (recipe.prune.method == "lasso") + "-recovered" * (recipe.recover.tokens > 0)
    return Path("runs") / re.sub(r"[^\w.-]+", "-", text)


def planned(
    recipe: Recipe, start: Inputs, scores: Scores, parameters: int | None = None
) -> Plan:
    """What the recipe removes by these scores, of a model that had `parameters` when loaded."""
    model = start.loaded.model
    whole = size(model).parameters if parameters is None else parameters
    entry = next(iter(model.parameters())).element_size()
    plan = _planned(recipe, start, scores, whole)
    return replace(plan, parameters_before=whole, bytes_before=whole * entry)


def _planned(recipe: Recipe, start: Inputs, scores: Scores, whole: int) -> Plan:
    model, p = start.loaded.model, recipe.prune
    if (by_kind := p.sparsity_by_kind) is not None:
        return by_sparsity(
            model,
            start.all_groups,
            scores,
            sparsity=by_kind,
            allocation=p.by_score,
            multiple=p.multiple,
        )
    entry = next(model.parameters()).element_size()
    target = p.parameters_wanted(whole, entry)
    if target is None:  # nothing but the vocabulary had to go
        return priced(model, start.all_groups, keep_all(start.all_groups))
    if not p.chosen_kinds or target >= size(model).parameters < whole:
        return priced(model, start.all_groups, trimming.check_reached(
            model, start.all_groups, target))  # fmt: skip
    return by_parameters(
        model,
        start.all_groups,
        scores,
        target=target,
        kinds=p.chosen_kinds,
        allocation=p.by_score,
        multiple=p.multiple,
    )


def _stability(recipe: Recipe, plan: Plan, scored: Scored) -> dict[str, float]:
    """Per kind, the share of units that both halves of the calibration text would keep."""
    if scored.halves is None:
        return {}
    p = recipe.prune
    sparsity = plan.sparsity(p.chosen_kinds)
    first, second = (
        keep_all(plan.groups)
        | select(
            half,
            plan.groups,
            sparsity=sparsity,
            allocation=p.by_score,
            multiple=p.multiple,
        )
        for half in scored.halves
    )
    return overlap(first, second, inputs.groups_of(plan.groups, p.chosen_kinds))


def _lessons(
    recipe: Recipe, start: Inputs, left: Work, facts: dict[str, Any], console: Console,
    track: Track, clock: Clock,
) -> training.Lessons:  # fmt: skip
    """What the training parts of the run learn from."""
    with clock.stage("text to train on"):
        text = training.text(start, recipe, track=track)
    facts["domain"]["tokens"] |= text.tokens()
    return training.Lessons(start, recipe, text, left, console, track)


def drawn_to_zero(
    run: Path, recipe: Recipe, lessons: training.Lessons, scored: Scored, plan: Plan,
    facts: dict[str, Any], clock: Clock,
) -> Plan:  # fmt: skip
    """Draw units to zero; the plan that removes them, filled up by score as far as asked for."""
    kinds = recipe.prune.chosen_kinds
    with clock.stage("lasso"):
        aligned = training.align(lessons, scored.scores, plan, kinds)
    zero = {name: ~keep for name, keep in aligned.keep.items()}
    scores = {
        name: score.masked_fill(zero[name], -math.inf) if name in zero else score
        for name, score in scored.scores.items()
    }
    start = lessons.start
    if recipe.lasso.fill:
        chosen = planned(recipe, start, scores, facts["model"]["parameters"])
    else:
        chosen = of_zeros(
            start.loaded.model, start.all_groups, aligned.keep, recipe.prune.by_score,
            recipe.prune.multiple,
        )  # fmt: skip
    gone = {name: int((~chosen.keep[name] & z).sum()) for name, z in zero.items()}
    removed = sum(int((~chosen.keep[name]).sum()) for name in zero)
    facts["lasso"] = {
        **aligned.facts, "removed": removed, "removed_zero": sum(gone.values()),
        "removed_by_score": removed - sum(gone.values()),
    }  # fmt: skip
    facts["plan"] = [asdict(row) for row in chosen.rows]
    lessons.console.print(show.lasso(facts["lasso"]))
    norms = dict(zip(("before: ", "after: "), aligned.norms, strict=True))
    found = {when + name: n for when, per in norms.items() for name, n in per.items()}
    save_file(found, run / "norms.safetensors")
    return chosen
