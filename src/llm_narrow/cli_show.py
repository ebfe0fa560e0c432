"""The commands that look at what is there. Heavy imports are inside them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import matrix_options as comparing
from . import task_options as solving
from .options import (
    MACHINE,
    MEASUREMENT,
    ORIGIN,
    TEXT,
    AsJson,
    Debug,
    Given,
    Quiet,
    RecipeFile,
    answer,
    settled,
    taking,
    told_on,
)


@taking("domain", *TEXT, "trust_remote_code", *MEASUREMENT, *MACHINE)
def bench(
    given: Given,
    models: Annotated[list[str], typer.Argument(help="Run folders, aliases, hub ids, folders…")],
    recipe: RecipeFile = None,
    tasks: solving.Tasks = None,
    prompt: solving.Prompt = None,
    samples_per_task: solving.Samples = None,
    temperature: solving.Temperature = None,
    k: solving.K = None,
    limit: solving.Limit = None,
    max_new_tokens: solving.Longest = None,
    allow_unsandboxed: solving.Unsandboxed = False,
    matrix: comparing.Matrix = None,
    on: comparing.On = None,
    lm_eval: comparing.LmEval = None,
    include_path: comparing.Include = None,
    out: solving.Out = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure models side by side: on held-out text, by programs, on and off their domain."""
    asked: dict[str, Any] = {
        "prompt": prompt, "samples_per_task": samples_per_task, "temperature": temperature,
        "k": k, "limit": limit, "max_new_tokens": max_new_tokens,
        "allow_unsandboxed": allow_unsandboxed, "out": out,
    }  # fmt: skip
    others: dict[str, Any] = {"on": on, "include_path": include_path}
    mode = comparing.mode(others, tasks=tasks, matrix=matrix, lm_eval=lm_eval)
    if mode in ("matrix", "lm_eval"):
        comparing.check(mode, given, {**asked, **others, "recipe": recipe})
        common = _told({"limit": limit, "out": out}) | {"console": told_on(quiet)}
        own = {"model": models[0], **_told(given)}
        if matrix is not None:
            from . import matrix as compared

            settings = settled(recipe, own if recipe else {"domain": "python", **own})
            found = compared.bench(settings, models, sets=matrix, on=on, **common)
            return answer(json, found.facts(), found.shown())
        from . import harness

        common |= {"include_path": include_path, **_told(given)}
        ran = harness.bench(None, models, tasks=str(lm_eval), **common)
        return answer(json, ran.facts(), ran.shown())
    solving.check(tasks, {**given, **others}, recipe, asked)
    if tasks is not None:
        from . import bench_tasks

        taken = ("batch_size", "trust_remote_code", *MACHINE)
        asked |= {name: given[name] for name in taken}
        wanted = {name: value for name, value in asked.items() if value is not None}
        solved = bench_tasks.bench(None, models, sets=tasks, console=told_on(quiet), **wanted)
        return answer(json, solved.facts(), solved.shown())
    asked_for = settled(recipe, {**given, "model": models[0]})
    from . import benchmark, show

    result = benchmark.bench(asked_for, models, console=told_on(quiet))
    answer(json, result.facts(), show.bench(result))


def _told(given: Given) -> dict[str, Any]:
    """Only those whose flags were given."""
    return {name: value for name, value in given.items() if value is not None}


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders of them, such as a comparison.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to; the folder of a single run or comparison.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse runs that are missing or half-written.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write report.html, report.md, figures and a CSV of one run, or of several side by side."""
    from . import show
    from .outcome import reported

    result = reported(runs, out, strict=strict, console=told_on(quiet))
    answer(json, asdict(result), show.reported(result))


@taking(*ORIGIN)
def inspect(
    given: Given,
    model: Annotated[str, typer.Argument(help="An alias, a hub id, a folder or a .gguf file.")],
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of, what can be removed, and what that would save."""
    from . import anatomy, show

    revision = given["revision"]
    result = anatomy.inspect(
        model,
        revision=None if revision is None else str(revision),
        trust_remote_code=bool(given["trust_remote_code"]),
        console=told_on(quiet),
    )
    answer(json, result.facts(), show.inspected(result))


def models(json: AsJson = False, debug: Debug = False) -> None:
    """List the models that have a short name."""
    from . import show
    from .models import known

    rows = known()
    answer(json, {"models": [asdict(row) for row in rows]}, show.known_models(rows))


def domains(json: AsJson = False, debug: Debug = False) -> None:
    """List the domains that are known by name."""
    from . import show
    from .domains import known

    rows = known()
    answer(json, {"domains": [asdict(row) for row in rows]}, show.known_domains(rows))
