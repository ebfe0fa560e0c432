"""Every criterion, allocation and refit at several sparsities, on held-out text.

    python examples/bench/criteria.py --out docs/bench/criteria

Each criterion is scored once; from its scores every size is cut, refitted and measured, always on
the same held-out blocks, against the whole model. A refit goes through the calibration text for
every row anew, the sequential one layer by layer; it is therefore made for the criteria named by
--sequential only, and --oneshot can name fewer than all. `ablation` takes a pass over its tokens
for every unit, 46,080 passes for the neurons of a 135M model: it is left out for neurons unless
--ablation-tokens is given, and used for --kind heads.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import results
from results import Rows, Start

ALLOCATIONS = ("uniform", "global")
REFITS = ("none", "oneshot", "sequential")


@dataclass(frozen=True)
class Cell:
    """One row of the table to be."""

    criterion: str
    allocation: str
    refit: str
    sparsity: float

    @property
    def key(self) -> str:
        """Its name among the finished rows."""
        return f"{self.criterion} {self.allocation} {self.refit} {self.sparsity:g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the rows that are missing, then the table of all."""
    args = parse(argv)
    cells = wanted(args)
    start = results.start(args, kind=args.kind)
    about = {**start.facts, "kind": args.kind, "ablation_tokens": args.ablation_tokens}
    rows = Rows(args.out, about, fresh=args.fresh)
    missing = [cell for cell in cells if cell.key not in rows.done]
    start.console.print(f"{len(cells)} rows, {len(cells) - len(missing)} of them made before")
    if missing:
        make(start, args, rows, missing)
    found = [rows.done[cell.key] for cell in cells]
    checked = rows.done.get("precision", {})
    results.write(args.out, {**about, **results.machine(), "check": checked}, found,
                  page(found, about, checked, args))  # fmt: skip
    start.console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, complete."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/criteria")
    parser.add_argument("--held-out-tokens", type=int, default=32768)
    parser.add_argument("--kind", choices=("neurons", "heads"), default="neurons")
    parser.add_argument("--criteria", help="only these, with commas between; default all")
    parser.add_argument("--sparsities", default="0.3,0.5,0.7")
    parser.add_argument("--allocations", default=",".join(ALLOCATIONS))
    parser.add_argument("--refits", default=",".join(REFITS))
    parser.add_argument("--oneshot", help="criteria that the one-shot refit is made for; "
                        "default all")  # fmt: skip
    parser.add_argument("--sequential", default="attribution,random",
                        help="criteria that the sequential refit is made for")  # fmt: skip
    parser.add_argument("--ablation-tokens", type=int,
                        help="for ablation; default 4096 for heads, none for neurons")  # fmt: skip
    parser.add_argument("--check-tokens", type=int, default=8192,
                        help="held-out tokens measured in float32 too, if not all are")  # fmt: skip
    args = parser.parse_args(argv)
    if args.ablation_tokens is None and args.kind == "heads":
        args.ablation_tokens = 4096
    return args


def wanted(args: argparse.Namespace) -> list[Cell]:
    """All rows, cheap ones first, so that a table of some use is there early."""
    from llm_narrow.errors import UnknownName
    from llm_narrow.scores import CRITERIA

    choices = {"criteria": CRITERIA, "oneshot": CRITERIA, "sequential": CRITERIA,
               "allocations": ALLOCATIONS, "refits": REFITS}  # fmt: skip
    for option, known in choices.items():
        for name in (getattr(args, option) or "").split(","):
            if name and name not in known:
                raise UnknownName(f"--{option}", name, known)
    chosen = args.criteria.split(",") if args.criteria else list(CRITERIA)
    if args.ablation_tokens is None and not args.criteria:
        chosen = [name for name in chosen if name != "ablation"]
    by_refit = {"none": chosen, "oneshot": args.oneshot.split(",") if args.oneshot else chosen,
                "sequential": args.sequential.split(",")}  # fmt: skip
    return [
        Cell(criterion, allocation, refit, float(sparsity))
        for refit in args.refits.split(",")
        for criterion in chosen
        if criterion in by_refit[refit]
        for allocation in args.allocations.split(",")
        for sparsity in args.sparsities.split(",")
    ]


def make(start: Start, args: argparse.Namespace, rows: Rows, missing: Sequence[Cell]) -> None:
    """Make the rows one by one, each kept as soon as it is finished."""
    from llm_narrow.plan import by_sparsity
    from llm_narrow.units import remove

    model, groups = start.inputs.loaded.model, start.inputs.groups
    whole = results.document_sums(start, model)
    scored: dict[str, tuple[Any, float]] = {}
    known = None
    began = time.monotonic()
    for number, cell in enumerate(missing, 1):
        if cell.criterion not in scored:
            scored[cell.criterion] = score(start, args, cell.criterion)
        scores, score_seconds = scored[cell.criterion]
        plan = by_sparsity(model, groups, scores, sparsity={args.kind: cell.sparsity},
                           allocation=cell.allocation)  # fmt: skip
        narrow = copy.deepcopy(model)
        started = time.perf_counter()
        if cell.refit == "none":
            remove(narrow, groups, plan.keep)
        else:
            if cell.refit == "oneshot" and known is None:
                known = whole_statistics(start)
            refit(start, narrow, plan.keep, known if cell.refit == "oneshot" else None)
        seconds = time.perf_counter() - started
        if start.inputs.bf16 and "precision" not in rows.done:
            rows.add("precision", check(start, narrow, args.check_tokens))
        figures = results.measured(results.document_sums(start, narrow), whole, args.seed)
        rows.add(cell.key, {**vars(cell), **figures, "parameters": plan.parameters_after,
                            "parameters_before": plan.parameters_before,
                            "score_seconds": score_seconds, "cut_seconds": seconds})  # fmt: skip
        left = (time.monotonic() - began) / number * (len(missing) - number)
        start.console.print(f"{number}/{len(missing)} {cell.key}: {figures['above']['value']:+.3f} "
                            f"nats/token; about {left / 60:.0f} min left")  # fmt: skip


