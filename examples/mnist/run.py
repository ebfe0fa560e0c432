"""The even digits of MNIST (arXiv 2505.15811, figure 4), as one command.

    python examples/mnist/run.py --preset quick --out runs/mnist

Writes OUT/results.json after each experiment and OUT/figures/. Started again, it goes on where it
was: finished cells are not repeated, an interrupted training is taken up. docs/mnist.md tells what
is run, and how it differs from the paper.
"""

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compared
import digits
import figures
import torch
import ways
from place import Place
from presets import PRESETS
from rich.console import Console
from rich.markup import escape

from llm_narrow import __version__
from llm_narrow.allocator import keep_freed_memory
from llm_narrow.errors import BadInput, NarrowError, UnknownName
from llm_narrow.progress import shown

EXPERIMENTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "paper": lambda place: ways.run(place, "paper"),
    "fair": lambda place: ways.run(place, "fair"),
    "compared": compared.run,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, and draw it."""
    args = parse(argv)
    console = Console(stderr=True, highlight=False)
    names = chosen(args.only)
    if args.threads is not None:
        if args.threads < 1:
            raise BadInput(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    settings, to, track = preset(args.preset), device(args.device), shown(console)
    place = Place(settings, args.preset, digits.load(args.data, track), args.out, to, track,
                  args.save_every)  # fmt: skip
    place.begin()
    command = shlex.join(["python", "examples/mnist/run.py", *(argv or sys.argv[1:])])
    for name in names:
        if name in place.results()["experiments"]:
            console.print(f"{name}: finished before")
            continue
        console.print(f"{name} …")
        began = time.monotonic()
        found = EXPERIMENTS[name](place)
        drawn = figures.draw(name, found)
        for figure in drawn:
            keep(args.out / "figures" / f"{figure.name}.svg", figure.svg.encode())
            keep(args.out / "figures" / f"{figure.name}.png", figure.png)
        place.finish(name, {
            "command": command,
            "seconds": round(time.monotonic() - began, 1),  # of this start
            **machine(place.device),
            **found,
            "figures": [{"name": f.name, "title": f.title, "caption": f.caption, "alt": f.alt,
                         "files": [f"figures/{f.name}.svg", f"figures/{f.name}.png"]}
                        for f in drawn],
        })  # fmt: skip
    console.print(f"Written: {escape(str(args.out / 'results.json'))}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="quick", help=f"one of {', '.join(sorted(PRESETS))}")
    parser.add_argument(
        "--data", default="package",
        help="'package', a folder with the four IDX files, or ORG/NAME of the hub",
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", default=[],
        help=f"run this experiment alone; may be given again: {', '.join(EXPERIMENTS)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="a folder of its own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice by default")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between states")
    return parser.parse_args(argv)


def chosen(only: Sequence[str]) -> list[str]:
    """The experiments asked for, in their order. Raises UnknownName."""
    for name in only:
        if name not in EXPERIMENTS:
            raise UnknownName("experiment", name, EXPERIMENTS)
    return [name for name in EXPERIMENTS if not only or name in only]


def preset(name: str) -> Any:
    """The settings of that name. Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]()


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


def keep(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    fresh.write_bytes(content)
    fresh.replace(file)


if __name__ == "__main__":
    try:
        main()
    except NarrowError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
