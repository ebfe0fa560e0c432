"""The command that puts a run on the hub. Heavy imports are inside it."""

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Debug, Quiet, answer, told_on


def push(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    repo: Annotated[str, typer.Argument(help="The model on the hub: user/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it; private unless given.")
    ] = False,
    branch: Annotated[
        str, typer.Option("--branch", "--revision", help="The branch, made if need be.")
    ] = "main",
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the whole model, where the run does not know it.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the whole model, e.g. apache-2.0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would go up and what not, and stop.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put the checkpoint of a run, with its card, on the hub. `--model user/name` takes it back."""
    from . import push as pushing

    result = pushing.push(
        run, repo, public=public, branch=branch, message=message, base_model=base_model,
        license=license, dry_run=dry_run, console=told_on(quiet),
    )  # fmt: skip
    answer(json, result.facts(), result.shown())
