"""The command line: parses, calls one stage, prints its result.

The result of a command goes to stdout, as tables or (`--json`) as JSON; everything else goes to
stderr. Heavy imports are inside the commands, so that `--help` is instant.

Exit codes: 0 done, 2 bad input or usage (one red line; `--debug` for the traceback), 130 Ctrl-C,
143 terminated.
"""

import errno
import json as json_text
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from . import __doc__ as about
from . import compare_options as comparing
from .errors import NarrowError
from .options import (
    LASSO,
    MACHINE,
    MEASUREMENT,
    ORIGIN,
    RECOVERY,
    REFIT,
    SCORING,
    SHOWN,
    SIZE,
    SOURCE,
    TEXT,
    TRAINING,
    Given,
    taking,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .recipe import Recipe

TERMINATED = 143  # 128 + SIGTERM, as shells have it

app = typer.Typer(
    help=(about or "").splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML recipe; flags are laid over it.")
]
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


PRUNE = (*SOURCE, *SIZE, *TEXT, *ORIGIN, *SCORING, *REFIT)


@app.command()
@taking(
    *PRUNE, "method", *LASSO, "fill", "recover_tokens", *RECOVERY, *TRAINING, *MEASUREMENT,
    *SHOWN, *MACHINE,
)  # fmt: skip
def prune(
    context: typer.Context,
    given: Given,
    recipe: RecipeFile = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/MODEL-DOMAIN-SIZE unless given.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Score, print the plan, and stop.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="Use the scores of this file (see `score`).")
    ] = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Remove what the domain does not need, repair the rest, and prove it on held-out text."""
    settled = _recipe(recipe, given)
    from . import show, stages

    result = stages.prune(
        settled,
        out=out,
        force=force,
        dry_run=dry_run,
        scores=scores,
        command=_line(context),
        console=_console(quiet),
    )
    _print(json, result.facts(), show.pruned(result))


@app.command()
@taking(
    *SOURCE, "sparsity", "target_params", "allocation", "multiple", *TEXT, *ORIGIN, *SCORING,
    *LASSO, *TRAINING, *MEASUREMENT, *SHOWN, *MACHINE,
)  # fmt: skip
def regularize(
    context: typer.Context,
    given: Given,
    recipe: RecipeFile = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/MODEL-DOMAIN-SIZE unless given.")
    ] = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw units to zero by training, and take out those that are zero, which changes nothing."""
    only = {"method": "lasso", "fill": False, "refit": False, "recover_tokens": 0}
    settled = _recipe(recipe, {**given, **only})
    from . import show, stages

    result = stages.prune(
        settled, out=out, force=force, command=_line(context), console=_console(quiet)
    )
    _print(json, result.facts(), show.pruned(result))


