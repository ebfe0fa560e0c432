"""Memory and hours of every stage for an 8B and a 70B model on 1, 8 and 64 GPUs.

    python examples/scale/plan.py --out docs/bench/scale --page docs/scale.md

writes OUT.json and OUT.md, and with `--page` puts the tables into that page, between its marks
`<!-- plan: NAME -->` and `<!-- end -->`. GB are 10^9 bytes.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arithmetic import MODELS, Shape, cache_bytes, chunked, stages, state_bytes

from llm_narrow import cost
from llm_narrow.losses import LEARNT

GPUS = (1, 8, 64)
MEASURED = Path(__file__).resolve().parents[2] / "docs" / "bench" / "costs.json"
NUMBERS: tuple[tuple[str, int | float, str], ...] = (
    ("sparsity", 0.5, "share of the MLP neurons that goes"),
    ("length", 2048, "tokens of a block"),
    ("batch-size", 4, "blocks of a micro-batch, on each GPU"),
    ("score-batch", 1, "the same in scoring, which has no checkpointing"),
    ("tokens-per-step", 524288, "of all GPUs; gives the accumulation"),
    ("calibration-tokens", 262144, "to score and refit on"),
    ("train-tokens", 1e9, "of the lasso, or of the recovery"),
    ("lora-rank", 16, "of LoRA"),
    ("top-k", 64, "logits of a cached teacher, per token"),
    ("memory", 80e9, "bytes of one GPU"),
    ("usable", 0.9, "share of it; the rest is CUDA, NCCL and fragmentation"),
    ("peak", 989e12, "bfloat16 operations per second of one GPU"),
    ("peak-float32", 67e12, "float32 operations per second of one GPU"),
    ("mfu", 0.4, "share of the peak that is reached, recomputation counted as work"),
    ("gpus-per-node", 8, "GPUs of one node"),
    ("node-bandwidth", 450e9, "bytes per second into one GPU from its node"),
    ("network-bandwidth", 50e9, "bytes per second into one GPU from other nodes"),
    ("disk-bandwidth", 2e9, "bytes per second that one process writes"),
)


def gb(x: float) -> str:
    """Bytes as GB."""
    return f"{x / 1e9:,.1f}" if x < 1e11 else f"{x / 1e9:,.0f}"


def hours(seconds: float) -> str:
    """With the unit that suits."""
    if seconds < 3600:
        return "< 1 min" if seconds < 60 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 360000 else f"{seconds / 3600:,.0f} h"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first stand to the right."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"


def bandwidth(gpus: int, o: argparse.Namespace) -> float:
    """Bytes per second into one GPU: within a node, or from other nodes."""
    return float(o.node_bandwidth if gpus <= o.gpus_per_node else o.network_bandwidth)


def models_table(o: argparse.Namespace) -> str:
    """What the models are made of."""
    lines = []
    for s in MODELS:
        n, narrow = cost.size(s.on_meta()), s.narrowed(o.sparsity).parameters
        p = n.parameters
        lines.append([s.name, f"{p:,}", f"{n.without_embeddings:,}", f"{narrow:,}", gb(2 * p),
                      gb(4 * p), gb(4 * p), gb(8 * p), gb(16 * p), gb(16 * narrow)])  # fmt: skip
    return table(["", "parameters", "without embeddings", "narrowed", "weights bf16, GB",
                  "weights float32", "gradients", "AdamW moments", "sum, float32",
                  "sum, narrowed"], lines)  # fmt: skip


def activations_table(o: argparse.Namespace) -> str:
    """What one micro-batch keeps."""
    tokens, lines = o.batch_size * o.length, []
    for s in MODELS:
        kept = {h: tokens * s.layers * s.saved(h) for h in ("autocast", "bfloat16")}
        again = tokens * (s.layers * 2 * s.hidden + s.saved("bfloat16"))
        scoring = o.score_batch * o.length * s.layers * s.saved("scoring")
        lines.append([s.name, gb(kept["autocast"]), gb(kept["bfloat16"]), gb(again), gb(scoring),
                      gb(chunked(s, tokens)), gb(chunked(s, LEARNT))])  # fmt: skip
    return table(["GB", "one GPU", "sharded", "sharded, checkpointing", "scoring", "logits whole",
                  "logits chunked"], lines)  # fmt: skip


def stages_table(s: Shape, o: argparse.Namespace) -> str:
    """Memory and time of all stages of a model."""
    room = o.memory * o.usable
    found = {gpus: stages(s, gpus, o) for gpus in GPUS}
    lines = []
    for row in zip(*found.values(), strict=True):
        around = row[0].around
        cells = [row[0].stage, mark(around, room) if around else "-"]
        for stage in row:
            cells += [mark(stage.total, room), hours(stage.seconds)]
        lines.append(cells)
    head = [s.name, "before, after: GB"]
    for gpus in GPUS:
        head += [f"{gpus} GPU{'s' * (gpus > 1)}: GB", "time"]
    return table(head, lines)


def mark(x: float, room: float) -> str:
    """GB, and a cross where there is no room for it."""
    return gb(x) if x <= room else f"{gb(x)} ✗"


def parts_table(o: argparse.Namespace) -> str:
    """Where the memory of training goes."""
    chosen = [
        (s, gpus, stage)
        for s in MODELS[:2]
        for gpus in GPUS[1:]
        for stage in stages(s, gpus, o)
        if stage.stage in ("lasso", "recover, full")
    ]
    names = list(chosen[0][2].parts)
    lines = [
        [f"{s.name}, {stage.stage}, {gpus} GPUs", *(gb(stage.parts[n]) for n in names),
         gb(stage.total)]
        for s, gpus, stage in chosen
    ]  # fmt: skip
    return table(["GB per GPU", *names, "sum"], lines)


def traffic_table(o: argparse.Namespace) -> str:
    """What sharded training sends around."""
    lines = []
    for s in MODELS[:2]:
        for gpus in GPUS[1:]:
            for stage in stages(s, gpus, o):
                if stage.stage not in ("lasso", "recover, full", "recover, LoRA"):
                    continue
                each, speed = stage.received / stage.micro_batches, bandwidth(gpus, o)
                steps = o.train_tokens / o.tokens_per_step
                tokens = o.batch_size * o.length
                per_token = stage.seconds * gpus / o.train_tokens
                lines.append([f"{s.name}, {stage.stage}, {gpus} GPUs", gb(each),
                              gb(stage.received / steps), f"{each / speed:.2f}",
                              f"{per_token * tokens:.2f}",
                              f"{each / speed / per_token:,.0f}"])  # fmt: skip
    return table(["", "GB per micro-batch", "GB per step", "its seconds",
                  "seconds of arithmetic", "tokens that hide it"], lines)  # fmt: skip


def disk_table(o: argparse.Namespace) -> str:
    """What lies on disk and in the memory of the host."""
    lines = []
    for s in MODELS:
        narrow = s.narrowed(o.sparsity)
        cells = [s.name]
        for learnt in (s.parameters, narrow.parameters, narrow.lora(o.lora_rank)):
            now, best = state_bytes(learnt)
            cells += [gb(now + best), hours((now + best) / o.disk_bandwidth)]
        lines.append([*cells, gb(4 * narrow.parameters),
                      gb(cache_bytes(o.train_tokens, o.length, o.top_k)),
                      gb(4 * s.parameters * o.gpus_per_node)])  # fmt: skip
    return table(["GB", "state, lasso", "to write", "state, recover", "to write", "state, LoRA",
                  "to write", "checkpoint", "cached teacher", "host, while loading"],
                 lines)  # fmt: skip


def measured() -> list[dict[str, Any]]:
    """The estimate for SmolLM2-135M beside the peaks that examples/bench/costs.py measured.

    Bytes above the loaded model, for its batches of 4 by 512 tokens, without checkpointing.
    """
    s, tokens, rows = MODELS[2], 4 * 512, []
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        if row["what"] != "memory" or row["above_model_bytes"] is None:
            continue
        wide = row["precision"] == "float32"
        size, how = (4, "float32") if wide else (2, "bfloat16")
        guess = chunked(s, tokens if row["way"] == "full" else LEARNT)
        if row["way"] == "scoring":
            how = "scoring32" if wide else "scoring"
        else:
            guess += size * s.parameters
        if row["way"] == "chunked":
            guess += (4 + size) * s.vocabulary * s.hidden
        guess += tokens * s.layers * s.saved(how)
        rows.append({"way": row["way"], "precision": row["precision"], "estimate": guess,
                     "measured": row["above_model_bytes"]})  # fmt: skip
    return rows


def measured_table() -> str:
    """How far off the estimate is."""
    lines = [
        [f"{r['way']}, {r['precision']}", gb(r["estimate"]), gb(r["measured"]),
         f"{r['estimate'] / r['measured']:.2f}", gb(r["measured"] - r["estimate"])]
        for r in measured()
    ]  # fmt: skip
    return table(["GB above the loaded model", "estimate", "measured", "estimate ÷ measured",
                  "missing"], lines)  # fmt: skip


def tables(o: argparse.Namespace) -> dict[str, str]:
    """Every table by the name that the page has for it."""
    told = {s.name.rpartition("-")[2].lower(): stages_table(s, o) for s in MODELS}
    return {"models": models_table(o), "activations": activations_table(o), **told,
            "parts": parts_table(o), "traffic": traffic_table(o), "disk": disk_table(o),
            "measured": measured_table()}  # fmt: skip


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables as they are now."""
    for name, text in made.items():
        marks = re.compile(rf"(<!-- plan: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = marks.subn(lambda m, text=text: m[1] + text + m[2], page)
        if found != 1:
            raise SystemExit(f"The page has {found} places for the table {name!r}, not one.")
    return page


def facts(o: argparse.Namespace) -> dict[str, Any]:
    """All figures, in bytes and seconds."""
    rows = [
        {"model": s.name, **asdict(stage), "bytes": stage.total,
         "fits": max(stage.total, stage.around) <= o.memory * o.usable}
        for s in MODELS for gpus in GPUS for stage in stages(s, gpus, o)
    ]  # fmt: skip
    asked = {k: v for k, v in vars(o).items() if k not in ("out", "page")}
    models = [{**asdict(s), "parameters": s.parameters} for s in MODELS]
    return {"about": asked, "models": models, "rows": rows, "measured": measured()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; numbers may be written 1e9."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/bench/scale"),
                        help="writes OUT.json and OUT.md")  # fmt: skip
    parser.add_argument("--page", type=Path, help="a page to put the tables into")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    for name, default, told in NUMBERS:
        kind = above_zero if isinstance(default, float) else whole
        parser.add_argument(f"--{name}", type=kind, default=default, help=told)
    o = parser.parse_args(argv)
    if not (o.sparsity < 1 and o.mfu <= 1 and o.usable <= 1):
        parser.error("--sparsity must be below 1, --mfu and --usable at most 1")
    return o


def above_zero(text: str) -> float:
    """A number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def whole(text: str) -> int:
    """A whole number above 0."""
    if (value := above_zero(text)) != int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}")
    return int(value)

def main(argv: Sequence[str] | None = None) -> None:
    """Write what is asked for, and print the tables."""
    o = parse(argv)
    made = tables(o)
    text = "\n".join(made.values())
    o.out.parent.mkdir(parents=True, exist_ok=True)
    o.out.with_suffix(".json").write_text(json.dumps(facts(o), indent=1) + "\n", encoding="utf-8")
    o.out.with_suffix(".md").write_text(text, encoding="utf-8")
    if o.page:
        o.page.write_text(filled(o.page.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
