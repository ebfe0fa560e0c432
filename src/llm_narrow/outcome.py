"""What a run writes: the checkpoint, proved; the figures before and after; the run folder."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from . import benchmark, checkpoint, contrast, inputs, measure, processes, report
from . import rows as rowfile
from .blocks import Blocks
from .cache import written_whole
from .card import model_card
from .claims import held, is_held
from .contrast import Forgotten
from .errors import BadInput
from .inputs import Inputs
from .manifest import Clock
from .measure import DocumentSums
from .progress import Track
from .recipe import Recipe
from .rows import Row
from .trimming import Trimmed, write_map
from .units import Group, Keep

if TYPE_CHECKING:
    from .page import Written


DRAWING = ("matplotlib", "jinja2")  # what the extra `report` installs


@contextmanager
def run_folder(place: Path, *, force: bool) -> Iterator[Path]:
    """A folder that becomes `place` when all went well; one to throw away in other processes.

    Raises BadInput where `place` exists, unless `force` replaces it, and where another run is at
    work on it.
    """
    if force:
        check_replaceable(place)
    if processes.first():
        _sweep(place)
        with written_whole(place, force=force) as run, held(run):
            # Only now, lest two that begin at once both find nobody.
            for other in place.parent.glob(f".{place.name}.partial-*"):
                if other.name != run.name and is_held(other):
                    raise BadInput(
                        f"Process {other.name.rpartition('-')[2]} is at work on {place}. Wait for "
                        "it, or choose another --out."
                    )
            yield run
    else:
        with TemporaryDirectory() as thrown_away:
            yield Path(thrown_away)


def _sweep(place: Path) -> None:
    """Remove what runs that were killed have left half-written beside `place`."""
    for left in place.parent.glob(f".{place.name}.partial-*"):
        if is_held(left):  # by a run that is alive, maybe on another machine
            continue
        number = left.name.rpartition("-")[2]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OSError, ValueError):  # another's process, or no process' number
            continue


@dataclass(frozen=True)
class Before:
    """What was measured and written before the model was changed."""

    held_out: Blocks
    sums: DocumentSums
    row: Row
    prompts: tuple[str, ...]
    written: tuple[str, ...]
    forgotten: tuple[Forgotten, ...] = ()


def measured_before(
    recipe: Recipe, start: Inputs, facts: dict[str, Any], track: Track, clock: Clock,
    *, trimmed: bool = False,
) -> Before | None:  # fmt: skip
    """Measure the model as it is on the held-out part, and have it complete some prompts.

    Where its vocabulary was `trimmed` already the model of the recipe is loaded once more. The
    first process does; to the others, None is as good.
    """
    if not processes.first():
        return None
    with clock.stage("measure before"):
        if trimmed:
            loaded = inputs.model_of(recipe, recipe.model.name, track=track)
            start = replace(start, loaded=loaded)
        model, tokenizer = start.loaded.model, start.loaded.tokenizer
        held_out = inputs.held_out(start.loaded, start.domain, recipe, track=track)
        facts["domain"]["tokens"]["held_out"] = held_out.tokens.numel()
        sums = benchmark.known_sums(start.loaded, held_out, recipe, track)
        row = benchmark.row("before", start.loaded, sums, start.domain.name, recipe)
        prompts = inputs.prompts(start.loaded, held_out, recipe.measure.samples)
        written = [measure.complete(model, tokenizer, prompt) for prompt in prompts]
        forgotten = contrast.measured(start, recipe, track=track)
    return Before(held_out, sums, row, tuple(prompts), tuple(written), forgotten)


def finished(
    run: Path,
    place: Path,
    recipe: Recipe,
    start: Inputs,
    before: Before | None,
    facts: dict[str, Any],
    *,
    original_config: Any,
    groups: Sequence[Group],
    keep: Keep,
    track: Track,
    clock: Clock,
    trimmed: Trimmed | None = None,
) -> tuple[Row, ...]:
    """Save the changed model and prove it, measure it; what is learnt goes into `facts`.

    The first process does; the others have no rows.
    """
    if before is None:
        return ()
    model, tokenizer = start.loaded.model, start.loaded.tokenizer
    with clock.stage("save and verify"):
        saved = checkpoint.save(
            model,
            tokenizer,
            run / "model",
            original_config=original_config,
            groups=groups,
            keep=keep,
            files={"recipe.yaml": recipe.to_yaml()},
            pad=recipe.prune.layout == "padded",
        )
        write_map(start, run / "model")
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
    rows = [before.row]
    with clock.stage("measure after"):
        held_out = before.held_out
        if trimmed is not None:
            held_out = trimmed.translated(held_out, start)
        second = benchmark.document_sums(model, held_out, recipe, track)
        if before.forgotten:
            facts["forget"] = contrast.told(
                start, recipe, before.forgotten, (before.sums, second), trimmed, track=track
            )
        domain = start.domain.name
        rows.append(benchmark.row("after", narrow, second, domain, recipe, first=before.sums))
        facts["samples"] = [
            {"prompt": prompt, "before": old, "after": measure.complete(model, tokenizer, prompt)}
            for prompt, old in zip(before.prompts, before.written, strict=True)
        ]
    if recipe.measure.speed:
        with clock.stage("speed"):
            whole = inputs.model_of(recipe, recipe.model.name, track=track)
            rows = benchmark.timed(rows, {"before": whole.model, "after": model}, recipe, track)
    return tuple(rows)


def write_run(
    run: Path, recipe: Recipe, facts: Mapping[str, Any], rows: Sequence[Row], console: Console
) -> None:
    """Write the files of the run folder that tell about it, if it has been measured."""
    if not rows:
        return
    manifest = json.dumps(facts, indent=2, ensure_ascii=False)
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (run / "manifest.json").write_text(manifest, encoding="utf-8")
    (run / "model" / "manifest.json").write_text(manifest, encoding="utf-8")
    (run / "model" / "README.md").write_text(model_card(facts, rows), encoding="utf-8")
    rowfile.append(run / "rows.jsonl", rows)
    (run / "report.md").write_text(report.markdown(run), encoding="utf-8")
    if recipe.measure.report:
        draw(run, console)


def draw(run: Path, console: Console) -> None:
    """Write report.html with its figures, where what draws them is installed."""
    if any(find_spec(name) is None for name in DRAWING):
        console.print("No report.html: pip install 'llm-narrow[report]', then `llm-narrow report`.")
        return
    from .page import write

    for warning in write([run], run).warnings:
        console.print(warning, highlight=False)


def reported(
    runs: Sequence[Path], out: Path | None, *, strict: bool, console: Console
) -> "Written":
    """The report of run folders, as `llm-narrow report` writes it; of folders of such, of all.

    Raises BadInput where what draws it is not installed, and what `page.write` raises.
    """
    if out is None and len(runs) > 1:
        raise BadInput("A report of several runs needs a folder of its own: give --out.")
    if any(find_spec(name) is None for name in DRAWING):
        raise BadInput("Reports are drawn with more packages: pip install 'llm-narrow[report]'.")
    from .compare_runs import runs_of
    from .page import write

    found = [run for folder in runs for run in runs_of(folder)]
    console.print(f"Reporting {len(found)} run{'s' * (len(found) > 1)}")
    return write(found, out or runs[0], strict=strict)


def take_training(run: Path, folder: Path) -> None:
    """Copy the records of the training from the folder of the unfinished run."""
    for path in sorted(folder.glob("*.jsonl")):
        shutil.copyfile(path, run / path.name)
    if (folder / "logs").is_dir():
        shutil.copytree(folder / "logs", run / "logs")


def check_replaceable(place: Path) -> None:
    """Refuse to replace a folder that no run wrote: it would be lost."""
    if place.is_dir() and any(place.iterdir()) and not (place / "manifest.json").is_file():
        raise BadInput(
            f"{place} is not a run folder (it has no manifest.json) and is not replaced, even with "
            "--force. Choose another --out."
        )
