"""The command line: its commands, and how it ends. A command parses, calls one stage, prints.

The result of a command goes to stdout, as tables or (`--json`) as JSON; everything else goes to
stderr. Heavy imports are inside the commands, so that `--help` is instant.

Exit codes: 0 done, 2 bad input or usage (one red line; `--debug` for the traceback), 130 Ctrl-C,
143 terminated.
"""

import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from . import __doc__ as about
from . import cli_explain, cli_init, cli_make, cli_paper, cli_prices, cli_proof, cli_push, cli_show
from . import completion as shells
from .allocator import keep_freed_memory
from .errors import NarrowError

TERMINATED = 143  # 128 + SIGTERM, as shells have it

app = typer.Typer(
    help=(about or "").splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    show_completion: shells.Show = None,
    install_completion: shells.Install = None,
) -> None:
    pass


for command in (
    cli_init.init,
    cli_make.prune, cli_make.regularize, cli_make.recover, cli_make.resume, cli_make.score,
    cli_make.compare, cli_make.convert, cli_make.export, cli_show.bench, cli_show.report,
    cli_explain.explain, cli_prices.prices, cli_proof.relearn, cli_proof.certify, cli_proof.gate,
    cli_push.push,
    cli_show.inspect, cli_show.models, cli_show.domains, cli_paper.paper,
):  # fmt: skip
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _stopped)
    keep_freed_memory()
    shells.prepare()
    for stream in (sys.stdout, sys.stderr):
        # What it cannot write (an arrow in Latin-1, a file name that is no Unicode) becomes a `?`.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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


def _notes(error: BaseException | None) -> list[str]:
    """The notes of an error and of what it came from: an interrupt is made an exit on its way."""
    found: dict[str, None] = {}
    while error is not None:
        found |= dict.fromkeys(getattr(error, "__notes__", []))
        error = error.__cause__ or error.__context__
    return list(found)


def _fail(message: str, code: int, error: BaseException, arguments: Sequence[str]) -> NoReturn:
    """One red line on stderr, after the traceback if that was asked for."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    from rich.console import Console
    from rich.text import Text

    whole = "\n".join([message, *_notes(error)])
    Console(stderr=True).print(Text(whole, style="red"), soft_wrap=True)
    raise SystemExit(code) from None
