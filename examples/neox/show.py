"""What narrowing does to the small gpt_neox that train.py made: a model that has learned something.

    python examples/neox/show.py --model runs/neox --out docs/bench/neox

Scores, refit, heads, lasso and vocabulary, each by the command that stands beside its figures; all
models measured on the same held-out blocks, documents paired. The runs are ordinary run folders
below runs/bench/neox, each proved in a fresh process as it was saved; they go on where they were
stopped, and are made anew where the model or a setting is another. Blocks have half of the model's
positions, since a trimmed vocabulary takes more tokens for the same text.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import learned
import results
from results import Start

PAIRS = {
    "scores: attribution against random": ("attribution", "random"),
    "refit against none": ("refit", "attribution"),
    "lasso against one shot, on as many tokens": ("lasso", "oneshot"),
}


@dataclass(frozen=True)
class Job:
    """One run: a command of llm-narrow with its settings, beside those that all runs share."""

    name: str
    words: str
    given: Mapping[str, Any]
    command: Literal["prune", "recover"] = "prune"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, measure all, export one, write the tables."""
    args = parse(argv)
    facts = training_of(Path(args.model))
    from llm_narrow.allocator import keep_freed_memory

    keep_freed_memory()
    start = results.start(args)
    jobs = wanted(args, facts)
    whole = results.document_sums(start, start.inputs.loaded.model, exact=True)
    sums, rows = {}, []
    for job in jobs:
        folder = made(args, job, start)
        sums[job.name], row = measured(start, folder, whole, args.seed)
        rows.append({"name": job.name, "words": job.words, "command": line(args, job), **row})
        told = results.interval(row["above"]) if row["above"] else "another vocabulary"
        start.console.print(f"{job.name}: {told}")
    pairs = compared(sums, args.seed)
    about = {
        **start.facts, "trained": facts, "whole": quality(whole, args.seed),
        "parameters": facts["parameters"], "away_from_fresh": away_from_fresh(start),
        "precision": "float32", "pairs": pairs, "gguf": exported(args, start),
        "lr": args.lr, **results.machine(),
    }  # fmt: skip
    results.write(args.out, about, rows, page(about, rows))
    start.console.print(f"Written: {args.out}.json, {args.out}.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/neox")
    parser.set_defaults(model="runs/neox", length=256)
    parser.add_argument("--held-out-tokens", type=int, default=65536)
    parser.add_argument("--neurons", type=float, default=0.5, help="share of them to remove")
    parser.add_argument("--heads", type=float, default=0.5, help="share of them to remove")
    parser.add_argument("--tokens", type=int, default=200_000, help="of lasso, and of recovery")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--threshold", type=int,
                        help="of the vocabulary; default twice that of the training")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=results.KEPT / "neox",
                        help="where the runs are kept")  # fmt: skip
    return parser.parse_args(argv)


def training_of(folder: Path) -> dict[str, Any]:
    """What train.py has left about the model. Raises BadInput where it has not made the folder."""
    from llm_narrow.errors import BadInput

    try:
        facts: dict[str, Any] = json.loads((folder / "training.json").read_text("utf-8"))
        learned.sentence(facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder} is no folder of examples/neox/train.py ({error}). Make one: python "
            f"examples/neox/train.py --out {folder}"
        ) from None
    return facts


