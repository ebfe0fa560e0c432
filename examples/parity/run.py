"""Compositional multitask sparse parity (arXiv 2505.15811, sections on CMSP), as one command.

    python examples/parity/run.py --preset quick --out runs/parity

Writes OUT/results.json after each experiment and OUT/figures/. Started again, it goes on where it
was: finished experiments are not repeated, an interrupted training is taken up. docs/parity.md
tells what is run, and how it differs from the paper.
"""

import argparse
import sys
from collections.abc import Sequence

import curriculum
import figures
import lasso
import nonlocality
import pruning
import timing
from presets import PRESETS

from llm_narrow import paper_toys

EXPERIMENTS: paper_toys.Experiments = {
    "timing": timing.run,
    "curriculum": curriculum.run,
    "pruning": pruning.run,
    "scores": nonlocality.run,
    "lasso": lasso.run,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, and draw it."""
    command = ["examples/parity/run.py", *(argv or sys.argv[1:])]
    paper_toys.run(parse(argv), command, presets=PRESETS, experiments=EXPERIMENTS,
                   draw=figures.draw)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    about = __doc__.splitlines()[0]
    return paper_toys.options(about, "runs/parity", PRESETS, EXPERIMENTS).parse_args(argv)


if __name__ == "__main__":
    paper_toys.told(main)
