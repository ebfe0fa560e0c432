"""The command that writes a recipe. Heavy imports are inside it."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import BadInput
from .options import AsJson, Debug, Given, answer, flag, taking


@taking("model", "domain", "glob", "kinds", "forget", "recover_tokens")
def init(
    given: Given,
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    target: Annotated[
        str | None,
        typer.Option(help="Units to remove (0.5), or what to keep: 60%, 90M, 200MB."),
    ] = None,
    machine: Annotated[str | None, typer.Option(help="laptop, gpu or cluster.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Begin with a shipped recipe (see --list).")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Show the shipped recipes, and stop.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a recipe, and stop.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: defaults for what is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a recipe: a few questions, each with a default, or flags, or a shipped recipe."""
    if schema:
        from . import init_schema

        print(init_schema.text(), end="")
        return
    from . import init_show

    if listing:
        from .init_recipes import shipped

        found = shipped()
        return answer(json, {"recipes": [asdict(one) for one in found]}, init_show.listed(found))
    asks = not yes and template is None
    if asks and not sys.stdin.isatty():
        raise BadInput(
            "There is no terminal to ask on. Give --yes, with --model, --domain, --target and "
            "what else is not to be the default, or --template."
        )
    from rich.console import Console

    from .init import write

    names = ("model", "domain", "glob", "forget", "recover_tokens")
    told = {name: value for name in names if isinstance(value := given[name], str)}
    kinds = given["kinds"]
    done = write(
        file, {**told, "target": target, "machine": machine},
        kinds=kinds if isinstance(kinds, str) else None, template=template,
        console=Console(stderr=True) if asks else None, force=force, spell=flag,
    )  # fmt: skip
    answer(json, done.facts(), init_show.written(done))
