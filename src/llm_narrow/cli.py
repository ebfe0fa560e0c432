"""The command line: parses, calls one stage, prints its result.

The result of a command goes to stdout, as tables or (`--json`) as JSON; everything else goes to
stderr. Heavy imports are inside the commands, so that `--help` is instant.

Exit codes: 0 done, 2 bad input or usage (one red line; `--debug` for the traceback), 130 Ctrl-C.
"""

import errno
import json as json_text
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import __doc__ as about
from .errors import NarrowError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .recipe import Recipe

app = typer.Typer(
    help=(about or "").splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[
    str | None,
    typer.Option("--model", help="An alias (see `models`), a hub id, a folder or a .gguf file."),
]
DomainName = Annotated[
    str | None,
    typer.Option(
        "--domain", help="A known domain (see `domains`), a folder, a file or a hub data set."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML recipe; flags are laid over it.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code that the model brings."),
]
Glob = Annotated[
    str | None, typer.Option(help="Which files of a folder, e.g. '**/*.rs'.", metavar="PATTERN")
]
TextColumn = Annotated[str | None, typer.Option(help="The column that holds the text.")]
ProjectColumn = Annotated[
    str | None, typer.Option(help="The column that says which project a text is of.")
]
MaxDocuments = Annotated[int | None, typer.Option(help="Read at most so many documents.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a block.")]
BatchSize = Annotated[int | None, typer.Option(help="Blocks fed to the model at once.")]
Criterion = Annotated[str | None, typer.Option(help="How units are scored.")]
CalibrationTokens = Annotated[int | None, typer.Option(help="Tokens to score and refit on.")]
Kinds = Annotated[str | None, typer.Option(help="What may go: neurons, heads.")]
HeldOutTokens = Annotated[int | None, typer.Option(help="Tokens to measure on.")]
Speed = Annotated[
    bool | None,
    typer.Option("--speed/--no-speed", help="Measure tokens/s."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every choice.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="A traceback with errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what --out names.")]


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"llm-narrow {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prune(
    context: typer.Context,
    model: ModelName = None,
    domain: DomainName = None,
    recipe: RecipeFile = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/MODEL-DOMAIN-SIZE unless given.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Share to remove: 0.5 (the default), or e.g. neurons=0.5,heads=0.2."),
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(help="Parameters to keep instead: 60%, 90M or a number.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Score, print the plan, and stop.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="Use the scores of this file (see `score`).")
    ] = None,
    glob: Glob = None,
    text_column: TextColumn = None,
    project_column: ProjectColumn = None,
    max_documents: MaxDocuments = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    criterion: Criterion = None,
    calibration_tokens: CalibrationTokens = None,
    kinds: Kinds = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="uniform (same in every layer) or global."),
    ] = None,
    multiple: Annotated[int | None, typer.Option(help="Widths are multiples of it.")] = None,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Repair what is left."),
    ] = None,
    damping: Annotated[float | None, typer.Option(help="How strongly refit stays put.")] = None,
    recover_tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on afterwards.")
    ] = None,
    length: Length = None,
    batch_size: BatchSize = None,
    held_out_tokens: HeldOutTokens = None,
    speed: Speed = None,
    samples: Annotated[int | None, typer.Option(help="Completions to show.")] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Remove what the domain does not need, refit the rest, and prove it on held-out text."""
    settled = _recipe(recipe, locals())
    from . import show, stages

    result = stages.prune(
        settled,
        out=out,
        force=force,
        dry_run=dry_run,
        scores=scores,
        command=shlex.join(["llm-narrow", *context.obj]),
        console=_console(quiet),
    )
    _print(json, result.facts(), show.pruned(result))


@app.command()
def score(
    out: Annotated[Path, typer.Option(help="The score file to write, .safetensors.")],
    model: ModelName = None,
    domain: DomainName = None,
    recipe: RecipeFile = None,
    glob: Glob = None,
    text_column: TextColumn = None,
    project_column: ProjectColumn = None,
    max_documents: MaxDocuments = None,
    revision: Revision = None,
    trust_remote_code: Trust = None,
    criterion: Criterion = None,
    calibration_tokens: CalibrationTokens = None,
    kinds: Kinds = None,
    length: Length = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score the units once; `prune --scores FILE` then cuts to any size in seconds."""
    settled = _recipe(recipe, locals())
    from . import show, stages

    result = stages.score(settled, out=out, force=force, console=_console(quiet))
    _print(json, result.facts(), show.scored(result))


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Run folders, aliases, hub ids, folders…")],
    domain: DomainName = None,
    recipe: RecipeFile = None,
    glob: Glob = None,
    text_column: TextColumn = None,
    project_column: ProjectColumn = None,
    max_documents: MaxDocuments = None,
    trust_remote_code: Trust = None,
    length: Length = None,
    batch_size: BatchSize = None,
    held_out_tokens: HeldOutTokens = None,
    speed: Speed = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure models side by side on the same held-out text."""
    settled = _recipe(recipe, {**locals(), "model": models[0]})
    from . import benchmark, show

    result = benchmark.bench(settled, models, console=_console(quiet))
    _print(json, result.facts(), show.bench(result))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="An alias, a hub id, a folder or a .gguf file.")],
    revision: Revision = None,
    trust_remote_code: Trust = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of, what can be removed, and what that would save."""
    from . import anatomy, show

    result = anatomy.inspect(
        model,
        revision=revision,
        trust_remote_code=bool(trust_remote_code),
        console=_console(quiet),
    )
    _print(json, result.facts(), show.inspected(result))


@app.command()
def models(json: AsJson = False, debug: Debug = False) -> None:
    """List the models that have a short name."""
    from . import show
    from .models import known

    rows = known()
    _print(json, {"models": [asdict(row) for row in rows]}, show.known_models(rows))


@app.command()
def domains(json: AsJson = False, debug: Debug = False) -> None:
    """List the domains that are known by name."""
    from . import show
    from .domains import known

    rows = known()
    _print(json, {"domains": [asdict(row) for row in rows]}, show.known_domains(rows))


def _recipe(file: Path | None, values: Mapping[str, object]) -> "Recipe":
    """The recipe of `file` with the flags that were given laid over it."""
    from . import recipe
    from .scores import CRITERIA

    given = {name: value for name, value in values.items() if name in recipe.FLAGS}
    return recipe.load(file, given, criteria=CRITERIA, spell=_flag)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _console(quiet: bool) -> "Console":
    """Where everything but the result goes."""
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return Console(stderr=True, quiet=quiet)


def _print(json: bool, facts: Mapping[str, object], tables: "RenderableType") -> None:
    if json:
        print(json_text.dumps(facts, indent=2, default=str))
    else:
        from rich.console import Console

        Console().print(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(args=arguments, prog_name="llm-narrow", obj=arguments)
    except NarrowError as error:
        _fail(str(error), 2, error, arguments)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        place = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror}{place}. Make room or choose another place.", 2, error, arguments)
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != 130:
            raise
        # An interrupt that passed through exec(), as dataclasses use, leaves a mark in CPython
        # that would end the process by SIGINT whatever code it exits with; a clean exec clears it.
        exec("")
        _fail("Interrupted; nothing is left half-written.", 130, stopped, [])


def _fail(message: str, code: int, error: BaseException, arguments: Sequence[str]) -> NoReturn:
    """One red line on stderr, after the traceback if that was asked for."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
    raise SystemExit(code) from None
