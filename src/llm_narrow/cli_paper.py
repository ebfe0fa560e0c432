"""The command `paper`. Heavy imports are inside it."""

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Debug, Quiet, answer, told_on


def paper(
    what: Annotated[
        str, typer.Argument(help="list (all claims), run (some of them) or page (docs/paper.md).")
    ] = "list",
    rows: Annotated[
        list[str] | None, typer.Argument(help="Names or numbers of claims; all unless given.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quick (two cores) or paper (its own setting, for GPUs). To run: quick unless "
            "given. To judge: paper where there are results of it, else quick."
        ),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="The folder of all results, with one for each preset.")
    ] = Path("runs") / "paper",
    out: Annotated[
        Path, typer.Option(help="The page to write; its figures go into a folder beside it.")
    ] = Path("docs") / "paper.md",
    force: Annotated[
        bool, typer.Option("--force", help="Run what is finished again, from nothing.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what holds of the paper's claims here; run them, and write the page."""
    from . import paper as claims
    from .errors import UnknownName

    names = rows or []
    if what == "run":
        found = claims.run(
            names, results=results, preset=preset or "quick", force=force, console=told_on(quiet)
        )
        return answer(json, found.facts(), found.shown())
    if what not in ("list", "page"):
        raise UnknownName("paper", what, ("list", "run", "page"), "To run a claim: paper run NAME.")
    found = claims.judged(results, names, preset=preset)
    if what == "list":
        return answer(json, found.facts(), found.shown())
    from . import paper_page

    written = [str(file) for file in paper_page.write(found, out)]
    return answer(json, {"written": written}, f"Written: {', '.join(written)}")
