"""The commands that make something: models, runs, scores. Heavy imports are inside them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import compare_options as comparing
from .options import (
    LASSO,
    MACHINE,
    MEASUREMENT,
    ORIGIN,
    RECOVERY,
    REFIT,
    SCORING,
    SHOWN,
    SIZE,
    SOURCE,
    TEXT,
    TRAINING,
    AsJson,
    Debug,
    Force,
    Given,
    Quiet,
    RecipeFile,
    answer,
    flag,
    line_of,
    settled,
    taking,
    told_on,
)

PRUNE = (*SOURCE, *SIZE, *TEXT, *ORIGIN, *SCORING, *REFIT, "forget_refit")


@taking(
    *PRUNE, "method", *LASSO, "fill", "recover_tokens", *RECOVERY, *TRAINING, *MEASUREMENT,
    *SHOWN, *MACHINE,
)  # fmt: skip
def prune(
    context: typer.Context,
    given: Given,
    recipe: RecipeFile = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/MODEL-DOMAIN-SIZE unless given.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Score, print the plan, and stop.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="Use the scores of this file (see `score`).")
    ] = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Remove what the domain does not need, repair the rest, and prove it on held-out text."""
    sizes = [size.strip() for size in str(given["target_params"] or "").split(",")]
    # All are read before anything runs.
    asked_for = [settled(recipe, {**given, "target_params": size or None}) for size in sizes]
    from rich.console import Group

    from . import show, stages

    results = [
        stages.prune(
            one,
            out=out if out is None or len(sizes) == 1 else out / size.replace("%", "-percent"),
            force=force,
            dry_run=dry_run,
            scores=scores,
            command=line_of(context),
            console=told_on(quiet),
        )
        for one, size in zip(asked_for, sizes, strict=True)
    ]
    facts = [result.facts() for result in results]
    answer(
        json,
        facts[0] if len(facts) == 1 else {"runs": facts},
        Group(*(show.pruned(result) for result in results)),
    )


@taking(
    *SOURCE, "sparsity", "target_params", "allocation", "multiple", *TEXT, *ORIGIN, *SCORING,
    *LASSO, *TRAINING, *MEASUREMENT, *SHOWN, *MACHINE,
)  # fmt: skip
def regularize(
    context: typer.Context,
    given: Given,
    recipe: RecipeFile = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/MODEL-DOMAIN-SIZE unless given.")
    ] = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw units to zero by training, and take out those that are zero, which changes nothing."""
    only = {"method": "lasso", "fill": False, "refit": False, "recover_tokens": 0}
    asked_for = settled(recipe, {**given, **only})
    from . import show, stages

    result = stages.prune(
        asked_for, out=out, force=force, command=line_of(context), console=told_on(quiet)
    )
    answer(json, result.facts(), show.pruned(result))


@taking("domain", *TEXT, *ORIGIN, *RECOVERY, *TRAINING, *MEASUREMENT, *SHOWN, *MACHINE)
def recover(
    context: typer.Context,
    given: Given,
    model: Annotated[str, typer.Argument(help="A run folder, an alias, a hub id, a folder…")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, e.g. 200k.", metavar="TOKENS")],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    recipe: RecipeFile = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a narrowed model on its domain; settings not given are those of its run."""
    from . import recovery

    file, own = recovery.origin(model)
    asked = {name: value for name, value in given.items() if value is not None}
    asked_for = settled(
        recipe or file,
        {**own, **asked, "model": model, "recover_tokens": tokens},
        lambda name: "--tokens" if name == "recover_tokens" else flag(name),
    )
    from . import show

    result = recovery.recover(
        asked_for, out=out, force=force, command=line_of(context), console=told_on(quiet)
    )
    answer(json, result.facts(), show.pruned(result))


def resume(
    run: Annotated[Path, typer.Argument(help="The run folder that --out named.")],
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped, to the result that it would have had."""
    from . import recovery, show

    result = recovery.resume(run, console=told_on(quiet))
    answer(json, result.facts(), show.pruned(result))


@taking(*SOURCE, *TEXT, *ORIGIN, *SCORING, *MACHINE)
def score(
    given: Given,
    out: Annotated[Path, typer.Option(help="The score file to write, .safetensors.")],
    recipe: RecipeFile = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score the units once; `prune --scores FILE` then cuts to any size in seconds."""
    asked_for = settled(recipe, given)
    from . import show, stages

    result = stages.score(asked_for, out=out, force=force, console=told_on(quiet))
    answer(json, result.facts(), show.scored(result))


@taking(*comparing.SETTINGS)
def compare(
    context: typer.Context,
    given: Given,
    recipe: RecipeFile = None,
    sizes: comparing.Sizes = "",
    tokens: comparing.Tokens = None,
    seeds: comparing.Seeds = 2,
    methods: comparing.Methods = "oneshot,lasso,random,distilled,scratch",
    lrs: comparing.Rates = "1e-4,3e-4,1e-3",
    sweep_share: comparing.Share = 0.2,
    targets: comparing.Targets = None,
    source: comparing.From = None,
    strict: comparing.Strict = False,
    jobs: comparing.Jobs = 1,
    out: comparing.Out = None,
    dry_run: comparing.DryRun = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train narrowed, distilled, from-scratch and random models of the same shape alike."""
    from . import compare_runs as comparison

    line = line_of(context)
    if source:
        result = comparison.recompute(source, out=out, targets=targets, strict=strict, command=line)
        return answer(json, result.facts(), result.shown())
    if not (sizes and tokens and out):
        raise typer.BadParameter("--sizes, --tokens and --out are needed, or --from.")
    spelled, asked = {"recover_tokens": "--tokens"}, {**given, "recover_tokens": tokens}
    result = comparison.compare(
        settled(recipe, asked, lambda name: spelled.get(name) or flag(name)),
        sizes=sizes, tokens=tokens, out=out, seeds=seeds, methods=methods, lrs=lrs,
        sweep_share=sweep_share, targets=targets, jobs=jobs, dry_run=dry_run, command=line,
        console=told_on(quiet),
    )  # fmt: skip
    answer(json, result.facts(), result.shown())


def convert(
    model: Annotated[Path, typer.Argument(help="A run folder, or a model folder.")],
    layout: Annotated[str, typer.Option(help="padded (stock transformers opens it) or uneven.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model of uneven layers in another layout, and prove that it says the same."""
    from dataclasses import asdict

    from . import layouts, show
    from .inputs import track_on

    done = layouts.convert(model, layout, out, force=force, track=track_on(told_on(quiet)))
    answer(json, {"folder": str(out), **asdict(done)}, show.converted(done, out))


def export(
    model: Annotated[Path, typer.Argument(help="A run folder, or a model folder.")],
    out: Annotated[Path, typer.Option(help="The file to write, e.g. narrow.gguf.")],
    to: Annotated[str, typer.Option(help="The format: gguf, for llama.cpp.")] = "gguf",
    quantize: Annotated[str, typer.Option(help="f32, f16, bf16, q8_0 or q4_0.")] = "f16",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Have llama.cpp say the same as here.")
    ] = True,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model for another runtime, and check that it says the same there."""
    from . import show, to_gguf
    from .errors import UnknownName
    from .inputs import track_on

    if to != "gguf":
        raise UnknownName("Format", to, ["gguf"])
    track = track_on(told_on(quiet))
    result = to_gguf.export(model, out, quantize=quantize, force=force, check=check, track=track)
    answer(json, asdict(result), show.exported(result))
