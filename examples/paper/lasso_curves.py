"""How far lasso models can be cut for free, beside models that never saw a lasso (figure 5, left).

    python examples/paper/lasso_curves.py --shares 0.3,0.5 --lasso-tokens 500k --out runs/curves

Trains a model with the group lasso for each strength (`--strengths`, fixed, as in the paper) or
share that is drawn to zero (`--shares`, the strength found on the way), by `llm-narrow regularize`;
and one on as many tokens without a penalty, by `llm-narrow recover`, which tells the lasso from the
training. Then each loses its lowest-scored neurons, of all layers together, with no refit, at every
sparsity, and is measured on held-out text against itself. Stopped, the same command goes on.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kept
import torch
from rich.console import Console

from llm_narrow import __version__, inputs, measure
from llm_narrow.errors import BadInput, NarrowError
from llm_narrow.families import find_groups
from llm_narrow.paper_toys import told
from llm_narrow.plan import select
from llm_narrow.precision import copied
from llm_narrow.scores import score
from llm_narrow.sections import counted
from llm_narrow.units import remove

SPARSITIES = "0.1,0.2,0.3,0.4,0.45,0.5,0.6,0.65,0.7,0.75,0.8,0.85,0.9"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained, measure what is not measured."""
    args = parse(argv)
    console = Console(stderr=True, highlight=False)
    wanted = models_wanted(args)
    for name, one in wanted.items():
        if one["line"] and not (one["folder"] / "manifest.json").is_file():
            console.print(f"Training {name}")
            trained(one["line"])
    recipe, start, track = kept.gathered(
        args, console, calibration_tokens=args.calibration_tokens,
        held_out_tokens=args.held_out_tokens,
    )  # fmt: skip
    calibration = inputs.calibration(start, recipe, track=track)
    held_out = inputs.held_out(start.loaded, start.domain, recipe, track=track)
    about = {
        "llm_narrow": __version__, "model": start.loaded.name, "sha256": start.loaded.sha256,
        "domain": start.domain.name, "calibration": calibration.sha256,
        "held_out": held_out.sha256, "held_out_tokens": held_out.tokens.numel(),
        "lasso_tokens": int(counted(args.lasso_tokens)), "lasso": lasso_words(args),
        "criterion": args.criterion, "seed": args.seed,
    }  # fmt: skip
    rows = kept.Rows(args.out / "rows.jsonl", kept.made_of(about))
    total = sum(g.size for g in start.groups)
    found = {}
    for name, one in wanted.items():
        made = one["folder"].name if one["folder"] else name
        keys = {s: f"{made} {s:g}" for s in args.sparsities}
        todo = [s for s in args.sparsities if keys[s] not in rows.done]
        if todo:
            cut = Cut(start, recipe, calibration, held_out, total, args, track)
            for sparsity, figures in cut.curve(one["folder"], todo):
                rows.add(keys[sparsity], {"sparsity": sparsity, **figures})
                console.print(f"{name}, {sparsity:.0%} of the neurons gone: "
                              f"{figures['loss']['value']:.3f} nats per token")  # fmt: skip
        curve = [rows.done[keys[s]] for s in args.sparsities]
        found[name] = {"name": name, "drawn": one["drawn"], "curve": curve}
    result = {"about": about, "models": found}

    def draw() -> Any:
        from drawing import lasso_curves

        return lasso_curves(result)

    kept.finished(args.out, "lasso-curves", result, draw)
    console.print(f"Written: {args.out / 'lasso-curves.json'}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those with several numbers as lists."""
    parser = kept.options(__doc__.splitlines()[0], "runs/lasso-curves")
    parser.add_argument("--strengths", default="", help="of the lasso, fixed, with commas between")
    parser.add_argument("--shares", default="", help="drawn to exact zero, with commas between")
    parser.add_argument(
        "--step", choices=("gradient", "proximal"), default="gradient", help="of fixed strengths"
    )
    parser.add_argument("--lasso-tokens", default="500k")
    parser.add_argument("--lasso-lr", type=float, default=2e-4)
    parser.add_argument("--accumulation", type=int, default=1, help="batches of a step")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--held-out-tokens", default="16k")
    parser.add_argument("--criterion", default="attribution", help="that units are removed by")
    parser.add_argument("--sparsities", default=SPARSITIES)
    args = parser.parse_args(argv)
    for name in ("strengths", "shares", "sparsities"):
        try:
            values = [float(text) for text in getattr(args, name).split(",") if text]
        except ValueError:
            raise BadInput(f"--{name} must be numbers with commas between, got "
                           f"{getattr(args, name)!r}.") from None  # fmt: skip
        if any(v < 0 or (name != "strengths" and v >= 1) for v in values):
            rule = "at least 0" if name == "strengths" else "at least 0 and below 1"
            raise BadInput(f"--{name} must be {rule}, got {values}.")
        setattr(args, name, values)
    if not args.strengths and not args.shares:
        raise BadInput("Give --strengths or --shares: at least one lasso model.")
    args.sparsities = sorted({0.0, *args.sparsities})
    return args


def lasso_words(args: argparse.Namespace) -> str:
    """How the lasso drew, in words."""
    ways = ["proximal steps to a share of zeros"] * bool(args.shares)
    ways += [f"{args.step} steps of fixed strength"] * bool(args.strengths)
    return " and ".join(ways)


def models_wanted(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every model by name: its folder, how its lasso drew, and the command that makes it."""
    shared = ["--domain", args.domain, "--length", str(args.length), "--batch-size",
              str(args.batch_size), "--accumulation", str(args.accumulation), "--seed",
              str(args.seed), "--device", args.device, "--distill", "none", "--held-out-tokens",
              "1k", "--samples", "0", "--no-speed", "--no-report"]  # fmt: skip
    lasso = ["regularize", "--model", args.model, *shared, "--lasso-tokens", args.lasso_tokens,
             "--lasso-lr", str(args.lasso_lr), "--calibration-tokens",
             str(args.calibration_tokens)]  # fmt: skip
    found: dict[str, dict[str, Any]] = {
        "none": {"folder": None, "drawn": {}, "line": []},
        "trained": {
            "drawn": {},
            "line": ["recover", args.model, *shared, "--tokens", args.lasso_tokens, "--lr",
                     str(args.lasso_lr)],
        },
    }  # fmt: skip
    fixed = ["--control", "fixed", "--step", args.step, "--weights", "one"]
    ways = [("share", v, ["--sparsity", f"{v:g}"]) for v in args.shares]
    ways += [("strength", v, [*fixed, "--strength", f"{v:g}"]) for v in args.strengths]
    for what, value, more in ways:
        found[f"{what} {value:g}"] = {"drawn": {what: value}, "line": [*lasso, *more]}
    for name, one in found.items():
        if line := one["line"]:  # a folder for each making: another one is another model
            made = kept.made_of({"line": line})[:8]
            folder = args.out / "runs" / f"{name.replace(' ', '-')}-{made}"
            one |= {"folder": folder, "line": [*line, "--out", str(folder)]}
    return found


def trained(line: Sequence[str]) -> None:
    """Run a command of llm-narrow; what it says is seen. Raises NarrowError where it fails."""
    code = subprocess.run([sys.executable, "-m", "llm_narrow", *line], check=False).returncode
    if code:
        raise NarrowError(f"llm-narrow {' '.join(line)} ended with code {code}.")


class Cut:
    """Cuts a model at many sparsities, and measures each."""

    def __init__(
        self, start: Any, recipe: Any, calibration: Any, held_out: Any, total: int,
        args: argparse.Namespace, track: Any,
    ) -> None:  # fmt: skip
        """`total` is the number of neurons of the whole model, that sparsities are shares of."""
        self.start, self.recipe, self.args, self.track = start, recipe, args, track
        self.calibration, self.held_out, self.total = calibration, held_out, total

    def curve(self, folder: Path | None, sparsities: Sequence[float]) -> Any:
        """Yield each sparsity with its loss, and its rise over the model as it is."""
        model = self.start.loaded.model
        if folder is not None:
            model = inputs.model_of(self.recipe, str(folder), track=self.track).model
        groups = find_groups(model)
        groups = inputs.groups_of(groups, ("neurons",))
        left = sum(g.size for g in groups)
        given = copied(model, torch.bfloat16) if self.start.bf16 else model
        scores = score(
            given, groups, self.calibration.batches(self.args.batch_size),
            criterion=self.args.criterion, seed=self.args.seed, track=self.track,
        )  # fmt: skip
        own = self.sums(model)
        for sparsity in sparsities:
            # What the lasso took out already counts.
            more = int(sparsity * self.total) - (self.total - left)
            sums = own
            if more > 0:
                keep = select(scores, groups, sparsity={"neurons": more / left},
                              allocation="global", multiple=1)  # fmt: skip
                narrow = copy.deepcopy(model)
                remove(narrow, groups, keep)
                sums = self.sums(narrow)
            loss = measure.quality_of(sums, seed=self.args.seed).loss
            rise = measure.difference(own, sums, seed=self.args.seed)
            yield sparsity, {"loss": asdict(loss), "rise": asdict(rise)}

    def sums(self, model: Any) -> Any:
        """What the model makes of the held-out blocks, by document."""
        return measure.document_sums(
            model, self.held_out, batch_size=self.args.batch_size, bf16=self.start.bf16,
            track=self.track,
        )  # fmt: skip


if __name__ == "__main__":
    told(main)
