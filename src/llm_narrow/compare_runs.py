"""Narrowed models against distilled, from-scratch and random ones of the same shape: `compare`.

Each run is a run folder of its own below the comparison's. What is not finished is kept beside
them in `work`, so that the same call goes on where it was stopped, and nothing is done twice.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from . import compare_jobs, inputs, work
from . import recipe as recipes
from .claims import claimed
from .compare_answers import Answers, answers
from .compare_begin import WORK, foreseen, opened, progress, read
from .compare_cells import Ground, attempted, chosen, written
from .compare_cost import Forecast
from .compare_shapes import METHODS, Asked, Cell, Shape
from .compare_text import compared, left_text, markdown, planned
from .errors import BadInput
from .outcome import Before
from .recipe import Recipe
from .scores import CRITERIA


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
    jobs: int = 1,
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
    chosen from what was reached unless given. `jobs` processes share the runs. Writes run folders,
    compare.json and compare.md below `out`; with `dry_run` nothing.

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
    if jobs < 1:
        raise BadInput(f"--jobs must be at least 1, got {jobs}")
    place = Path(out)
    if dry_run:
        shapes, found = foreseen(recipe, asked, place, jobs, track)
        return Compared(None, tuple(shapes.values()), found, None)
    line = command or f"llm_narrow.compare({told})"
    ground, before = opened(recipe, asked, place, line, jobs, console, track)
    try:
        if jobs > 1:
            compare_jobs.run(ground, recipe, jobs)
        _run(ground, before)
    except BaseException as error:
        error.add_note("What is done is kept; go on with the same command.")
        raise
    found_answers = answers(
        [place / cell.name for cell in asked.cells(recipe.seed)], targets=targets
    )
    write(place, found_answers, line)
    return Compared(place, tuple(ground.shapes.values()), None, found_answers)


def join(recipe: Recipe, asked: Asked, place: Path, line: str, console: Console) -> None:
    """Do those runs of a comparison that has begun which no other process is at."""
    ground, before = opened(recipe, asked, place, line, 1, console, inputs.track_on(console))
    _run(ground, before, wait=False)


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
    held = read(settings)
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


def _run(ground: Ground, before: Before, *, wait: bool = True) -> None:
    """All runs that are not finished, each method and size after its own sweep.

    Those of a method and size that another process is at are left to it, with `wait` until it is
    done or gone.
    """
    cells = ground.asked.cells(ground.recipe.seed)
    left = list(dict.fromkeys((cell.method, cell.size) for cell in cells))
    told = False
    while left:
        busy = []
        for method, size in left:
            own = [cell for cell in cells if (cell.method, cell.size) == (method, size)]
            with claimed(ground.work.folder, own[0].name) as mine:
                if mine:
                    _alike(ground, own, before)
                else:
                    busy.append((method, size))
        left = busy if wait else []
        if left and not told:
            told = True
            ground.console.print(f"Waiting for another process, which is at {len(left)} of them")
        if left:
            time.sleep(compare_jobs.POLL)


def _alike(ground: Ground, cells: Sequence[Cell], before: Before) -> None:
    """The runs of one method and size that are not finished."""
    rate: float | None = None
    tried: list[dict[str, Any]] = []
    for cell in cells:
        place = ground.work.place / cell.name
        if (place / "manifest.json").is_file():
            shutil.rmtree(work.unfinished(place), ignore_errors=True)  # stopped right at its end
            continue
        if rate is None:
            for attempt in ground.asked.attempts(cell):
                ground.console.print(
                    f"{cell.method} at {cell.size}: trying a learning rate of {attempt.lr:g}"
                )
                tried.append(attempted(ground, attempt))
            rate = chosen(tried) if tried else ground.asked.lrs[0]
        ground.console.print(
            f"{cell.method} at {cell.size}, seed {cell.seed}, learning rate {rate:g}"
        )
        written(ground, cell, rate, before, tried)
        ground.console.print(left_text(progress(ground)))
