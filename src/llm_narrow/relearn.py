"""How fast what was lost comes back: `relearn` trains models on a lost domain and counts tokens.

The whole model, the runs given and fresh weights of their shapes all learn the same text. Finished
trainings are kept in `work` below the folder of the audit, so that the same call goes on where it
was stopped, and runs can be added later.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType

from . import forecast as forecasts
from . import inputs, manifest, processes, work
from . import recipe as recipes
from .blocks import Blocks
from .cache import written_whole
from .compare_cells import chosen
from .compare_cost import Forecast
from .compare_shapes import forward_flops
from .compare_text import left_text
from .errors import BadInput, problems
from .inputs import Inputs
from .measure import DocumentSums
from .progress import Track
from .recipe import Recipe
from .relearn_answers import Answers, Subject, answers, goal_of, line_of
from .relearn_cells import (
    Asked,
    Ground,
    attempt_name,
    attempted,
    cell_name,
    file_name,
    learnt,
    sums_of,
)
from .relearn_cost import done, forecast, seeds_of
from .relearn_subjects import manifests, origin_of, subjects_of
from .relearn_text import markdown, planned, relearned
from .report import read_manifest
from .scores import CRITERIA
from .work import Job, Work

WORK = "work"  # of the folder of an audit
FORMAT, VERSION = "llm-narrow relearning", 1  # of relearn.json
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Relearned:
    """What `relearn` did: the forecast of a dry run, or the answers and where they are."""

    folder: Path | None
    subjects: tuple[Subject, ...]
    forecast: Forecast | None
    answers: Answers | None
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "folder": self.folder,
            "subjects": [asdict(s) for s in self.subjects],
            "forecast": self.forecast and asdict(self.forecast),
            "answers": self.answers and self.answers.to_dict(),
            "notes": self.notes,
        }

    def shown(self) -> RenderableType:
        """What the command line prints."""
        if self.answers is not None:
            return relearned(self.answers, self.notes, self.folder)
        assert self.forecast is not None
        return planned(self.subjects, self.forecast, self.notes)


def relearn(
    runs: Sequence[Path | str],
    *,
    domain: str,
    tokens: str | int,
    out: Path | str | None = None,
    whole: str | None = None,
    seeds: int = 2,
    lrs: str | Sequence[float] = (1e-4, 3e-4, 1e-3),
    sweep_share: float = 0.2,
    points: int = 8,
    target: str | float | None = None,
    margin: float = 0.1,
    dry_run: bool = False,
    command: str | None = None,
    console: Console | None = None,
    spell: Callable[[str], str] = str,
    **given: object,
) -> Relearned:
    """Train the whole model, the runs and fresh weights of their shapes on a domain.

    `tokens` is what each is trained on. For each, the learning rates are tried on `sweep_share` of
    it, and the best by the loss on blocks of the domain's calibration part is taken; held-out text
    is measured at `points` numbers of tokens, and chooses nothing. `target` is the loss to come to:
    `whole` (that of the whole model before any training, plus `margin` nats per token), `scratch`
    (the best of fresh weights) or a number. `whole` names the whole model where it has moved.
    Writes rows.jsonl, relearn.json, relearn.md and a figure into `out`
    (`runs/relearn-DOMAIN`); with `dry_run` nothing.

    Raises BadInput for folders that are no runs, runs of different whole models or tokenizers, and
    where `out` holds an audit with other settings, with every one that differs.
    """
    call = {
        **given, "domain": domain, "tokens": tokens, "out": None if out is None else str(out),
        "seeds": seeds, "lrs": lrs, "sweep_share": sweep_share, "points": points,
        "target": target, "margin": margin,
    }  # fmt: skip
    told = ", ".join(f"{name}={value!r}" for name, value in call.items() if value is not None)
    goal_of(target)  # refused before anything is trained
    found = manifests(runs)
    origin = origin_of(found)
    recipe = recipes.load(
        None,
        # A cosine would make each point depend on the end of the budget.
        {"schedule": "constant", "held_out_tokens": "16k",
         **{name: value for name, value in given.items() if value is not None},
         "model": whole or origin["name"], "domain": domain, "recover_tokens": tokens,
         "distill": "none"},
        criteria=CRITERIA, spell=spell,
    )  # fmt: skip
    recipe, console, track = inputs.begin(recipe, {}, console)
    asked = _asked(recipe, lrs, seeds, sweep_share, points, margin)
    place = Path(out) if out is not None else default_folder(domain)
    _check_place(place)
    start = inputs.gather(recipe, track=track)
    if start.loaded.sha256 != origin["sha256"]:
        raise BadInput(
            f"{recipe.model.name} is not the model that {runs[0]} began with: its weights have "
            f"SHA-256 {start.loaded.sha256[:16]}…, and the run began with "
            f"{str(origin['sha256'])[:16]}…. Name the right one with --whole."
        )
    blocks = {
        part: inputs.blocks_of(start.loaded, start.domain, part, recipe, track=track)
        for part in start.domain.documents
    }
    choice = blocks["calibration"].take(recipe.train.validation_tokens, seed=recipe.seed)
    test = blocks["held_out"].take(recipe.measure.held_out_tokens, seed=recipe.seed)
    subjects = subjects_of(found, recipe, start, blocks["held_out"], track)
    settings = _settings(asked, recipe, start, subjects)
    _check_same(place, settings)
    notes = _notes(recipe, blocks["train"])
    ground = Ground(
        asked, recipe, start.domain, blocks["train"], choice, test, None,
        Work(place / WORK, place, False), console, track,
    )  # fmt: skip
    if dry_run:
        flops = forward_flops(start.loaded.model, recipe)
        rate = forecasts.rate(recipe, start, test, flops)
        return Relearned(None, subjects, forecast(ground, subjects, rate), None, notes)
    left = _begun(place, settings)
    first = _whole(recipe, start, left, test, console, track)
    ground = Ground(
        asked, recipe, start.domain, blocks["train"], choice, test, first, left, console, track
    )
    del start  # each training loads its own
    line = command or f"llm_narrow.relearn.relearn({[str(r) for r in runs]}, {told})"
    try:
        rows, rates, tried = _run(ground, subjects)
    except BaseException as error:
        error.add_note("What is done is kept; go on with the same command.")
        raise
    lines = [line_of(s, rows, rates[s.name], tried[s.name]) for s in subjects]
    result = answers(lines, rows, target=target, margin=margin)
    notes += (*_edges(asked, rates), *_worse(result))
    _write(ground, result, notes, line, origin)
    return Relearned(place, subjects, None, result, notes)


def default_folder(domain: str) -> Path:
    """runs/relearn-DOMAIN, from the last part of its name."""
    return Path("runs") / f"relearn-{file_name(Path(domain).resolve().name)}"


def _run(
    ground: Ground, subjects: Sequence[Subject]
) -> tuple[Rows, dict[str, float], dict[str, list[dict[str, Any]]]]:
    """All that is not done, each subject after its own sweep: rows, rates and what was tried."""
    rows: Rows = []
    rates: dict[str, float] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    asked, seeds = ground.asked, seeds_of(ground)
    for number, subject in enumerate(subjects):
        several = asked.lrs if len(asked.lrs) > 1 else ()
        tried[subject.name] = []
        for lr in several:
            if not done(ground, attempt_name(subject, lr)):
                ground.console.print(f"{subject.name}: trying a learning rate of {lr:g}")
            tried[subject.name].append(attempted(ground, subject, lr))
        rates[subject.name] = chosen(tried[subject.name]) if several else asked.lrs[0]
        for n, seed in enumerate(seeds, 1):
            fresh = not done(ground, cell_name(subject, seed))
            if fresh:
                ground.console.print(
                    f"Run {number * len(seeds) + n} of {len(subjects) * len(seeds)}: "
                    f"{subject.name}, seed {seed}, learning rate {rates[subject.name]:g}"
                )
            rows += learnt(ground, subject, seed, rates[subject.name])["rows"]
            replaced(
                ground.work.place / "rows.jsonl", "".join(f"{json.dumps(r)}\n" for r in rows)
            )
            if fresh:
                ground.console.print(left_text(forecast(ground, subjects, None)))
    return rows, rates, tried


def _asked(
    recipe: Recipe, lrs: str | Sequence[float], seeds: int, sweep_share: float, points: int,
    margin: float,
) -> Asked:  # fmt: skip
    """What was asked for. Raises BadInput with all that is wrong."""
    found, rates = [], []
    listed = [p.strip() for p in lrs.split(",") if p.strip()] if isinstance(lrs, str) else lrs
    for text in listed:
        try:
            rates.append(float(text))
        except ValueError:
            rates.append(math.nan)
        if not 0 < rates[-1] < math.inf:
            found.append(f"--lrs must be numbers above 0, got {text!r}")
    if not rates or len({*rates}) < len(rates):
        found.append(f"--lrs must be at least one, none of them twice, got {lrs!r}")
    if recipe.recover.tokens < 1:
        found.append("--tokens must be above 0, e.g. 200k")
    if seeds < 1:
        found.append(f"--seeds must be at least 1, got {seeds}")
    if not 0 < sweep_share <= 1:
        found.append(f"--sweep-share must be above 0 and at most 1, got {sweep_share}")
    if points < 2:
        found.append(f"--points must be at least 2, got {points}")
    if not 0 <= margin < math.inf:
        found.append(f"--margin must be at least 0 nats per token, got {margin}")
    if processes.count() > 1:
        found.append(f"`relearn` runs in one process, and this is one of {processes.count()}")
    if found:
        raise BadInput(f"{found[0]}.") if len(found) == 1 else problems("the audit", found)
    return Asked(recipe.recover.tokens, tuple(rates), seeds, sweep_share, points)


def _settings(
    asked: Asked, recipe: Recipe, start: Inputs, subjects: Sequence[Subject]
) -> dict[str, Any]:
    """What has to be the same to go on; of the subjects, those that both calls have."""
    same = Job("prune", "", recipe.resolved()).same()
    kept = {key: same[key] for key in ("blocks", "train", "measure", "seed")}
    found = {
        "relearn": asdict(asked), **kept, "domain": dict(start.domain.sha256),
        "subjects": {s.name: s.sha256 or s.shape for s in subjects},
    }  # fmt: skip
    settings: dict[str, Any] = json.loads(json.dumps(found))
    return settings


def _check_place(place: Path) -> None:
    held = place.exists() and (not place.is_dir() or any(place.iterdir()))
    if held and not (place / WORK / "settings.json").is_file():
        raise BadInput(f"{place} exists already, and is no audit. Choose another --out.")


def _check_same(place: Path, settings: Mapping[str, Any]) -> None:
    """Raise BadInput where the folder holds an audit of other settings."""
    file = place / WORK / "settings.json"
    if not file.exists():
        return
    was, now = dict(read_manifest(file)), dict(settings)
    both = was["subjects"].keys() & now["subjects"].keys()
    for one in (was, now):  # runs may be added
        one["subjects"] = {name: one["subjects"][name] for name in both}
    if differ := work.differences(was, now):
        raise BadInput(
            f"{place} is an audit with other settings:\n"
            + "".join(f"  {line}\n" for line in differ)
            + "Go on with those, or choose another --out."
        )


def _begun(place: Path, settings: Mapping[str, Any]) -> Work:
    """The folder of what is done so far; new where there is none."""
    folder = place / WORK
    resumed = folder.exists()
    if not resumed:
        with written_whole(folder) as fresh:
            (fresh / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return Work(folder, place, False)
    was = read_manifest(folder / "settings.json")
    every = {**settings, "subjects": {**was["subjects"], **settings["subjects"]}}
    replaced(folder / "settings.json", json.dumps(every, indent=2))
    return Work(folder, place, True)


def _whole(
    recipe: Recipe, start: Inputs, left: Work, test: Blocks, console: Console, track: Track
) -> DocumentSums:
    """The whole model on held-out text before any training, measured once."""
    if (held := left.part("whole")) is not None:
        return DocumentSums(**held[0])
    console.print("Measuring the whole model")
    sums = sums_of(recipe, start.loaded.model, test, track)
    left.finish("whole", dict(vars(sums)), {"sha256": start.loaded.sha256})
    return sums


def _notes(recipe: Recipe, text: Blocks) -> tuple[str, ...]:
    there = text.tokens.numel()
    if recipe.recover.tokens <= there:
        return ()
    return (
        f"The training part has {there:,} tokens: {recipe.recover.tokens:,} are "
        f"{recipe.recover.tokens / there:.1f} times the same text, in another order each time.",
    )


def _edges(asked: Asked, rates: Mapping[str, float]) -> tuple[str, ...]:
    """A warning for rates at an end of the sweep: beyond it might be a better one."""
    if len(asked.lrs) < 3:
        return ()
    ends = {min(asked.lrs), max(asked.lrs)}
    at_end = [f"{name} ({lr:g})" for name, lr in rates.items() if lr in ends]
    if not at_end:
        return ()
    return (
        "The best learning rate is at an end of the sweep for "
        f"{', '.join(at_end)}: wider --lrs may do better.",
    )


def _worse(found: Answers) -> tuple[str, ...]:
    """A warning for those that training made worse, which says nothing of what is gone."""
    names = [
        line.subject.name for line in found.lines
        if line.curve[-1].loss.value > line.curve[0].loss.value
    ]  # fmt: skip
    if not names:
        return ()
    return (
        f"Training made {', '.join(names)} worse: that is a learning rate too high, and says "
        "nothing of what is gone. Try lower --lrs.",
    )


def _write(
    ground: Ground, result: Answers, notes: Sequence[str], line: str, origin: Mapping[str, Any]
) -> None:
    """Write relearn.json, relearn.md and the figure, each whole or not at all."""
    place, recipe = ground.work.place, ground.recipe
    told = {
        "format": FORMAT, "version": VERSION, "command": line, "versions": manifest.versions(),
        "domain": {
            "name": ground.domain.name, "sha256": dict(ground.domain.sha256),
            "test": {"part": "held_out", "sha256": ground.test.sha256,
                     "tokens": ground.test.tokens.numel()},
            "choice": {"part": "calibration", "sha256": ground.choice.sha256,
                       "tokens": ground.choice.tokens.numel()},
        },
        "whole": {"name": recipe.model.name, "sha256": origin["sha256"]},
        "settings": {**asdict(ground.asked), "train": recipe.resolved()["train"],
                     "blocks": recipe.resolved()["blocks"], "seed": recipe.seed},
        "threads": torch.get_num_threads(),
        "notes": list(notes), **result.to_dict(),
    }  # fmt: skip
    replaced(place / "relearn.json", json.dumps(told, indent=2, allow_nan=False) + "\n")
    drawn = False
    if find_spec("matplotlib") is not None:
        from .figure_relearn import draw

        figure = draw(result, ground.domain.name)
        replaced(place / "relearn.svg", figure.svg)
        replaced(place / "relearn.png", figure.png)
        drawn = True
    else:
        ground.console.print("No figure: pip install 'llm-narrow[report]'.")
    replaced(place / "relearn.md", markdown(result, ground.domain.name, notes, line, drawn=drawn))


def replaced(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    fresh.replace(file)
