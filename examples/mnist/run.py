"""The even digits of MNIST (arXiv 2505.15811, figure 4), as one command.

    python examples/mnist/run.py --preset quick --out runs/mnist

Writes OUT/results.json after each experiment and OUT/figures/. Started again, it goes on where it
was: finished cells are not repeated, an interrupted training is taken up. docs/mnist.md tells what
is run, and how it differs from the paper.
"""

import argparse
import sys
from collections.abc import Sequence

import compared
import digits
import figures
import ways
from presets import PRESETS

from llm_narrow import paper_toys

EXPERIMENTS: paper_toys.Experiments = {
    "paper": lambda place: ways.run(place, "paper"),
    "fair": lambda place: ways.run(place, "fair"),
    "compared": compared.run,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, and draw it."""
    args = parse(argv)
    command = ["examples/mnist/run.py", *(argv or sys.argv[1:])]
    paper_toys.run(args, command, presets=PRESETS, experiments=EXPERIMENTS, draw=figures.draw,
                   digits=lambda track: digits.load(args.data, track))  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = paper_toys.options(__doc__.splitlines()[0], "runs/mnist", PRESETS, EXPERIMENTS)
    parser.add_argument(
        "--data", default="package",
        help="'package', a folder with the four IDX files, or ORG/NAME of the hub",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    paper_toys.told(main)
