"""What scoring costs next to a full backward pass, and how fast the pruned model reads a prompt.

    python examples/bench/costs.py --out docs/bench/costs

Time and speed are taken in turns (A B C A B C …), after one untimed turn each, so that whatever
else the machine does weighs on all alike; the ratio is the median of those of the turns. Memory is
the peak of a fresh process for each way. The three ways to get gradients, on the same batches and
the same model, in float32 and, where the machine is fast at it, of a bfloat16 copy:

    scoring   `scores.score` with attribution: frozen weights, per-unit gradients only
    full      `model(tokens, labels=tokens).loss.backward()` with weight gradients, as one would
    chunked   the same weight gradients through this project's loss, which holds no whole logits:
              scoring ÷ chunked is what freezing the weights brings
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import results
from results import Rows

WAYS = ("scoring", "full", "chunked")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the table."""
    args = parse(argv)
    if args.memory_of:
        print(json.dumps(memory_of(args)))
        return
    start = results.start(args, measures=False)
    about = start.facts
    rows = Rows(args.out, {**about, "prompt_tokens": args.prompt_tokens}, fresh=args.fresh)
    tell = start.console.print
    for precision in (precisions := precisions_of(start)):
        for way in WAYS:
            if (key := f"memory {precision} {way}") not in rows.done:
                tell(f"Memory: {way}, {precision}, in a process of its own")
                rows.add(key, {"what": "memory", "precision": precision, "way": way,
                               **in_fresh_process(args, precision, way)})  # fmt: skip
        if (key := f"time {precision}") not in rows.done:
            tell(f"Time: {args.turns} turns of {', '.join(WAYS)}, {precision}")
            rows.add(key, {"what": "time", "precision": precision,
                           **times(start, args, precision)})  # fmt: skip
        for sparsity in map(float, args.sparsities.split(",")):
            if (key := f"speed {precision} {sparsity:g}") not in rows.done:
                tell(f"Prefill: {sparsity:.0%} of MLP neurons removed, {precision}")
                rows.add(key, {"what": "prefill", "precision": precision, "sparsity": sparsity,
                               **speeds(start, args, precision, sparsity)})  # fmt: skip
    found = list(rows.done.values())
    text = page(rows.done, about, args, precisions)
    results.write(args.out, {**about, **results.machine()}, found, text)
    tell(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/costs")
    parser.set_defaults(calibration_tokens=4096)
    parser.add_argument("--turns", type=int, default=5, help="timed turns")
    parser.add_argument("--sparsities", default="0.3,0.5,0.7", help="for the prefill speed")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def precisions_of(start: results.Start) -> tuple[str, ...]:
    """What the machine is good at."""
    return ("bfloat16", "float32") if start.inputs.bf16 else ("float32",)


def model_in(start: results.Start, precision: str) -> Any:
    """The model in a precision: itself in its own, a copy in another."""
    import torch

    model, dtype = start.inputs.loaded.model, getattr(torch, precision)
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


def ways(start: results.Start, model: Any) -> dict[str, Callable[[], None]]:
    """The three ways, each over all batches once."""
    from llm_narrow import scores
    from llm_narrow.losses import language_loss

    device = start.inputs.device
    batches = start.calibration.batches(start.recipe.blocks.batch_size)

    def scoring() -> None:
        scores.score(model, start.inputs.groups, batches, criterion="attribution")

    def full() -> None:
        for batch in batches:
            tokens = batch.to(device)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def chunked() -> None:
        for batch in batches:
            language_loss(model, batch.to(device)).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return {"scoring": scoring, "full": full, "chunked": chunked}


def times(start: results.Start, args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Seconds of each way in each turn."""
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    runs = ways(start, model_in(start, precision))
    for turn in start.track(range(args.turns + 1), "timing", args.turns + 1):
        for way, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                taken[way].append(round(time.perf_counter() - began, 3))
    return {"tokens": start.calibration.tokens.numel(), "seconds": taken}


def memory_of(args: argparse.Namespace) -> dict[str, int | None]:
    """The peak of this process over one way, and how much of it came on top of the model."""
    import gc

    start = results.start(args, dtype=args.precision, measures=False)
    model = start.inputs.loaded.model
    for parameter in model.parameters():
        parameter.sum()  # brings what is still in a mapped file into memory
    gc.collect()
    before, loaded = results.peak_bytes(), results.held_bytes()
    apart = results.reset_peak()
    ways(start, model)[args.memory_of]()
    peak = results.peak_bytes()
    above = peak - loaded if apart and loaded is not None else None
    return {"peak_bytes": max(peak, before), "loaded_bytes": loaded, "above_model_bytes": above}


def in_fresh_process(args: argparse.Namespace, precision: str, way: str) -> dict[str, Any]:
    """`memory_of` in a process that has done nothing else, on two batches."""
    options = {name: getattr(args, name) for name in ("model", "domain", "length", "batch_size",
                                                      "seed", "device")}  # fmt: skip
    options["calibration_tokens"] = 2 * args.batch_size * args.length
    command = [sys.executable, __file__, "--memory-of", way, "--precision", precision]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def speeds(
    start: results.Start, args: argparse.Namespace, precision: str, sparsity: float
) -> dict[str, Any]:
    """Prefill speeds of the whole and a pruned model side by side, and of their operations."""
    from llm_narrow import cost, scores
    from llm_narrow.plan import by_sparsity
    from llm_narrow.units import remove

    whole = model_in(start, precision)
    groups = start.inputs.groups
    # Speed depends on the widths alone, so any criterion will do.
    any_scores = scores.score(whole, groups, [], criterion="magnitude")
    plan = by_sparsity(whole, groups, any_scores, sparsity={"neurons": sparsity})
    narrow = copy.deepcopy(whole)
    remove(narrow, groups, plan.keep)
    found = cost.speed({"whole": whole, "narrow": narrow}, prompt_tokens=args.prompt_tokens,
                       new_tokens=8, repeats=args.turns, track=start.track)  # fmt: skip
    fewer = cost.prefill_flops(whole, args.prompt_tokens) / cost.prefill_flops(
        narrow, args.prompt_tokens
    )
    ratio = found["narrow"].prefill_ratio
    return {
        "prompt_tokens": args.prompt_tokens,
        "whole_prefill": found["whole"].prefill,
        "narrow_prefill": found["narrow"].prefill,
        "prefill_ratio": vars(ratio),
        "flop_ratio": fewer,
        "of_flop_ratio": {name: value / fewer for name, value in vars(ratio).items()},
    }


def page(
    done: Mapping[str, dict[str, Any]], about: dict[str, Any], args: argparse.Namespace,
    precisions: Sequence[str],
) -> str:  # fmt: skip
    """Two tables: what scoring costs, and how fast the pruned model is."""

    def ratio(over: Sequence[float], under: Sequence[float]) -> str:
        pairs = sorted(a / b for a, b in zip(over, under, strict=True))
        return f"{statistics.median(pairs):.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})"

    def memory(field: str, precision: str) -> list[list[str]]:
        held = {way: done[f"memory {precision} {way}"][field] for way in WAYS}
        if None in held.values():
            return []
        name = {"peak_bytes": "peak memory of the process",
                "above_model_bytes": "of it above the loaded model"}[field]  # fmt: skip
        return [[f"{name}, MB, {precision}", *(f"{held[way] / 1e6:,.0f}" for way in WAYS),
                 f"{held['scoring'] / held['full']:.2f}",
                 f"{held['scoring'] / held['chunked']:.2f}"]]  # fmt: skip

    body = []
    for precision in precisions:
        seconds = done[f"time {precision}"]["seconds"]
        body += [
            [f"seconds, {precision}", *(f"{statistics.median(seconds[way]):.1f}" for way in WAYS),
             ratio(seconds["scoring"], seconds["full"]),
             ratio(seconds["scoring"], seconds["chunked"])],
            *memory("peak_bytes", precision),
            *memory("above_model_bytes", precision),
        ]  # fmt: skip
    text = results.table(["", "scoring", "full backward", "chunked backward", "scoring ÷ full",
                          "scoring ÷ chunked"], body)  # fmt: skip
    text += (
        f"\n{about['model']}; time over {about['calibration_tokens']:,} tokens in "
        f"batches of {args.batch_size} by {args.length}, median of {args.turns} turns (least to "
        "greatest); memory over two batches. Full and chunked backward have weight gradients; "
        "chunked uses the loss that scoring uses.\n\n"
    )
    lines = [
        [f"{row['sparsity']:.0%} of MLP neurons, {row['precision']}",
         f"{row['whole_prefill']:,.0f}", f"{row['narrow_prefill']:,.0f}",
         f"{row['prefill_ratio']['value']:.2f}", f"{row['flop_ratio']:.2f}",
         "{value:.2f} ({low:.2f} to {high:.2f})".format(**row["of_flop_ratio"])]
        for row in done.values()
        if row["what"] == "prefill"
    ]  # fmt: skip
    text += results.table(["removed", "whole, tokens/s", "pruned, tokens/s", "ratio of speeds",
                           "ratio of operations", "speed ÷ operations"], lines)  # fmt: skip
    return text + f"\nPrompts of {args.prompt_tokens} tokens, one at a time, in turns.\n"


if __name__ == "__main__":
    results.told(main)
