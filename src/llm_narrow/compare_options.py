"""The flags of `compare` that are no settings of a recipe, and which settings it takes.

Imports nothing heavy: this is read for `--help`.
"""

from pathlib import Path
from typing import Annotated

import typer

from .options import LASSO, MACHINE, ORIGIN, REFIT, SCORING, SOURCE, TEXT, TRAINING

# What the sizes, the tokens and the sweep decide is no setting here.
SETTINGS = (
    *SOURCE, *TEXT, *ORIGIN, *SCORING, "multiple", *REFIT, "lasso_tokens",
    *(name for name in LASSO if name not in ("lasso_tokens", "lasso_lr")),
    *TRAINING, "held_out_tokens", "samples", *MACHINE,
)  # fmt: skip

Sizes = Annotated[str, typer.Option(help="Parameters to end with: 70%,50%,35%, or 90M.")]
Tokens = Annotated[
    str | None, typer.Option(help="Tokens that each run is trained on.", metavar="TOKENS")
]
Seeds = Annotated[int, typer.Option(help="Runs of each method and size.")]
Methods = Annotated[str, typer.Option(help="Of oneshot, lasso, random, distilled, scratch.")]
Rates = Annotated[str, typer.Option(help="Learning rates to choose from, per method and size.")]
Share = Annotated[float, typer.Option(help="Share of the tokens that each rate is tried on.")]
Targets = Annotated[
    list[float] | None,
    typer.Option("--target", help="A loss to ask tokens and size for; repeatable."),
]
From = Annotated[
    list[Path] | None,
    typer.Option("--from", help="Only answer, from these runs or comparisons; repeatable."),
]
Strict = Annotated[bool, typer.Option(help="With --from: refuse missing and half-written runs.")]
Jobs = Annotated[int, typer.Option(help="Processes that share the runs; on GPUs, one each.")]
Out = Annotated[Path | None, typer.Option(help="The folder of all runs.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the runs and how long they take, and stop.")
]
