"""The command `explain`. Heavy imports are inside it."""

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Debug, Given, Quiet, answer, flag, taking, told_on


@taking("batch_size", "device")
def explain(
    given: Given,
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of its domain to read; 16k unless given.", metavar="TOKENS"),
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="neurons, heads; those that lost units unless given.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="Units to explain, e.g. 3.neurons.120,5.heads.1.")
    ] = None,
    each: Annotated[int, typer.Option(help="Units of each kind, kept and removed each.")] = 6,
    snippets: Annotated[int, typer.Option(help="Snippets of text for each unit.")] = 5,
    context: Annotated[int, typer.Option(help="Tokens shown on either side.")] = 24,
    scores: Annotated[
        Path | None, typer.Option(help="A score file to choose by, where the run has none.")
    ] = None,
    whole: Annotated[
        str | None, typer.Option(help="The whole model, where the run's own name has moved.")
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the text that uses removed and kept units most, and add it to the run's report."""
    from . import explain as explaining

    result = explaining.explain(
        run, tokens=tokens, kinds=kinds, units=units, each=each, snippets=snippets,
        context=context, scores=scores, whole=whole, console=told_on(quiet), spell=flag, **given,
    )  # fmt: skip
    answer(json, result.facts(), result.shown())
