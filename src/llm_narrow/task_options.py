"""The flags of `bench --tasks`. Imports nothing heavy: this is read for `--help`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .errors import BadInput
from .options import MEASUREMENT, TEXT, Given, flag

Tasks = Annotated[
    str | None,
    typer.Option(help="Have programs written instead: humaneval,mbpp, a .jsonl, a hub data set."),
]
Prompt = Annotated[str | None, typer.Option(help="With --tasks: chat, raw or both.")]
Samples = Annotated[
    int | None, typer.Option(help="With --tasks: also draw so many answers of each problem.")
]
Temperature = Annotated[float | None, typer.Option(help="Of these samples; 0.8 unless given.")]
K = Annotated[str | None, typer.Option(help="The k of pass@k, e.g. 1,5,10.", metavar="NUMBERS")]
Limit = Annotated[
    int | None, typer.Option(help="Only the first so many of each set (--matrix: 200).")
]
Longest = Annotated[
    int | None, typer.Option(help="With --tasks: the most tokens of an answer; 512 unless given.")
]
Unsandboxed = Annotated[
    bool, typer.Option("--allow-unsandboxed", help="Run programs without all protections.")
]
Out = Annotated[Path | None, typer.Option(help="A folder for answers and scores; else the cache.")]

# What `--tasks` has no use for: what held-out text is read and measured by, and other benchmarks.
OF_TEXT = (
    "domain", *(name for name in TEXT if name != "batch_size"), *MEASUREMENT,
    "matrix", "on", "lm_eval", "include_path",
)  # fmt: skip


def check(tasks: str | None, given: Given, recipe: Path | None, own: Mapping[str, object]) -> None:
    """Refuse flags that would do nothing: of text with `tasks`, of problems (`own`) without."""
    if tasks is None:
        idle = [flag(name) for name, v in own.items() if v is not None and v is not False]
        rule, way = "is about problems to solve", "Give --tasks too, e.g. --tasks humaneval,mbpp"
    else:
        idle = [flag(name) for name in OF_TEXT if given.get(name) is not None]
        idle += ["--recipe"] if recipe is not None else []
        rule, way = "is about held-out text, and --tasks about problems", "Run `bench` for each"
    if idle:
        raise BadInput(f"{' and '.join(idle)} {rule}. {way}, or leave it out.")
