"""The flags of `bench --matrix` and `bench --lm-eval`. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .errors import BadInput
from .options import MACHINE, TEXT, Given, flag

Matrix = Annotated[
    str | None,
    typer.Option(
        help="Compare on and off the domain instead: all, or domain,code,prose,knowledge, sets of "
        "these, a .jsonl, a hub data set.",
        metavar="SETS",
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        help="With --matrix: sets that are the domain's too; mbpp-python where it is Python.",
        metavar="SETS",
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(help="Run tasks of an installed lm-evaluation-harness instead.", metavar="TASKS"),
]
Include = Annotated[
    Path | None, typer.Option(help="With --lm-eval: a folder of your own YAML tasks.")
]

SHARED = ("batch_size", "trust_remote_code", *MACHINE)
OF_MATRIX = ("domain", *TEXT, *SHARED, "limit", "out", "on", "recipe")
OF_LM_EVAL = (*SHARED, "limit", "out", "include_path")


def mode(others: Mapping[str, object], **asked: str | None) -> str | None:
    """Which of the benchmarks is asked for; None for held-out text.

    Raises BadInput for two of them, and where `others`, the flags of one, come with none.
    """
    found = [name for name, value in asked.items() if value is not None]
    if len(found) > 1:
        flags = " and ".join(map(flag, found))
        raise BadInput(f"{flags} are benchmarks of their own. Run `bench` for each.")
    if not found:
        for name, of in (("on", "--matrix all"), ("include_path", "--lm-eval TASKS")):
            if others[name] is not None:
                raise BadInput(f"{flag(name)} does nothing alone. Give {of} too.")
    return found[0] if found else None


def check(name: str, given: Given, own: Mapping[str, object]) -> None:
    """Refuse flags that would do nothing with --matrix or --lm-eval; `own` are those of `bench`."""
    taken = {"matrix": OF_MATRIX, "lm_eval": OF_LM_EVAL}[name]
    every = {**given, **own}
    idle = [f for f, v in every.items() if v is not None and f not in taken]
    idle = [flag(f) for f in idle if f != "allow_unsandboxed" or every[f]]
    if idle:
        raise BadInput(f"{' and '.join(idle)} does nothing with {flag(name)}; leave it out.")
