"""The commands that prove what a narrowed model is and is not. Heavy imports are inside them."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    TEXT,
    TRAINING,
    AsJson,
    Debug,
    Given,
    Quiet,
    answer,
    flag,
    line_of,
    taking,
    told_on,
)

# What the audit decides itself is no setting here.
RELEARNING = (
    *TEXT, "trust_remote_code",
    *(n for n in TRAINING if n not in ("distill", "teacher", "temperature", "mix", "top_k",
                                       "sharded")),
    "held_out_tokens", "seed", "device",
)  # fmt: skip


@taking(*RELEARNING)
def relearn(
    context: typer.Context,
    given: Given,
    runs: Annotated[list[Path], typer.Argument(help="Run folders: by score, lasso, random, …")],
    domain: Annotated[str, typer.Option(help="The lost domain: known, a folder, file or hub id.")],
    tokens: Annotated[str, typer.Option(help="Tokens that each is trained on.", metavar="TOKENS")],
    out: Annotated[
        Path | None, typer.Option(help="The folder of the audit; runs/relearn-DOMAIN unless given.")
    ] = None,
    whole: Annotated[
        str | None, typer.Option(help="The whole model, where the runs' own name has moved.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each model.")] = 2,
    lrs: Annotated[
        str, typer.Option(help="Learning rates to choose from, for each.")
    ] = "1e-4,3e-4,1e-3",
    sweep_share: Annotated[
        float, typer.Option(help="Share of the tokens that each rate is tried on.")
    ] = 0.2,
    points: Annotated[int, typer.Option(help="Looks at held-out text on the way.")] = 8,
    target: Annotated[
        str | None, typer.Option(help="The loss to come to: whole, scratch, or nats per token.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Nats per token above the whole model's loss that will do.")
    ] = 0.1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and how long they take, and stop.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train models on a domain that was lost, and count the tokens until it is back."""
    from . import relearn as audit

    result = audit.relearn(
        runs, domain=domain, tokens=tokens, out=out, whole=whole, seeds=seeds, lrs=lrs,
        sweep_share=sweep_share, points=points, target=target, margin=margin, dry_run=dry_run,
        command=line_of(context), console=told_on(quiet),
        spell=lambda name: "--tokens" if name == "recover_tokens" else flag(name), **given,
    )  # fmt: skip
    answer(json, result.facts(), result.shown())


def certify(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    matrix: Annotated[
        Path | None, typer.Option(help="The matrix.json of `bench --matrix` for this model.")
    ] = None,
    relearn: Annotated[
        list[Path] | None, typer.Option(help="The folder of an audit (`relearn`); repeatable.")
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="What `bench WHOLE RUN --json` printed, for the speed.")
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write certificate.json and certificate.md of a run, and a section of its model card."""
    from . import certificate

    result = certificate.certify(
        run, matrix=matrix, relearn=relearn or (), bench=bench, command=line_of(context)
    )
    answer(json, result.facts(), result.shown())


def gate(
    run: Annotated[Path, typer.Argument(help="The run folder, certified where limits need it.")],
    max_on_domain_loss: Annotated[
        str | None, typer.Option(help="Most relative increase of bits per byte, e.g. 2%.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Least speed-up, of prefill and decoding both.")
    ] = None,
    min_selectivity: Annotated[
        float | None, typer.Option(help="Least increase of loss off the domain ÷ on it.")
    ] = None,
    min_relearning: Annotated[
        float | None, typer.Option(help="Least tokens to relearn ÷ those of fresh weights.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Most bytes of weights, e.g. 200MB.")] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hold a run against limits: exit code 0 if all are kept, 1 if one is missed, 2 bad input."""
    from . import gate as limits

    result = limits.gate(
        run, max_on_domain_loss=max_on_domain_loss, min_speedup=min_speedup,
        min_selectivity=min_selectivity, min_relearning=min_relearning, max_size=max_size,
    )  # fmt: skip
    answer(json, result.facts(), result.shown())
    if not result.passed:
        raise typer.Exit(1)
