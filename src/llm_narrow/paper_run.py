"""Running rows of the paper: their commands as processes, one after another, with live output."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .errors import BadInput, NarrowError
from .paper_claims import CLAIMS, Claim, Preset, Step
from .report import duration

PATIENCE = 60.0  # seconds that a command has to save its state once it is told to stop


def root() -> Path:
    """The folder that holds examples/: of the sources, else the one that we are in.

    Raises BadInput where neither does.
    """
    for place in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (place / "examples" / "parity" / "run.py").is_file():
            return place
    raise BadInput(
        "The experiments are scripts in examples/, which an installed llm-narrow does not bring "
        f"along and {Path.cwd()} does not hold. Clone the repository of llm-narrow and run this "
        "inside it."
    )


def argv(step: Step, place: Path) -> list[str]:
    """The command as this machine runs it: this Python, and scripts where they are."""
    program, *rest = step.line(place)
    if program == "llm-narrow":
        return [sys.executable, "-m", "llm_narrow", *rest]
    return [sys.executable, str(root() / rest[0]), *rest[1:]]


def run(
    claims: Sequence[Claim], *, results: Path, preset: Preset, force: bool = False,
    console: Console,
) -> None:  # fmt: skip
    """Run what is not finished of the rows; with `force` all of it anew.

    Steps that rows share are run once. Raises BadInput without the examples, before anything runs,
    and NarrowError where a command fails; the same call then goes on with it.
    """
    place = results / preset
    todo = list(dict.fromkeys(step for claim in claims for step in claim.steps[preset]))
    if any(step.words.startswith("python ") for step in todo):
        root()
    if force:
        for folder in dict.fromkeys(step.folder for step in todo):
            if (place / folder).exists():
                console.print(escape(f"Removing {place / folder}{also(folder, claims, preset)}"))
                shutil.rmtree(place / folder)
    for claim in claims:
        own = [step for step in claim.steps[preset] if step in todo]
        if all(step.done(place) for step in own):
            console.print(escape(f"{claim.number} {claim.name}: finished before"))
    left = [step for step in todo if not step.done(place)]
    if len(left) > 1 and (told := estimate(left)):
        console.print(f"{len(left)} commands, {told}")
    for step in left:
        execute(step, place, console)


def estimate(steps: Sequence[Step]) -> str:
    """About how long commands take, in words; of those that nobody knows, nothing."""
    known = [step.minutes for step in steps if step.minutes is not None]
    if not known:
        return ""
    least = "at least " if len(known) < len(steps) else ""
    return f"{least}about {duration(60 * sum(known))} of one core in all"


def execute(step: Step, place: Path, console: Console) -> None:
    """Run one command, and hold it to what it promised to write."""
    place.mkdir(parents=True, exist_ok=True)
    line = shlex.join(step.line(place))
    console.print(escape(line), style="bold", soft_wrap=True)
    if step.minutes is not None:
        console.print(f"This takes about {duration(60 * step.minutes)} of one core.")
    began = time.monotonic()
    code = wait(subprocess.Popen(argv(step, place), env={**os.environ, "PYTHONUNBUFFERED": "1"}))
    if code:
        raise NarrowError(
            f"A command of this row ended with code {code}: {line}. What it told is above; "
            "`llm-narrow paper run` goes on with it."
        )
    if not step.done(place):
        raise NarrowError(
            f"{line} ended well, but {place / step.makes} lacks what it should hold. Run it again "
            "with --force."
        )
    console.print(f"Done in {duration(time.monotonic() - began)}")


def wait(started: "subprocess.Popen[bytes]") -> int:
    """The code that a command ends with. Stopped, it is told so, and has its time to save."""
    try:
        return started.wait()
    except BaseException as stopped:
        if not isinstance(stopped, KeyboardInterrupt):  # a terminal tells Ctrl-C to both
            started.terminate()
        try:
            started.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        raise


def also(folder: str, claims: Sequence[Claim], preset: Preset) -> str:
    """Which other rows have their results in a folder, in words."""
    others = [c.number for c in CLAIMS
              if c not in claims and any(s.folder == folder for s in c.steps[preset])]  # fmt: skip
    return f", which held the results of {', '.join(map(str, others))} too" if others else ""