@app.command()
@taking("domain", *TEXT, *ORIGIN, *RECOVERY, *TRAINING, *MEASUREMENT, *SHOWN, *MACHINE)
def recover(
    context: typer.Context,
    given: Given,
    model: Annotated[str, typer.Argument(help="A run folder, an alias, a hub id, a folder…")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, e.g. 200k.", metavar="TOKENS")],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    recipe: RecipeFile = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a narrowed model on its domain; settings not given are those of its run."""
    from . import recovery

    file, own = recovery.origin(model)
    asked = {name: value for name, value in given.items() if value is not None}
    settled = _recipe(
        recipe or file,
        {**own, **asked, "model": model, "recover_tokens": tokens},
        lambda name: "--tokens" if name == "recover_tokens" else _flag(name),
    )
    from . import show

    result = recovery.recover(
        settled, out=out, force=force, command=_line(context), console=_console(quiet)
    )
    _print(json, result.facts(), show.pruned(result))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run folder that --out named.")],
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped, to the result that it would have had."""
    from . import recovery, show

    result = recovery.resume(run, console=_console(quiet))
    _print(json, result.facts(), show.pruned(result))


@app.command()
@taking(*SOURCE, *TEXT, *ORIGIN, *SCORING, *MACHINE)
def score(
    given: Given,
    out: Annotated[Path, typer.Option(help="The score file to write, .safetensors.")],
    recipe: RecipeFile = None,
    force: Force = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score the units once; `prune --scores FILE` then cuts to any size in seconds."""
    settled = _recipe(recipe, given)
    from . import show, stages

    result = stages.score(settled, out=out, force=force, console=_console(quiet))
    _print(json, result.facts(), show.scored(result))


@app.command()
@taking(*comparing.SETTINGS)
def compare(
    context: typer.Context,
    given: Given,
    recipe: RecipeFile = None,
    sizes: comparing.Sizes = "",
    tokens: comparing.Tokens = None,
    seeds: comparing.Seeds = 2,
    methods: comparing.Methods = "oneshot,lasso,random,distilled,scratch",
    lrs: comparing.Rates = "1e-4,3e-4,1e-3",
    sweep_share: comparing.Share = 0.2,
    targets: comparing.Targets = None,
    source: comparing.From = None,
    strict: comparing.Strict = False,
    out: comparing.Out = None,
    dry_run: comparing.DryRun = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train narrowed, distilled, from-scratch and random models of the same shape alike."""
    from . import compare as comparison

    line = _line(context)
    if source:
        result = comparison.recompute(source, out=out, targets=targets, strict=strict, command=line)
        return _print(json, result.facts(), result.shown())
    if not (sizes and tokens and out):
        raise typer.BadParameter("--sizes, --tokens and --out are needed, or --from.")
    spelled, asked = {"recover_tokens": "--tokens"}, {**given, "recover_tokens": tokens}
    result = comparison.compare(
        _recipe(recipe, asked, lambda name: spelled.get(name) or _flag(name)),
        sizes=sizes, tokens=tokens, out=out, seeds=seeds, methods=methods, lrs=lrs,
        sweep_share=sweep_share, targets=targets, dry_run=dry_run, command=line,
        console=_console(quiet),
    )  # fmt: skip
    _print(json, result.facts(), result.shown())


@app.command()
@taking("domain", *TEXT, "trust_remote_code", *MEASUREMENT, *MACHINE)
def bench(
    given: Given,
    models: Annotated[list[str], typer.Argument(help="Run folders, aliases, hub ids, folders…")],
    recipe: RecipeFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure models side by side on the same held-out text."""
    settled = _recipe(recipe, {**given, "model": models[0]})
    from . import benchmark, show

    result = benchmark.bench(settled, models, console=_console(quiet))
    _print(json, result.facts(), show.bench(result))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: one, or several to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write to; that of a single run.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse runs that are missing or half-written.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write report.html, report.md, figures and a CSV of one run, or of several side by side."""
    from . import show
    from .outcome import reported

    result = reported(runs, out, strict=strict, console=_console(quiet))
    _print(json, asdict(result), show.reported(result))


@app.command()
@taking(*ORIGIN)
def inspect(
    given: Given,
    model: Annotated[str, typer.Argument(help="An alias, a hub id, a folder or a .gguf file.")],
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of, what can be removed, and what that would save."""
    from . import anatomy, show

    revision = given["revision"]
    result = anatomy.inspect(
        model,
        revision=None if revision is None else str(revision),
        trust_remote_code=bool(given["trust_remote_code"]),
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


def _recipe(
    file: Path | None, given: Given, spell: Callable[[str], str] = lambda name: _flag(name)
) -> "Recipe":
    """The recipe of `file` with the flags that were given laid over it."""
    from . import recipe
    from .scores import CRITERIA

    return recipe.load(file, given, criteria=CRITERIA, spell=spell)


def _line(context: typer.Context) -> str:
    """The command as it was typed."""
    return shlex.join(["llm-narrow", *context.obj])


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
    from .processes import first

    if not first():
        return
    if json:
        print(json_text.dumps(facts, indent=2, default=str))
    else:
        from rich.console import Console

        Console().print(tables)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _stopped)
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
        if isinstance(stopped, SystemExit) and stopped.code not in (130, TERMINATED):
            raise
        # An interrupt that passed through exec(), as dataclasses use, leaves a mark in CPython
        # that would end the process by SIGINT whatever code it exits with; a clean exec clears it.
        exec("")
        code = TERMINATED if isinstance(stopped, SystemExit) and stopped.code != 130 else 130
        _fail("Interrupted; nothing is left half-written.", code, stopped, [])


def _stopped(number: int, frame: object) -> NoReturn:
    """End as an interrupt does, so that what is half-written goes."""
    raise SystemExit(TERMINATED)


def _fail(message: str, code: int, error: BaseException, arguments: Sequence[str]) -> NoReturn:
    """One red line on stderr, after the traceback if that was asked for."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    from rich.console import Console
    from rich.text import Text

    whole = "\n".join([message, *getattr(error, "__notes__", [])])
    Console(stderr=True).print(Text(whole, style="red"), soft_wrap=True)
    raise SystemExit(code) from None
