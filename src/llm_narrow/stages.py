"""The commands that score and prune: gather the inputs, call the parts, write the result whole.

Each takes a recipe, or the settings of one by name (`sparsity=0.5`), and returns a frozen result.
Everything that is told on the way goes to `console`, which is silent unless it is given.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import benchmark, checkpoint, inputs, measure, report, scoring, show
from . import recipe as recipes
from . import rows as rowfile
from .blocks import Blocks
from .cache import written_whole
from .card import model_card
from .cost import size
from .errors import BadInput
from .inputs import Inputs, begin
from .manifest import Clock, domain_facts, versions
from .plan import Plan, by_parameters, by_sparsity, select
from .progress import Track
from .recipe import Recipe
from .refit import refit_and_remove
from .rows import Row
from .scores import memory_estimate, overlap
from .scoring import Scored
from .units import keep_all, remove


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
    """Score, choose, refit and remove, save and verify, measure before and after.

    Writes the run folder `out` (`runs/MODEL-DOMAIN-SIZE`) whole or not at all; with `dry_run`
    writes nothing and stops at the plan. `scores` is a file that `score` made.
    """
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    recipe, console, track = begin(recipe, given, console)
    place = Path(out) if out is not None else default_folder(recipe)
    if force and not dry_run:
        _check_replaceable(place)
    clock = Clock()
    with nullcontext() if dry_run else written_whole(place, force=force) as run:
        start, blocks, scored = _scored(recipe, scores, console, track, clock)
        plan = _planned(recipe, start, scored)
        facts: dict[str, Any] = {
            "command": command or f"llm_narrow.prune({told})",
            "versions": versions(),
            "seed": recipe.seed,
            "model": {
                "name": start.loaded.name,
                "sha256": start.loaded.sha256,
                "parameters": size(start.loaded.model).parameters,
            },
            "domain": domain_facts(start.domain, {"calibration": blocks.tokens.numel()}),
            "recipe": recipe.resolved(),
            "plan": [asdict(row) for row in plan.rows],
            "scores": scored.facts(),
            "stability": _stability(recipe, plan, scored),
            "seconds": clock.seconds,
        }
        if run is None:
            return Pruned(start.loaded.model, start.loaded.tokenizer, None, (), plan, facts)
        console.print(show.plan(plan, facts["stability"]))
        rows = _act(run, place, recipe, start, blocks, plan, facts, track, clock)
        shutil.copyfile(scored.path, run / "scores.safetensors")
        _write_run(run, recipe, facts, rows)
    return Pruned(start.loaded.model, start.loaded.tokenizer, place, rows, plan, facts)


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
    _, _, scored = _scored(recipe, None, console, track, Clock())
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
        wanted = str(recipe.prune.target_params)
    elif list(by_kind) == ["neurons"]:
        wanted = f"{by_kind['neurons']:g}"
    else:
        wanted = "-".join(f"{kind}-{share:g}" for kind, share in by_kind.items())
    names = [Path(name).resolve().name for name in (recipe.model.name, recipe.domain.name)]
    text = "-".join([names[0].removesuffix(".gguf"), names[1], wanted.replace("%", "-percent")])
    return Path("runs") / re.sub(r"[^\w.-]+", "-", text)


def _check_replaceable(place: Path) -> None:
    """Refuse to replace a folder that no run wrote: it would be lost."""
    if place.is_dir() and any(place.iterdir()) and not (place / "manifest.json").is_file():
        raise BadInput(
            f"{place} is not a run folder (it has no manifest.json) and is not replaced, even with "
            "--force. Choose another --out."
        )


def _scored(
    recipe: Recipe, file: Path | str | None, console: Console, track: Track, clock: Clock
) -> tuple[Inputs, Blocks, Scored]:
    with clock.stage("load"):
        start = inputs.gather(recipe, track=track)
        blocks = inputs.calibration(start, recipe, track=track)
    if file is not None:
        return start, blocks, scoring.given(Path(file), start, recipe)
    peak = memory_estimate(
        start.loaded.model,
        start.groups,
        batch_size=recipe.blocks.batch_size,
        length=recipe.blocks.length,
        criterion=recipe.score.criterion,
    )
    console.print(
        f"Scoring {sum(g.size for g in start.groups):,} units by {recipe.score.criterion} on "
        f"{blocks.tokens.numel():,} tokens{' in bfloat16' if start.bf16 else ''}; "
        f"about {report.size(peak)} of memory at the peak."
    )
    with clock.stage("score"):
        scored = scoring.made(start, recipe, blocks, track=track)
    if scored.reused:
        console.print(f"The scores were made before, in {scored.made_by['seconds']} s; used again.")
    return start, blocks, scored


def _planned(recipe: Recipe, start: Inputs, scored: Scored) -> Plan:
    model, p = start.loaded.model, recipe.prune
    if (by_kind := p.sparsity_by_kind) is not None:
        return by_sparsity(
            model,
            start.all_groups,
            scored.scores,
            sparsity=by_kind,
            allocation=p.allocation,
            multiple=p.multiple,
        )
    assert p.target_params is not None
    return by_parameters(
        model,
        start.all_groups,
        scored.scores,
        target=recipes.target(p.target_params, size(model).parameters),
        kinds=p.chosen_kinds,
        allocation=p.allocation,
        multiple=p.multiple,
    )


def _stability(recipe: Recipe, plan: Plan, scored: Scored) -> dict[str, float]:
    """Per kind, the share of units that both halves of the calibration text would keep."""
    if scored.halves is None:
        return {}
    p, sparsity = recipe.prune, {}
    for kind in p.chosen_kinds:
        before = sum(row.before for row in plan.rows if row.kind == kind)
        sparsity[kind] = 1 - sum(row.after for row in plan.rows if row.kind == kind) / before
    first, second = (
        keep_all(plan.groups)
        | select(
            half,
            plan.groups,
            sparsity=sparsity,
            allocation=p.allocation,
            multiple=p.multiple,
        )
        for half in scored.halves
    )
    return overlap(first, second, inputs.groups_of(plan.groups, p.chosen_kinds))


def _act(
    run: Path,
    place: Path,
    recipe: Recipe,
    start: Inputs,
    blocks: Blocks,
    plan: Plan,
    facts: dict[str, Any],
    track: Track,
    clock: Clock,
) -> tuple[Row, ...]:
    """Measure, refit and remove in place, save, measure again; what is learnt goes into `facts`."""
    model, tokenizer = start.loaded.model, start.loaded.tokenizer
    with clock.stage("measure before"):
        held_out = inputs.held_out(start.loaded, start.domain, recipe, track=track)
        facts["domain"]["tokens"]["held_out"] = held_out.tokens.numel()
        first = benchmark.document_sums(model, held_out, recipe, track)
        rows = [benchmark.row("before", start.loaded, first, start.domain.name, recipe)]
        prompts = inputs.prompts(start.loaded, held_out, recipe.measure.samples)
        written = [measure.complete(model, tokenizer, prompt) for prompt in prompts]
    original_config = copy.deepcopy(model.config)
    with clock.stage("refit and remove"):
        facts["refit"] = _refitted(recipe, start, blocks, plan, track)
    with clock.stage("save and verify"):
        saved = checkpoint.save(
            model,
            tokenizer,
            run / "model",
            original_config=original_config,
            groups=plan.groups,
            keep=plan.keep,
            files={"recipe.yaml": recipe.to_yaml()},
        )
    facts["checkpoint"] = {
        "layout": saved.layout,
        "model_type": saved.model_type,
        "max_difference": saved.difference,
        "files": dict(saved.files),
        "sha256": saved.sha256,
    }
    narrow = replace(
        start.loaded, name=str(place / "model"), folder=run / "model", sha256=saved.sha256
    )
    with clock.stage("measure after"):
        second = benchmark.document_sums(model, held_out, recipe, track)
        rows.append(benchmark.row("after", narrow, second, start.domain.name, recipe, first=first))
        facts["samples"] = [
            {"prompt": prompt, "before": old, "after": measure.complete(model, tokenizer, prompt)}
            for prompt, old in zip(prompts, written, strict=True)
        ]
    if recipe.measure.speed:
        with clock.stage("speed"):
            whole = inputs.model_of(recipe, recipe.model.name, track=track)
            rows = benchmark.timed(rows, {"before": whole.model, "after": model}, recipe, track)
    return tuple(rows)


def _refitted(
    recipe: Recipe, start: Inputs, blocks: Blocks, plan: Plan, track: Track
) -> dict[str, Any]:
    if recipe.prune.refit == "none":
        remove(start.loaded.model, plan.groups, plan.keep)
        return {}
    facts = refit_and_remove(
        start.loaded.model,
        plan.groups,
        plan.keep,
        blocks.batches(recipe.blocks.batch_size),
        damping=recipe.prune.damping,
        sequential=recipe.prune.refit == "sequential",
        dtype=torch.bfloat16 if start.bf16 else None,
        track=track,
    )
    errors = list(facts.errors.values()) or [0.0]
    return {
        "mode": recipe.prune.refit,
        "tokens": facts.tokens,
        "damping": facts.damping,
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
    }


def _write_run(run: Path, recipe: Recipe, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    manifest = json.dumps(facts, indent=2, ensure_ascii=False)
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (run / "manifest.json").write_text(manifest, encoding="utf-8")
    (run / "model" / "manifest.json").write_text(manifest, encoding="utf-8")
    (run / "model" / "README.md").write_text(model_card(facts, rows), encoding="utf-8")
    rowfile.append(run / "rows.jsonl", rows)
    (run / "report.md").write_text(report.markdown(run), encoding="utf-8")
