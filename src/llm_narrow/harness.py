"""Tasks of an installed lm-evaluation-harness, run on our models: `bench --lm-eval`.

It loads nothing of its own accord: models are opened as everywhere here, so that run folders,
uneven ones and .gguf files do too. Its tasks come from the hub; those of a folder with YAML files
need no network.
"""

import difflib
import importlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import inputs
from .errors import BadInput, UnknownName, Unreachable, first_line, problems
from .recipe import Recipe

SUMMARY = "lm_eval.json"
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Harnessed:
    """What lm-evaluation-harness found, as it tells it: `results` by model, task and metric."""

    version: str
    results: dict[str, dict[str, dict[str, Any]]]
    folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What `--json` prints and lm_eval.json holds."""
        return {"lm_eval": self.version, "results": self.results}

    def shown(self) -> RenderableType:
        """A line for each task and metric, a column for each model; ± is 1.96 standard errors."""
        table = Table(
            title=f"lm-evaluation-harness {self.version}", title_justify="left",
            box=box.SIMPLE_HEAD, pad_edge=False,
        )  # fmt: skip
        for number, column in enumerate(["task", "metric", *self.results]):
            table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
        lines: dict[tuple[str, str], None] = {}
        for tasks in self.results.values():
            for task, found in tasks.items():
                lines |= {(task, metric): None for metric in found if _is_metric(found, metric)}
        for task, metric in lines:
            cells = [_told(tasks.get(task, {}), metric) for tasks in self.results.values()]
            table.add_row(*map(Text, [task, metric.removesuffix(",none"), *cells]))
        where = [Text(f"Written: {self.folder / SUMMARY}")] if self.folder else []
        return Group(table, *where)


def _is_metric(found: dict[str, Any], metric: str) -> bool:
    value = found[metric]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and "," in metric and "_stderr," not in metric


def _told(found: dict[str, Any], metric: str) -> str:
    if metric not in found:
        return "-"
    name, _, kept = metric.partition(",")
    error = found.get(f"{name}_stderr,{kept}")
    spread = f" ± {Z * error:.4f}" if isinstance(error, float) else ""
    return f"{found[metric]:.4f}{spread}"


def bench(
    recipe: Recipe | Path | str | None = None,
    names: Sequence[str] = (),
    *,
    tasks: str | Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    out: Path | None = None,
    console: Console | None = None,
    **given: object,
) -> Harnessed:
    """Run tasks of lm-evaluation-harness on models; `include_path` has tasks of one's own.

    Raises BadInput where it is not installed, UnknownName for a task that it does not have, and
    Unreachable where the data of a task cannot be fetched.
    """
    asked = [t.strip() for t in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    _check(names, asked, include_path, limit, out)
    evaluator, hf, finding, version = installed()
    if not isinstance(recipe, Recipe):
        given = {"domain": "python", **given, "model": names[0]}  # no domain is read
    recipe, console, track = inputs.begin(recipe, given, console)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = finding.TaskManager(include_path=None if include_path is None else str(include_path))
    for name in asked:
        if not any(fnmatch(one, name) for one in known.all_tasks):
            hint = "A folder of your own tasks can be given with --include-path."
            raise UnknownName("Task of lm-eval", name, _near(name, known.all_tasks), hint)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        one = inputs.model_of(recipe, name, track=track)
        console.print(Text(f"lm-eval: {name}"))
        harnessed = hf.HFLM(
            pretrained=one.model, tokenizer=one.tokenizer, batch_size=recipe.blocks.batch_size,
            backend="causal",
        )  # fmt: skip
        try:
            found = evaluator.simple_evaluate(
                model=harnessed, tasks=known.match_tasks(asked), limit=limit,
                task_manager=known, log_samples=False, random_seed=recipe.seed,
                numpy_random_seed=recipe.seed, torch_random_seed=recipe.seed,
                fewshot_random_seed=recipe.seed,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise _failed(error, asked) from error
        results[name] = found["results"]
    result = Harnessed(version, results, out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        fresh = out / f".{SUMMARY}.{os.getpid()}"
        fresh.write_text(json.dumps(result.facts(), indent=2, default=str), encoding="utf-8")
        fresh.replace(out / SUMMARY)
    return result


def installed() -> tuple[Any, Any, Any, str]:
    """Its modules that run tasks, wrap models and find tasks, and its version.

    Raises BadInput where it is not installed.
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        names = ("evaluator", "models.huggingface", "tasks")
        found = [importlib.import_module(f"lm_eval.{name}") for name in names]
        return found[0], found[1], found[2], version_of("lm-eval")
    except (ImportError, PackageNotFoundError) as error:
        raise BadInput(
            f"--lm-eval needs lm-evaluation-harness, which is not installed ({first_line(error)}) "
            "Install it: pip install 'llm-narrow[lm-eval]', in an environment of its own if its "
            "pins are against yours. --matrix needs no extra."
        ) from error


def _check(
    names: Sequence[str],
    asked: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    out: Path | None,
) -> None:
    wrong = [
        f"no {what} is given; give at least one"
        for what, given in (("model", names), ("task of --lm-eval", asked))
        if not given or not all(given)
    ]
    if len(set(names)) < len(names):
        wrong.append("a model is named twice; name each once")
    if include_path is not None and not include_path.is_dir():
        wrong.append(f"--include-path {include_path} is no folder; give one with YAML files")
    if limit is not None and limit < 1:
        wrong.append(f"--limit must be at least 1, got {limit}")
    if out is not None and out.exists() and not out.is_dir():
        wrong.append(f"{out} is a file; give --out a folder")
    if wrong:
        raise problems("bench --lm-eval", wrong)


def _near(name: str, known: Sequence[str]) -> list[str]:
    """The nearest names: there are thousands."""
    return difflib.get_close_matches(name, known, n=5, cutoff=0.4)


def _failed(error: Exception, asked: Sequence[str]) -> BadInput | Unreachable:
    """Of what went wrong inside, what the user can mend."""
    told = f"lm-eval could not run {', '.join(asked)}: {first_line(error)}"
    if isinstance(error, OSError):
        return Unreachable(
            f"{told} With a network try again; without one give tasks whose data are local files "
            "(--include-path)."
        )
    return BadInput(f"{told} See its documentation, or leave the task out.")
