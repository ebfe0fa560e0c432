"""How near each stage is to what the machine can do, and where the time of a run goes.

    python examples/bench/performance.py --run runs/demo --out docs/bench/performance

All stages that compute are timed in turns over the same tokens (A B C A B C ...), after one untimed
turn, beside a forward pass and beside a product of two square matrices in the same precision: the
most that the machine does. Saving and proving is set against writing as many bytes and opening a
stock model in a fresh process. Where the time of a run goes is what its manifest says.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import costs
import results

SQUARE = 2048  # rows of the matrices that tell the machine's speed
OPEN = (
    "import sys; from transformers import AutoModelForCausalLM as M;"
    "M.from_pretrained(sys.argv[1], local_files_only=True)"
)
# Forward passes that a stage cannot do without: a backward pass to activations is one more, to
# weights another. The refit reads each layer as it was and as it is, and solves.
LEAST = {"forward": 1, "scoring": 2, "training": 3, "refit": 2}


def main(argv: Sequence[str] | None = None) -> None:
    """Time everything, read the run, write the page."""
    args = parse(argv)
    start = results.start(args, measures=False)
    precision = costs.precisions_of(start)[0]
    taken, flops = computed(start, args, precision)
    saved = written(start, args)
    profile = json.loads((args.run / "manifest.json").read_text("utf-8"))
    about = {
        **start.facts, "precision": precision, "turns": args.turns, "square": SQUARE,
        "tokens": start.calibration.tokens.numel(), "flops_of_a_forward_token": flops,
        "profile_of": profile["command"], **results.machine(),
    }  # fmt: skip
    rows = [
        *({"stage": name, "seconds": own} for name, own in taken.items()),
        {"stage": "save and prove", **saved},
        {"stage": "profile", "seconds": profile["seconds"]},
    ]
    results.write(args.out, about, rows, page(about, taken, saved, profile["seconds"]))
    start.console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/performance")
    parser.set_defaults(calibration_tokens=4096)
    parser.add_argument("--turns", type=int, default=5, help="timed turns")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run folder")
    return parser.parse_args(argv)


def computed(
    start: results.Start, args: argparse.Namespace, precision: str
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each stage in each turn, and the operations of a token's forward pass."""
    import torch

    from llm_narrow import cost, scores
    from llm_narrow.losses import language_loss
    from llm_narrow.plan import by_sparsity
    from llm_narrow.refit import refit_and_remove

    model = costs.model_in(start, precision)
    batches = start.calibration.batches(start.recipe.blocks.batch_size)
    groups = start.inputs.groups
    ways = costs.ways(start, model)
    found = scores.score(model, groups, [], criterion="magnitude")
    plan = by_sparsity(model, groups, found, sparsity={"neurons": 0.5})
    whole = start.inputs.loaded.model
    dtype = getattr(torch, precision)
    a, b = (torch.randn(SQUARE, SQUARE, dtype=dtype) for _ in range(2))

    def square() -> None:
        for _ in range(8):
            a @ b

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            language_loss(model, batch.to(start.inputs.device))

    def refit() -> None:
        refit_and_remove(copies.pop(), groups, plan.keep, batches, dtype=dtype)

    stages: dict[str, Callable[[], None]] = {
        "square": square, "forward": forward, "scoring": ways["scoring"],
        "training": ways["chunked"], "refit": refit,
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in stages}
    copies: list[Any] = []
    for turn in start.track(range(args.turns + 1), "timing", args.turns + 1):
        for name, run in stages.items():
            if name == "refit":
                copies.append(copy.deepcopy(whole))
            began = time.perf_counter()
            run()
            if turn:
                taken[name].append(round(time.perf_counter() - began, 4))
    return taken, cost.flops_per_token(model)


def written(start: results.Start, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds to save and prove the whole model, to write its bytes, and to open a stock model."""
    from llm_narrow import checkpoint

    loaded = start.inputs.loaded
    keep = {g.name: _all(g.size) for g in start.inputs.groups}
    found: dict[str, list[float]] = {"seconds": [], "bytes": [], "open": []}
    for _ in start.track(range(args.turns), "saving", args.turns):
        with tempfile.TemporaryDirectory(prefix="llm-narrow-") as place:
            out = Path(place, "model")
            began = time.perf_counter()
            checkpoint.save(loaded.model, loaded.tokenizer, out, groups=start.inputs.groups,
                            keep=keep, original_config=loaded.model.config)  # fmt: skip
            found["seconds"].append(round(time.perf_counter() - began, 3))
            data = (out / "model.safetensors").read_bytes()
            began = time.perf_counter()
            with Path(place, "bytes").open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            found["bytes"].append(round(time.perf_counter() - began, 3))
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", OPEN, str(out)], check=True, capture_output=True)
            found["open"].append(round(time.perf_counter() - began, 3))
    return found


def _all(size: int) -> Any:
    import torch

    return torch.ones(size, dtype=torch.bool)


def page(
    about: dict[str, Any], taken: dict[str, list[float]], saved: dict[str, list[float]],
    profile: dict[str, float],
) -> str:  # fmt: skip
    """Three tables: stages, saving, and where the time goes."""

    def ratio(over: Sequence[float], under: Sequence[float], times: float = 1.0) -> str:
        own = sorted(times * a / b for a, b in zip(over, under, strict=True))
        return f"{statistics.median(own):.2f} ({own[0]:.2f} to {own[-1]:.2f})"

    flops = about["flops_of_a_forward_token"] * about["tokens"]
    square = 8 * 2 * about["square"] ** 3  # operations
    lines = []
    for name, least in LEAST.items():
        own = taken[name]
        lines.append([
            name, f"{statistics.median(own):.2f}", ratio(own, taken["forward"]), f"{least}",
            ratio(taken["square"], own, least * flops / square),
        ])  # fmt: skip
    both = [a + b for a, b in zip(saved["bytes"], saved["open"], strict=True)]
    total = sum(profile.values())
    stages = sorted(profile.items(), key=lambda one: -one[1])
    return (
        results.table(
            ["stage", "seconds", "÷ a forward pass", "at least",
             "operations of that ÷ those of a product of squares in the time"],
            lines,
        )
        + f"\n{about['model']}, {about['tokens']:,} tokens, {about['precision']}, {about['turns']} "
        f"turns, medians (least to greatest); squares of {about['square']:,} rows.\n\n"
        + results.table(
            ["saving", "seconds"],
            [["save and prove in a fresh process", f"{statistics.median(saved['seconds']):.2f}"],
             ["write the bytes of the weights", f"{statistics.median(saved['bytes']):.2f}"],
             ["open the folder by stock transformers in a fresh process",
              f"{statistics.median(saved['open']):.2f}"],
             ["the first ÷ both others", ratio(saved["seconds"], both)]],
        )
        + f"\nWhere the time goes in `{about['profile_of']}`:\n\n"
        + results.table(
            ["stage", "seconds", "share"],
            [[name, f"{seconds:.1f}", f"{seconds / total:.0%}"] for name, seconds in stages],
        )
    )  # fmt: skip


if __name__ == "__main__":
    results.told(main)
