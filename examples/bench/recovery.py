"""What training gives back after the removal: plain, distilled, by lasso, at the same tokens.

    python examples/bench/recovery.py --out docs/bench/recovery

Every method ends at the same size and has the same number of tokens to train on in all: the lasso
and the recovery after it share them. All runs are ordinary run folders below runs/bench/, made by
the same stages as `llm-narrow prune` and `llm-narrow recover`, and go on where they were stopped;
all models are measured at the end on the same held-out blocks.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results

METHODS = {
    "refit": "no training",
    "plain": "cross-entropy on the text",
    "distill": "KL to the whole model mixed with cross-entropy",
    "lora": "the same loss, only low-rank products trained",
    "lasso": "half of the tokens with the lasso on the whole model, half after",
    "lasso-target": "the same with proximal steps whose strength follows a target",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, measure all, write the table."""
    args = parse(argv)
    from llm_narrow import benchmark
    from llm_narrow.allocator import keep_freed_memory
    from llm_narrow.recipe import load

    keep_freed_memory()  # as the command line does
    console = results.console_of()
    wanted = [
        (method, float(sparsity), budget)
        for sparsity in args.sparsities.split(",")
        for method in args.methods.split(",")
        for budget in (args.budgets.split(",") if method != "refit" else [""])
    ]
    runs = {key: made(args, *key, console) for key in wanted}
    settings = load(None, {**shared(args), "held_out_tokens": args.held_out_tokens,
                           "calibration_tokens": args.calibration_tokens})  # fmt: skip
    names = [args.model, *(str(run / "model") for run in runs.values())]
    measured = benchmark.bench(settings, names, console=console).rows
    rows = [
        {"method": method, "sparsity": sparsity, "budget": budget, **facts(run),
         "loss": row.loss.value, "above": vars(row.loss_difference),
         "bits_per_byte_ratio": vars(row.bits_per_byte_ratio), "parameters": row.parameters}
        for ((method, sparsity, budget), run), row in zip(runs.items(), measured[1:], strict=True)
    ]  # fmt: skip
    about = {"model": args.model, "domain": args.domain, "seed": args.seed, "lr": args.lr,
             "step_tokens": args.batch_size * args.length, "mix": settings.train.mix,
             "held_out_tokens": measured[0].tokens, "whole_loss": measured[0].loss.value,
             "calibration_tokens": args.calibration_tokens, **results.machine()}  # fmt: skip
    results.write(args.out, about, rows, page(rows, about))
    console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/recovery")
    parser.set_defaults(batch_size=2)  # that of `llm-narrow prune`
    parser.add_argument("--held-out-tokens", type=int, default=32768)
    parser.add_argument("--sparsities", default="0.5,0.7")
    parser.add_argument("--budgets", default="200k", help="tokens to train on, with commas between")
    parser.add_argument("--methods", default="refit,plain,distill,lasso",
                        help=f"of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, default=results.KEPT / "recovery",
                        help="where the runs are kept")  # fmt: skip
    args = parser.parse_args(argv)
    for method in args.methods.split(","):
        if method not in METHODS:
            parser.error(f"--methods: {method} is none of {', '.join(METHODS)}")
    return args


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    names = ("model", "domain", "length", "batch_size", "seed", "device")
    return {name: getattr(args, name) for name in names} | {"speed": False, "samples": 0}


def made(
    args: argparse.Namespace, method: str, sparsity: float, budget: str, console: Any
) -> Path:
    """The run folder of a method, made unless it is there."""
    from llm_narrow import recovery, stages
    from llm_narrow.recipe import load, target

    folder = args.folder / "-".join([method, f"{sparsity:g}", *([budget] if budget else [])])
    if (folder / "manifest.json").is_file():
        return folder
    console.print(f"{folder.name} …")
    # Measured with all others at the end; here only what a run cannot do without.
    given = {**shared(args), "sparsity": {"neurons": sparsity}, "held_out_tokens": args.length,
             "calibration_tokens": args.calibration_tokens,
             "validation_tokens": args.validation_tokens}  # fmt: skip
    train = {**given, "lr": args.lr, "lasso_lr": args.lr}
    if method == "refit":
        stages.prune(load(None, given), out=folder, console=console)
    elif method.startswith("lasso"):
        half = target(budget, 0) // 2
        lasso = {"method": "lasso", "lasso_tokens": half, "recover_tokens": half,
                 "control": "target" if method == "lasso-target" else "timetable"}  # fmt: skip
        stages.prune(load(None, {**train, **lasso}), out=folder, console=console)
    else:
        start = made(args, "refit", sparsity, "", console)
        more = {"plain": {"distill": "none"}, "distill": {}, "lora": {"recover_method": "lora"}}
        own = {"model": str(start), "teacher": args.model, "recover_tokens": budget}
        settings = load(None, {**train, **own, **more[method]})
        recovery.recover(settings, out=folder, console=console)
    return folder


def facts(run: Path) -> dict[str, Any]:
    """What the manifest of a run tells of its training."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    parts = [manifest[name] for name in ("lasso", "recover") if name in manifest]
    told = {
        "tokens": sum(part["tokens"] for part in parts),
        "training_seconds": sum(part["seconds"] for part in parts),
        "validation": parts[-1]["validation"] if parts else None,
    }
    if lasso := manifest.get("lasso"):
        told |= {f"lasso_{k}": lasso[k] for k in ("zero", "removed_zero", "removed_by_score")}
        told["lasso_validation"] = lasso["validation"]
    return told


def page(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table, the best of each size and budget in bold."""
    lines = [
        "| removed | trained on, tokens | method | loss above the whole model | bits per byte ÷ "
        "whole | training, minutes |",
        "| --- | --: | --- | --: | --: | --: |",
    ]
    for row in rows:
        same = (row["sparsity"], row["budget"])
        alike = [r for r in rows if (r["sparsity"], r["budget"]) == same]
        best = min(alike, key=lambda r: r["above"]["value"]) is row and len(alike) > 1
        above = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["above"])
        lines.append(
            f"| {row['sparsity']:.0%} | {row['tokens']:,} | {row['method']}: "
            f"{METHODS[row['method']]} | {f'**{above}**' if best else above} | "
            f"{row['bits_per_byte_ratio']['value']:.3f} | {row['training_seconds'] / 60:.0f} |"
        )
    lines += [
        "",
        f"{about['model']}, domain {about['domain']}: MLP neurons, the same number in every layer; "
        f"{about['calibration_tokens']:,} calibration tokens; learning rate {about['lr']:g}, steps "
        f"of {about['step_tokens']:,} tokens; {about['mix']:g} of the mixed loss is the KL "
        "divergence; "
        f"nats per token on {about['held_out_tokens']:,} held-out tokens, where the whole model "
        f"has {about['whole_loss']:.3f}, 95 % intervals over documents; seed {about['seed']}. "
        f"{about['threads']} threads.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
