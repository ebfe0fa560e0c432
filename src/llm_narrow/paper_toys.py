"""What the toy experiments (examples/parity, examples/mnist) share: options, and where results go.

    OUT/results.json   experiments that are finished, written whole after each
    OUT/figures/       their figures
    OUT/work/          finished parts, and states that an interrupted training goes on from

All of it belongs to one setting and one set of digits: another preset needs another folder.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from . import __version__
from . import state as states
from .allocator import keep_freed_memory
from .cache import made
from .errors import BadInput, NarrowError, UnknownName
from .progress import Track, shown

FORMAT = 1


@dataclass(frozen=True)
class Place:
    """One run: its settings, its digits where it has some, its folder, what it computes on."""

    preset: Any  # a dataclass of settings
    name: str  # of the preset
    out: Path
    device: torch.device
    track: Track
    save_every: float  # seconds
    digits: Any = None  # of examples/mnist

    def begin(self) -> None:
        """Make the folder. Raises BadInput where it is of other settings, or of something else."""
        file = made(self.out) / "results.json"
        held = {path.name for path in self.out.iterdir()}
        if held and not file.exists() and not held <= {"work", "figures"}:
            raise BadInput(f"{self.out} holds {sorted(held)[0]} and no results.json. "
                           "Give --out a folder of its own.")  # fmt: skip
        results = self.results()
        if results["settings"] != self.settings():
            raise BadInput(
                f"{self.out} is of preset {results['preset']}, of other settings than "
                f"{self.name} has now. Choose another --out, or remove it to start anew."
            )
        if self.digits is not None and results["digits"]["sha256"] != self.digits.sha256:
            raise BadInput(
                f"{self.out} is of the digits of {results['digits']['source']}, which differ from "
                f"those of {self.digits.source}. Choose another --out, or give the same --data."
            )
        write(file, results)

    def settings(self) -> dict[str, Any]:
        """All that the outcomes follow from, as JSON has it."""
        return dict(json.loads(json.dumps(plain(asdict(self.preset)))))

    def results(self) -> dict[str, Any]:
        """What is finished. Raises BadInput where the file cannot be read."""
        file = self.out / "results.json"
        fresh = {"format": FORMAT, "preset": self.name, "settings": self.settings(),
                 **({} if self.digits is None else {"digits": self.digits.about()}),
                 "experiments": {}}  # fmt: skip
        if not file.exists():
            return fresh
        try:
            found: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']}, not {FORMAT}")
            if lost := fresh.keys() - found.keys():
                raise ValueError(f"it has no {min(lost)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{file} cannot be used: {error}. Remove it to have it written anew from work/."
            ) from None
        return found

    def finish(self, experiment: str, found: Mapping[str, Any]) -> None:
        """Write a finished experiment beside the others."""
        results = self.results()
        results["experiments"][experiment] = dict(found)
        write(self.out / "results.json", results)

    def state(self, name: str) -> Path:
        """The folder of the states of one training."""
        return self.out / "work" / name

    def part(self, name: str, make: Callable[[], Any], state: Path | None = None) -> Any:
        """A finished part as it was kept, else made now and kept; then `state` is not needed."""
        file = self.out / "work" / f"{name}.json"
        if not file.exists():
            write(file, make())
        if state is not None:
            states.clear(state)
        return json.loads(file.read_text("utf-8"))


Experiments = Mapping[str, Callable[[Place], dict[str, Any]]]


def options(
    what: str, out: str, presets: Mapping[str, Any], experiments: Experiments
) -> argparse.ArgumentParser:
    """A parser with the options that both examples have."""
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="quick", help=f"one of {', '.join(sorted(presets))}")
    parser.add_argument(
        "--only", action="append", metavar="NAME", default=[],
        help=f"run this experiment alone; may be given again: {', '.join(experiments)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(out), help="a folder of its own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice by default")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between states")
    return parser


def run(
    args: argparse.Namespace, command: Sequence[str], *, presets: Mapping[str, Callable[[], Any]],
    experiments: Experiments, draw: Callable[[str, dict[str, Any]], Sequence[Any]],
    digits: Callable[[Track], Any] | None = None,
) -> None:  # fmt: skip
    """Run the experiments that are asked for and not finished, and draw them.

    `command` is told in the results, after `python`. Raises UnknownName and BadInput.
    """
    console = Console(stderr=True, highlight=False)
    names = chosen(args.only, experiments)
    if args.threads is not None:
        if args.threads < 1:
            raise BadInput(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.preset not in presets:
        raise UnknownName("preset", args.preset, presets)
    keep_freed_memory()
    to, track = device(args.device), shown(console)
    place = Place(presets[args.preset](), args.preset, args.out, to, track, args.save_every,
                  digits and digits(track))  # fmt: skip
    place.begin()
    for name in names:
        if name in place.results()["experiments"]:
            console.print(f"{name}: finished before")
            continue
        console.print(f"{name} …")
        began = time.monotonic()
        found = experiments[name](place)
        drawn = draw(name, found)
        for figure in drawn:
            keep(args.out / "figures" / f"{figure.name}.svg", figure.svg)
            keep(args.out / "figures" / f"{figure.name}.png", figure.png)
        place.finish(name, {
            "command": shlex.join(["python", *command]),
            "seconds": round(time.monotonic() - began, 1),  # of this start
            **machine(place.device),
            **found,
            "figures": [{"name": f.name, "title": f.title, "caption": f.caption, "alt": f.alt,
                         "files": [f"figures/{f.name}.svg", f"figures/{f.name}.png"]}
                        for f in drawn],
        })  # fmt: skip
    console.print(f"Written: {escape(str(args.out / 'results.json'))}")


def chosen(only: Sequence[str], experiments: Experiments) -> list[str]:
    """The experiments asked for, in their order. Raises UnknownName."""
    for name in only:
        if name not in experiments:
            raise UnknownName("experiment", name, experiments)
    return [name for name in experiments if not only or name in only]


def device(name: str) -> torch.device:
    """What to compute on. Raises BadInput where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"--device {name} cannot be used: {why}. Known: auto, cpu, cuda.") from None
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What seconds depend on beside the code."""
    return {
        "llm_narrow": __version__, "torch": torch.__version__, "device": str(device),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "processor": platform.machine(),
    }  # fmt: skip


def told(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script; what the user can mend is one line and exit code 2."""
    try:
        main(None)
    except NarrowError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


def keep(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    with fresh.open("wb") as out:
        out.write(content.encode() if isinstance(content, str) else content)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(file)


def write(file: Path, found: Any) -> None:
    """Write JSON whole or not at all."""
    keep(file, json.dumps(plain(found), ensure_ascii=False, allow_nan=False) + "\n")


def plain(found: Any) -> Any:
    """Numbers that are none as null, floats at six digits: what a reader of results needs."""
    if isinstance(found, Mapping):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    if isinstance(found, float):
        return float(f"{found:.6g}") if math.isfinite(found) else None
    return found