def score(start: Start, args: argparse.Namespace, criterion: str) -> tuple[Any, float]:
    """The scores of all units, and the seconds that they took."""
    import torch

    from llm_narrow import scores

    blocks = start.calibration
    if criterion == "ablation":
        blocks = blocks.take(args.ablation_tokens, seed=args.seed)
    started = time.perf_counter()
    model = start.inputs.loaded.model
    if start.inputs.bf16:
        model = copy.deepcopy(model).to(torch.bfloat16)
    found = scores.score(
        model, start.inputs.groups, blocks.batches(args.batch_size),
        criterion=criterion, seed=args.seed, track=start.track,
    )  # fmt: skip
    return found, round(time.perf_counter() - started, 1)


def refit(start: Start, narrow: Any, keep: Any, known: Any) -> None:
    """Remove and refit: from the statistics `known`, or layer by layer where there are none."""
    from llm_narrow.refit import refit_and_remove

    refit_and_remove(
        narrow, start.inputs.groups, keep,
        start.calibration.batches(start.recipe.blocks.batch_size),
        damping=start.recipe.prune.damping, known=known, dtype=precision(start), track=start.track,
    )  # fmt: skip


def whole_statistics(start: Start) -> Any:
    """What one-shot refits of any decision need, taken in one pass over the whole model."""
    from llm_narrow.refit import statistics

    return statistics(
        start.inputs.loaded.model, start.inputs.groups,
        start.calibration.batches(start.recipe.blocks.batch_size),
        dtype=precision(start), track=start.track,
    )  # fmt: skip


def precision(start: Start) -> Any:
    """What the passes of a refit run in; None for the model's own."""
    import torch

    return torch.bfloat16 if start.inputs.bf16 else None


def check(start: Start, narrow: Any, tokens: int) -> dict[str, float]:
    """The loss above the whole model in bfloat16 and in float32, on some of the blocks."""
    from llm_narrow import measure

    blocks = start.held_out.take(min(tokens, start.held_out.tokens.numel()), seed=0)
    above = {}
    for name, exact in (("bfloat16", False), ("float32", True)):
        pair = [
            results.document_sums(start, model, blocks, exact=exact)
            for model in (start.inputs.loaded.model, narrow)
        ]
        above[name] = measure.difference(pair[0], pair[1]).value
    return {"tokens": blocks.tokens.numel(), **above}


def page(
    found: Sequence[dict[str, Any]], about: dict[str, Any], checked: dict[str, Any],
    args: argparse.Namespace,
) -> str:  # fmt: skip
    """The table: a line per criterion, allocation and refit; a column per sparsity."""
    sparsities = [float(s) for s in args.sparsities.split(",")]
    lines: dict[tuple[str, ...], dict[float, dict[str, Any]]] = {}
    for row in found:
        name = (row["criterion"], row["allocation"], row["refit"])
        lines.setdefault(name, {})[row["sparsity"]] = row
    best = {s: min(line[s]["above"]["value"] for line in lines.values()) for s in sparsities}

    def cell(row: dict[str, Any]) -> str:
        text = f"{results.interval(row['above'])}; {row['bits_per_byte_ratio']['value']:.3f}"
        return f"**{text}**" if row["above"]["value"] == best[row["sparsity"]] else text

    middle = sparsities[len(sparsities) // 2]
    ordered = sorted(lines.items(), key=lambda item: item[1][middle]["above"]["value"])
    body = [
        [f"`{criterion}`, {allocation}, refit: {how}", *(cell(line[s]) for s in sparsities)]
        for (criterion, allocation, how), line in ordered
    ]
    unit = {"neurons": "MLP neurons", "heads": "key/value heads with their query heads"}[args.kind]
    text = results.table([f"{unit} removed", *(f"{s:.0%}" for s in sparsities)], body)
    text += (
        f"\nNats per token above the whole model with its 95 % interval over documents, then bits "
        f"per byte ÷ those of the whole model. {about['model']}, domain {about['domain']}: "
        f"{about['calibration_tokens']:,} calibration tokens, {about['held_out_tokens']:,} "
        f"held-out tokens, no training; {about['precision']}; seed {about['seed']}.\n"
    )
    if checked:
        text += (
            f"On {checked['tokens']:,} of the tokens the first row is {checked['bfloat16']:+.4f} "
            f"in bfloat16 and {checked['float32']:+.4f} in float32.\n"
        )
    if args.kind == "heads":
        text += f"`ablation` scored on {about['ablation_tokens']:,} of the calibration tokens.\n"
    return text


if __name__ == "__main__":
    results.told(main)