def wanted(args: argparse.Namespace, facts: Mapping[str, Any]) -> list[Job]:
    """All runs, in the order of the table."""
    some = {"sparsity": f"neurons={args.neurons:g}"}
    training = {"lr": args.lr, "validation_tokens": args.validation_tokens}
    lasso = {"method": "lasso", "control": "timetable", "lasso_tokens": args.tokens // 2,
             "recover_tokens": args.tokens // 2, "lasso_lr": args.lr}  # fmt: skip
    threshold = args.threshold or 2 * facts["vocabulary"]["threshold"]
    share = f"{args.neurons:.0%} of the neurons"
    return [
        Job("random", f"{share}, chosen at random, no refit",
            {**some, "criterion": "random", "refit": False}),
        Job("attribution", f"{share}, by attribution, no refit", {**some, "refit": False}),
        Job("refit", f"{share}, by attribution, refitted", some),
        Job("oneshot", f"{share}, the same, then {args.tokens:,} tokens of training",
            {**some, "recover_tokens": args.tokens, **training}),
        Job("lasso", f"{share}, half of as many tokens in the lasso, half after it",
            {**some, **lasso, **training}),
        Job("trained on", "nothing; the whole model trained on as many tokens",
            {"recover_tokens": args.tokens, "distill": "none", **training}, "recover"),
        Job("heads", f"{args.heads:.0%} of the heads, by attribution, refitted",
            {"sparsity": f"heads={args.heads:g}"}),
        Job("vocabulary", f"tokens that come up less than {threshold:,} times",
            {"kinds": "vocabulary", "vocabulary_threshold": threshold}),
    ]  # fmt: skip


def settings(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Every setting of a run, by name."""
    names = ("model", "domain", "length", "batch_size", "calibration_tokens", "held_out_tokens",
             "seed", "device")  # fmt: skip
    shared = {name: getattr(args, name) for name in names}
    if job.command == "recover":
        del shared["calibration_tokens"]
    return {**shared, **job.given, "speed": False, "samples": 0, "report": False}


def line(args: argparse.Namespace, job: Job) -> str:
    """The command of a run."""
    given = settings(args, job)
    words = ["llm-narrow", job.command]
    if job.command == "recover":
        words += [given.pop("model"), "--tokens", given.pop("recover_tokens")]
    for name, value in given.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [
            f"--{flag}", value]  # fmt: skip
    return shlex.join(map(str, [*words, "--out", args.folder / job.name.replace(" ", "-")]))


def made(args: argparse.Namespace, job: Job, start: Start) -> Path:
    """The run folder of a job, made unless it is there and of the same model and settings."""
    from llm_narrow import recovery, stages
    from llm_narrow.recipe import load

    recipe = load(None, settings(args, job))
    folder: Path = args.folder / job.name.replace(" ", "-")
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        same = manifest["recipe"] == json.loads(json.dumps(recipe.resolved()))
        done = same and manifest["model"]["sha256"] == start.inputs.loaded.sha256
    except (OSError, ValueError, KeyError):
        done = False
    if done and not args.fresh:
        return folder
    command = stages.prune if job.command == "prune" else recovery.recover
    command(recipe, out=folder, force=True, command=line(args, job), console=start.console)
    return folder


def measured(start: Start, folder: Path, whole: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    """The sums of a run's model on the held-out blocks, and what its table tells of it."""
    from llm_narrow import measure, models, trimming, vocabulary_rows

    loaded = models.load(str(folder))
    blocks = trimming.held_out_as(start.inputs.loaded, start.held_out, loaded)
    sums = results.document_sums(start, loaded.model, blocks or start.held_out, exact=True)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    stored = manifest["checkpoint"]
    above = None if blocks else asdict(measure.difference(whole, sums, seed=seed))
    return sums, {
        **quality(sums, seed), "above": above,
        "bits_per_byte_ratio": asdict(measure.bits_per_byte_ratio(whole, sums, seed=seed)),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "rows": vocabulary_rows.rows_of(loaded.model),
        "layout": stored["layout"], "model_type": stored["model_type"],
        "fresh_process": stored["max_difference"],
        "zero_after_lasso": manifest.get("lasso", {}).get("removed_zero"),
        "run_seconds": round(sum(manifest["seconds"].values()), 1),
    }  # fmt: skip


def quality(sums: Any, seed: int) -> dict[str, Any]:
    """Loss and bits per byte with their intervals."""
    from llm_narrow import measure

    q = measure.quality_of(sums, seed=seed)
    return {"loss": asdict(q.loss), "bits_per_byte": asdict(q.bits_per_byte), "tokens": q.tokens}


def compared(sums: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """The loss of one run less that of another, documents paired."""
    from llm_narrow import measure

    return [
        {"what": what, "first": first, "second": second,
         "difference": asdict(measure.difference(sums[second], sums[first], seed=seed))}
        for what, (first, second) in PAIRS.items()
    ]  # fmt: skip


def away_from_fresh(start: Start) -> dict[str, float]:
    """How far training has moved what a fresh model has trivial: biases from 0, LayerNorms from 1.

    Only where they have moved does a proof show that they are handled.
    """
    named = dict(start.inputs.loaded.model.named_parameters())
    norms = [p for name, p in named.items() if "norm" in name and name.endswith("weight")]
    biases = [p for name, p in named.items() if name.endswith("bias")]
    return {
        "least_largest_bias": min(float(p.detach().abs().max()) for p in biases),
        "least_largest_norm": min(float((p.detach() - 1).abs().max()) for p in norms),
        "biases": len(biases), "norms": len(norms),
    }  # fmt: skip


def exported(args: argparse.Namespace, start: Start) -> dict[str, Any] | None:
    """What llama.cpp says of the refitted model with even widths; None where it is not installed.

    A file that is refused is a result too, and is told.
    """
    from llm_narrow.errors import NarrowError
    from llm_narrow.gguf_check import PACKAGE

    if find_spec(PACKAGE) is None or find_spec("gguf") is None:
        return None
    from llm_narrow.to_gguf import export

    folder, file = args.folder / "refit", args.folder / "refit.gguf"
    told = {"command": shlex.join(map(str, ["llm-narrow", "export", folder, "--to", "gguf",
                                            "--out", file, "--force"]))}  # fmt: skip
    try:
        found = export(folder, file, force=True, track=start.track)
    except NarrowError as error:
        return {**told, "error": str(error)}
    assert found.check is not None
    return {**told, "arch": found.arch, "quantization": found.quantization, "bytes": found.bytes,
            "notes": found.notes, **asdict(found.check)}  # fmt: skip


def page(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables."""
    facts, moved = about["trained"], about["away_from_fresh"]
    body = [
        [f"{number}. {row['words']}{stay(facts, row)}",
         f"{row['parameters'] / about['parameters']:.1%}",
         results.interval(row["above"]) if row["above"] else "other tokens",
         "{value:.3f} ({low:.3f} to {high:.3f})".format(**row["bits_per_byte_ratio"]),
         f"{row['layout']}, `{row['model_type']}`", f"{row['fresh_process']:.1g}"]
        for number, row in enumerate(rows, 1)
    ]  # fmt: skip
    head = ["removed", "parameters left", "nats per token above the whole model",
            "bits per byte ÷ whole", "stored as", "difference in a fresh process"]  # fmt: skip
    pairs = [[pair["what"], results.interval(pair["difference"])] for pair in about["pairs"]]
    lasso = next(row for row in rows if row["name"] == "lasso")
    commands = [facts["command"], *(row["command"] for row in rows)]
    if about["gguf"]:
        commands.append(about["gguf"]["command"])
    return "\n".join([
        "## What the model has learned", "",
        f"{facts['parameters']:,} parameters, trained on {facts['tokens']:,} tokens of "
        f"{facts['domain']} in {facts['training_seconds'] / 60:.1f} minutes; "
        f"{facts['vocabulary']['rows']:,} of {facts['vocabulary']['whole']:,} tokens.", "",
        learned.table(facts), learned.sentence(facts), "",
        "## What narrowing does to it", "",
        results.table(head, body),
        f"On {about['whole']['tokens']:,} held-out tokens in float32, 95 % intervals over "
        f"documents; the whole model has {about['whole']['loss']['value']:.3f} nats per token. "
        f"{about['calibration_tokens']:,} calibration tokens; training at {about['lr']:g}; seed "
        f"{about['seed']}. {lasso['zero_after_lasso']:,} of the units that the lasso's run removed "
        "were exactly zero by then. The last column is the largest difference of logits between "
        "the model in memory and the folder, opened in a fresh process, relative to the largest "
        f"logit. Every one of the {moved['biases']} biases has an entry of at least "
        f"{moved['least_largest_bias']:.2g}, every one of the {moved['norms']} LayerNorm weights "
        f"one at least {moved['least_largest_norm']:.2g} from 1, so that a bias or a norm that was "
        "lost would be seen.", "",
        results.table(["loss of the first less that of the second", "nats per token"], pairs),
        gguf_line(about["gguf"], 1 + [row["name"] for row in rows].index("refit")), "",
        "## Commands", "",
        "The first made the model, the others the rows in their order.", "",
        "```sh", *commands, "```", "",
    ])  # fmt: skip


def stay(facts: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """How many rows of the vocabulary are left, where some are gone."""
    before = facts["vocabulary"]["rows"]
    return f" ({row['rows']:,} of {before:,} stay)" if row["rows"] < before else ""


def gguf_line(found: Mapping[str, Any] | None, number: int) -> str:
    """What llama.cpp says of the exported model, which is that of the row of this number."""
    if found is None:
        return "llama.cpp (package xllamacpp) is not installed here: nothing was exported."
    if "error" in found:
        return f"Row {number} as GGUF: **refused**. {found['error']}"
    return (
        f"Row {number} as GGUF ({found['arch']}, {found['quantization']}, "
        f"{found['bytes'] / 1e6:.1f} MB) in {found['runtime']}: of {found['tokens']} greedy "
        f"tokens {found['same']} are those of transformers, {found['ties']} others near ties; "
        f"log-probabilities differ by at most {found['difference']:.1g} of the largest logit "
        f"(allowed: {found['tolerance']:g})."
    )


if __name__ == "__main__":
    results.told(main)
