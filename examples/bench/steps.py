"""What a step of training costs: with the lasso against without, and its memory.

    python examples/bench/steps.py --out docs/bench/steps

Time: a few steps of each kind in turns, each on a fresh copy of the model, in one process; the
first step of a turn, which makes the optimizer's moments, is left out. Memory: the peak of a fresh
process that takes two steps, with the loss of this project (pieces) and with the plain one (the
logits of the batch whole).
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results

KINDS = ("plain", "target", "timetable", "gradient")


def main(argv: Sequence[str] | None = None) -> None:
    """Time and weigh, then write the table."""
    args = parse(argv)
    if args.weigh:
        print(weighed(args))
        return
    start = results.start(args, measures=False)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.turns):
        for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
            seconds[kind] += timed(start, args, kind)
            start.console.print(f"turn {turn + 1}: {kind} {seconds[kind][-1]:.2f} s a step")
    peaks = {} if args.no_memory else {how: apart(args, how) for how in ("chunked", "whole")}
    rows = [{"kind": kind, "seconds": found, "median": statistics.median(found)}
            for kind, found in seconds.items()]  # fmt: skip
    about = {**start.facts, **results.machine(), "peaks": peaks}
    results.write(args.out, about, rows, page(rows, peaks, args))
    start.console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/steps")
    parser.set_defaults(calibration_tokens=16384)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed in each turn")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--weigh", choices=("chunked", "whole"),
                        help="print the peak of two steps in bytes, and stop")  # fmt: skip
    parser.add_argument("--checkpointing", action="store_true",
                        help="weigh with activation checkpointing")  # fmt: skip
    return parser.parse_args(argv)


def timed(start: results.Start, args: argparse.Namespace, kind: str) -> list[float]:
    """Seconds of each step but the first."""
    from llm_narrow.losses import language_loss
    from llm_narrow.settings import Settings
    from llm_narrow.train import train

    blocks = start.calibration
    settings = Settings((args.steps + 1) * args.batch_size * blocks.tokens.shape[1],
                        batch_size=args.batch_size, bf16=start.inputs.bf16, warmup=0.0,
                        choose="last", schedule="constant")  # fmt: skip
    model = copy.deepcopy(start.inputs.loaded.model)
    drawing = lasso(kind, model, start, args)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        train(model, blocks, loss=language_loss, settings=settings, rows=rows,
              before_step=drawing and drawing.before, after_step=drawing)  # fmt: skip
        lines = rows.read_text().splitlines()
    per_second = [json.loads(line)["tokens_per_second"] for line in lines]
    tokens = args.batch_size * blocks.tokens.shape[1]
    return [tokens / rate for rate in per_second[1:]]


def lasso(kind: str, model: Any, start: results.Start, args: argparse.Namespace) -> Any:
    """The steps around a step; half of the neurons are drawn."""
    from llm_narrow.lasso import Gradient, Proximal, Timetable
    from llm_narrow.penalties import unit_weights
    from llm_narrow.plan import by_sparsity
    from llm_narrow.scores import score
    from llm_narrow.strength import Fixed, Shrinking, Target, removal_places

    if kind == "plain":
        return None
    groups = start.inputs.groups
    weights = unit_weights(groups, dict(model.named_parameters()), "size")
    if kind == "target":
        return Proximal(groups, weights, Target(0.5, args.steps + 1, patience=1), 0.5)
    if kind == "gradient":
        return Gradient(groups, weights, Fixed(1e-3))
    scores = score(model, groups, [], criterion="random", seed=args.seed)
    keep = by_sparsity(model, groups, scores, sparsity={"neurons": 0.5}).keep
    return Timetable(groups, removal_places(groups, keep, scores), Shrinking(args.steps + 1))


def apart(args: argparse.Namespace, how: str) -> int:
    """The peak of a fresh process, in bytes."""
    names = ("model", "length", "batch_size", "seed", "device", "domain", "calibration_tokens")
    line = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    line += ["--checkpointing"] * args.checkpointing
    done = subprocess.run([sys.executable, __file__, *line, "--weigh", how],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout.split()[-1])


def weighed(args: argparse.Namespace) -> int:
    """The peak of this process over two steps, in bytes."""
    import torch
    from torch.nn import functional as F

    from llm_narrow.losses import language_loss
    from llm_narrow.settings import Settings
    from llm_narrow.train import train

    def whole(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    start = results.start(args, measures=False)
    blocks = start.calibration
    settings = Settings(2 * args.batch_size * blocks.tokens.shape[1], batch_size=args.batch_size,
                        bf16=start.inputs.bf16, checkpointing=args.checkpointing,
                        choose="last")  # fmt: skip
    train(start.inputs.loaded.model, blocks, settings=settings,
          loss=language_loss if args.weigh == "chunked" else whole)  # fmt: skip
    return results.peak_bytes()


def page(rows: list[dict[str, Any]], peaks: dict[str, int], args: argparse.Namespace) -> str:
    """The tables."""
    plain = rows[0]["median"]
    lines = ["| step | seconds, median (least to greatest) | ÷ plain |", "| --- | --: | --: |"]
    for row in rows:
        found = row["seconds"]
        lines.append(f"| {row['kind']} | {row['median']:.2f} ({min(found):.2f} to "
                     f"{max(found):.2f}) | {row['median'] / plain:.3f} |")  # fmt: skip
    if peaks:
        how = ", activation checkpointing" * args.checkpointing
        lines += ["", f"| peak memory of a training process{how} | MB |", "| --- | --: |"]
        lines += [f"| loss in pieces | {peaks['chunked'] / 1e6:,.0f} |",
                  f"| logits whole | {peaks['whole'] / 1e6:,.0f} |",
                  f"| ratio | {peaks['chunked'] / peaks['whole']:.2f} |"]  # fmt: skip
    lines += ["", f"{args.model}, steps of {args.batch_size} blocks of {args.length} tokens; "
              f"{args.turns} turns of {args.steps} steps each."]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
