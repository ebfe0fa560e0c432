"""The command `prices`. Heavy imports are inside it."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    MACHINE,
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


@taking("domain", *TEXT, *ORIGIN, "criterion", "calibration_tokens", "damping", *MACHINE)
def prices(
    given: Given,
    model: Annotated[str, typer.Argument(help="An alias, a hub id, a folder or a .gguf file.")],
    recipe: RecipeFile = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="neurons, heads, experts, attention, mlp, layers, vocabulary, query_heads, "
            "channels; all unless given."
        ),
    ] = None,
    blocks: Annotated[int, typer.Option(help="Blocks to measure each removal on.", min=1)] = 6,
    fit_tokens: Annotated[int, typer.Option(help="Tokens to refit each on.", min=1)] = 16384,
    curves: Annotated[
        int, typer.Option(help="Layers whose neurons are tried at several shares.", min=1)
    ] = 4,
    sizes: Annotated[
        str | None, typer.Option(help="Show what sizes would buy, e.g. 80%,60%,40%.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the list, as .svg or .png.", dir_okay=False)
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what everything in a model costs to remove, before anything is cut."""
    from . import pricing
    from .errors import BadInput

    if figure is not None and figure.suffix not in (".svg", ".png"):
        raise BadInput(f"--figure must end with .svg or .png, got {figure}.")
    result = pricing.prices(
        settled(recipe, {**given, "model": model}), kinds=kinds, blocks=blocks,
        fit_tokens=fit_tokens, curves=curves, sizes=sizes or (), console=told_on(quiet),
    )  # fmt: skip
    if figure is not None:
        drawn = result.drawn()
        data = drawn.svg.encode() if figure.suffix == ".svg" else drawn.png
        figure.write_bytes(data)
    answer(json, result.facts(), result.shown())
