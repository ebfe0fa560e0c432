"""The same cut by optipfair, Torch-Pruning and this project, on the same held-out text.

    python examples/bench/peers.py --out docs/bench/peers

The peers run in a virtual environment of their own, made here with the versions of
peers/constraints.txt. Every tool gets the folder of the whole model and a file with the same
calibration blocks, never the held-out ones, and removes the same number of MLP neurons from every
layer; passes run in the same precision. What it saves is loaded by stock transformers and measured
here. Each setting runs in a fresh process, whose seconds and peak memory are told.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from results import KEPT, Rows, Start

HERE = Path(__file__).resolve().parent / "peers"
PACKAGES = ("optipfair", "torch-pruning", "torch", "transformers")


@dataclass(frozen=True)
class Setting:
    """One way to cut: a script of peers/ and the name that it knows the way by."""

    tool: str
    name: str
    note: str

    @property
    def script(self) -> Path:
        """The script that cuts."""
        return HERE / f"{self.tool.replace('-', '_')}_cut.py"


SETTINGS = [
    Setting("llm-narrow", "attribution", "no refit"),
    Setting("llm-narrow", "attribution-oneshot", "one-shot refit"),
    Setting("llm-narrow", "attribution-sequential", "sequential refit: the default"),
    Setting("optipfair", "ppm", "weights: its default"),
    Setting("optipfair", "vow", "weights"),
    Setting("optipfair", "pon", "weights"),
    Setting("optipfair", "l2", "weights"),
    Setting("optipfair", "data-driven-batch-8", "weights and activations, as its guide"),
    Setting("optipfair", "data-driven-batch-1", "weights and activations"),
    Setting("torch-pruning", "magnitude-l2", "weights: its example for language models"),
    Setting("torch-pruning", "magnitude-l1", "weights"),
    Setting("torch-pruning", "activation", "activations, all blocks in one pass"),
    Setting("torch-pruning", "taylor", "gradients: its default Taylor importance"),
    Setting("torch-pruning", "taylor-first", "gradients, of the first layer of a group"),
    Setting("torch-pruning", "taylor-max", "gradients, the largest in a group"),
    Setting("torch-pruning", "taylor-multivariable", "gradients, summed before the modulus"),
    Setting("torch-pruning", "hessian", "squared gradients as released: of the last sequence"),
    Setting("torch-pruning", "hessian-mended", "squared gradients of all sequences"),
]
SLOW = [Setting("torch-pruning", "taylor-3-steps", "gradients taken anew in three steps")]


def main(argv: Sequence[str] | None = None) -> None:
    """Cut and measure what is missing, then write the table."""
    args = parse(argv)
    settings = [
        s for s in SETTINGS + (SLOW if args.slow else []) if not args.only or s.tool in args.only
    ]
    start = results.start(args)
    about = {**start.facts, "constraints": hash_of((HERE / "constraints.txt").read_bytes())}
    rows = Rows(args.out, about, fresh=args.fresh)
    work = KEPT / "peers" / rows.made_of
    calibration = tokens_file(start, work)
    todo = [(s, float(sparsity)) for sparsity in args.sparsities.split(",") for s in settings]
    left = [pair for pair in todo if unfinished(rows, *pair)]
    start.console.print(f"{len(todo)} cuts, {len(todo) - len(left)} of them made before")
    whole = results.document_sums(start, start.inputs.loaded.model) if left else None
    for number, (setting, sparsity) in enumerate(left, 1):
        start.console.print(f"{number}/{len(left)} {key(setting, sparsity)} …")
        row = cut(start, args, setting, sparsity, calibration, work, whole)
        rows.add(key(setting, sparsity), row)
        above = row.get("above")
        told = f"{above['value']:+.3f} nats/token" if above else f"failed: {row['error']}"
        start.console.print(f"    {told}, {row['wall_seconds']:.0f} s")
    found = [rows.done[key(*pair)] for pair in todo]
    results.write(args.out, {**about, **results.machine()}, found, page(found, about, args))
    start.console.print(f"Written: {args.out}.json, {args.out}.md")
    if not args.keep_models:
        shutil.rmtree(work, ignore_errors=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/peers")
    parser.add_argument("--held-out-tokens", type=int, default=65536)
    parser.add_argument("--sparsities", default="0.5,0.3")
    parser.add_argument("--only", type=lambda text: text.split(","),
                        help="only these tools, with commas between")  # fmt: skip
    parser.add_argument("--slow", action="store_true",
                        help="also the settings that take several backward passes")  # fmt: skip
    parser.add_argument("--python", help="the Python that makes the peers' environment")
    parser.add_argument("--keep-models", action="store_true", help="leave the cut models there")
    return parser.parse_args(argv)


def key(setting: Setting, sparsity: float) -> str:
    """The name of a row."""
    return f"{setting.tool} {setting.name} {sparsity:g}"


def unfinished(rows: Rows, setting: Setting, sparsity: float) -> bool:
    """Whether there is no row yet, or one that failed."""
    row = rows.done.get(key(setting, sparsity))
    return row is None or "error" in row


def tokens_file(start: Start, work: Path) -> Path:
    """The calibration blocks, for every tool alike."""
    from safetensors.torch import save_file

    work.mkdir(parents=True, exist_ok=True)
    file = work / "calibration.safetensors"
    save_file({"tokens": start.calibration.tokens}, file)
    return file


def environment(python: str | None, console: Any) -> Path:
    """The Python of the peers' environment, made if it is not there."""
    from llm_narrow.cache import cache_dir

    constraints = HERE / "constraints.txt"
    folder = cache_dir() / "peers" / hash_of(constraints.read_bytes())
    own = folder / "bin" / "python"
    if not (folder / "made").exists():
        console.print(f"Making the peers' environment in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python or sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                        "-c", constraints, *PACKAGES], check=True)  # fmt: skip
        (folder / "made").touch()  # last, so that an interrupted installation is done again
    return own


def cut(
    start: Start, args: argparse.Namespace, setting: Setting, sparsity: float,
    calibration: Path, work: Path, whole: Any,
) -> dict[str, Any]:  # fmt: skip
    """Have one tool make one cut in its own process, and measure what it saved."""
    from llm_narrow import checkpoint

    ours = setting.tool == "llm-narrow"
    python = sys.executable if ours else environment(args.python, start.console)
    keep, parameters = wanted(start, sparsity)
    out = work / key(setting, sparsity).replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    command = [python, setting.script, "--model", start.inputs.loaded.folder.resolve(),
               "--calibration", calibration, "--setting", setting.name, "--keep", keep,
               "--batch-size", args.batch_size, "--shared", work / "shared", "--out", out,
               *(["--bf16"] if start.inputs.bf16 else [])]  # fmt: skip
    log = work / f"{out.name}.log"
    began = time.perf_counter()
    with log.open("w") as said:
        done = subprocess.run(list(map(str, command)), stdout=said, stderr=said, check=False)
    row = {**vars(setting), "sparsity": sparsity, "keep": keep,
           "wall_seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return {**row, "error": lines[-1]}
    model = checkpoint.load(out / "model")
    found = sum(p.numel() for p in model.parameters())
    if found != parameters:
        return {**row, "error": f"{found:,} parameters are left instead of {parameters:,}"}
    figures = results.measured(results.document_sums(start, model), whole, args.seed)
    facts = json.loads((out / "facts.json").read_text())
    if not args.keep_models:
        shutil.rmtree(out)
    return {**row, **facts, **figures, "parameters": found}


def wanted(start: Start, sparsity: float) -> tuple[int, int]:
    """How many neurons every layer keeps, as this project rounds it, and the parameters then."""
    from llm_narrow import scores
    from llm_narrow.errors import BadInput
    from llm_narrow.plan import by_sparsity

    model, groups = start.inputs.loaded.model, start.inputs.groups
    any_scores = scores.score(model, groups, [], criterion="magnitude")
    plan = by_sparsity(model, groups, any_scores, sparsity={"neurons": sparsity})
    widths = {row.after for row in plan.rows}
    if len(widths) != 1:
        raise BadInput("The layers are of several widths, which the peers cannot be told.")
    return widths.pop(), plan.parameters_after


def hash_of(content: bytes) -> str:
    """A short name for a content."""
    return hashlib.sha256(content).hexdigest()[:12]


def page(found: Sequence[dict[str, Any]], about: dict[str, Any], args: argparse.Namespace) -> str:
    """Per sparsity the best setting of every tool, then all settings."""
    head = ["", "nats/token above the whole model", "bits per byte ÷ whole",
            "seconds", "peak memory, MB"]  # fmt: skip
    parts = []
    for sparsity in map(float, args.sparsities.split(",")):
        rows = [row for row in found if row["sparsity"] == sparsity]
        good = sorted((r for r in rows if "above" in r), key=lambda r: r["above"]["value"])
        first = {r["tool"]: r for r in reversed(good)}
        best = sorted(first.values(), key=lambda r: r["above"]["value"])
        parts.append(f"**{sparsity:.0%} of MLP neurons removed, each tool's best setting**\n")
        parts.append(results.table(head, [line(r, f"{r['tool']} {r['version']}, {r['name']}")
                                          for r in best]))  # fmt: skip
        parts.append(f"**{sparsity:.0%}, all settings**\n")
        failed = [[f"{r['tool']}, {r['name']}", f"failed: {r['error']}", "", "", ""]
                  for r in rows if "error" in r]  # fmt: skip
        parts.append(results.table(head, [line(r, f"{r['tool']}, {r['name']} ({r['note']})")
                                          for r in good] + failed))  # fmt: skip
    parts.append(
        f"{about['model']}, domain {about['domain']}: the same {about['calibration_tokens']:,} "
        f"calibration tokens for all, measured on the same {about['held_out_tokens']:,} held-out "
        f"tokens (95 % interval over documents, paired), no training. "
        f"{about['precision'].capitalize()} (the peers' by autocast, which leaves their weight "
        f"gradients float32), batches of {args.batch_size}. Seconds are those of scoring and "
        "cutting, without loading and saving; memory is the peak of the process.\n"
    )
    return "\n".join(parts)


def line(row: dict[str, Any], name: str) -> list[str]:
    """One row of the table."""
    return [
        name, results.interval(row["above"]), f"{row['bits_per_byte_ratio']['value']:.3f}",
        f"{sum(row['seconds'].values()):.0f}", f"{row['peak_bytes'] / 1e6:,.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    results.told(main)
