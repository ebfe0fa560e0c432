"""How fast llama.cpp writes with narrowed models, against the whole one and the bytes that went.

    python examples/bench/decode.py --runs runs/one,runs/other --out docs/bench/decode

To write a token is to read all weights once, so that a model of half the bytes can be twice as
fast at most. Each model is exported (`llm-narrow export`, checked by running it) and all are asked
in turns (A B C A B C ...), after one untimed turn each, so that whatever else the machine does
weighs on all alike; the ratio is the median of those of the turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results

PROMPT = "def mean(values):\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Export what is missing, time all, write the table."""
    args = parse(argv)
    if args.files:
        print(json.dumps(spoken(args)))
        return
    from llm_narrow import models
    from llm_narrow.gguf_check import require_llama_cpp
    from llm_narrow.llama_server import PACKAGE
    from llm_narrow.to_gguf import export

    require_llama_cpp()
    console = results.console_of()
    whole = models.load(args.model)
    rows: list[dict[str, Any]] = []
    for quantize in args.quantize.split(","):
        files, of_it = [], []
        for folder in (whole.folder, *(Path(run) for run in args.runs.split(","))):
            name = whole.name if folder == whole.folder else folder.name
            file = results.KEPT / "decode" / f"{name}-{quantize}.gguf"
            file.parent.mkdir(parents=True, exist_ok=True)
            made = export(folder, file, quantize=quantize, force=True)
            of_it.append({"name": name, "quantize": quantize, "arch": made.arch,
                          "bytes": file.stat().st_size})  # fmt: skip
            files.append(str(file))
            console.print(f"{name}, {quantize}: {file.stat().st_size:,} bytes")
        # A process of its own: llama.cpp's servers cannot be closed.
        done = subprocess.run(
            [sys.executable, __file__, "--files", ",".join(files), "--turns", str(args.turns),
             "--tokens", str(args.tokens)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        rows += compared(of_it, json.loads(done.stdout))
    about = {
        "model": whole.name, "model_sha256": whole.sha256,
        "tokens": args.tokens, "turns": args.turns, "runtime": PACKAGE,
        "llama_threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(), **results.machine(),
    }  # fmt: skip
    results.write(args.out, about, rows, page(about, rows))
    console.print(f"Written: {args.out}.json, {args.out}.md")


def compared(rows: list[dict[str, Any]], speeds: list[list[float]]) -> list[dict[str, Any]]:
    """The rows with their speeds, beside the first: as ratios, and of what the bytes allow."""
    for row, own in zip(rows, speeds, strict=True):
        ratios = [a / b for a, b in zip(own, speeds[0], strict=True)]
        share = row["bytes"] / rows[0]["bytes"]
        row |= {"speeds": own, "ratios": ratios, "byte_ratio": 1 / share,
                "of_limit": sorted(r * share for r in ratios)}  # fmt: skip
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = results.options(__doc__.splitlines()[0], "docs/bench/decode")
    parser.add_argument("--runs", default="", help="run folders, with commas between")
    parser.add_argument("--quantize", default="f32,f16", help="types, with commas between")
    parser.add_argument("--tokens", type=int, default=64, help="written in a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--files", help=argparse.SUPPRESS)  # of the process that times
    args = parser.parse_args(argv)
    if not args.files and not args.runs:
        parser.error("--runs has to name a run folder at least")
    return args


def spoken(args: argparse.Namespace) -> list[list[float]]:
    """Tokens per second of each file in each turn."""
    from llm_narrow.llama_server import serve

    posts = [serve(Path(file), args.tokens + 64, exact=False) for file in args.files.split(",")]
    asked = {"prompt": PROMPT, "n_predict": args.tokens, "temperature": -1, "ignore_eos": True,
             "cache_prompt": False}  # fmt: skip
    speeds: list[list[float]] = [[] for _ in posts]
    for turn in range(args.turns + 1):
        for own, post in zip(speeds, posts, strict=True):
            timings = post("/completion", asked)["timings"]
            if turn:
                own.append(float(timings["predicted_per_second"]))
    return speeds


def page(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    head = ["model", "type", "layout in the file", "bytes", "tokens/s", "speed ÷ whole",
            "bytes of the whole ÷ bytes", "speed ÷ what the bytes allow"]  # fmt: skip
    lines = []
    for row in rows:
        own, speed = row["of_limit"], statistics.median(row["speeds"])
        lines.append([
            row["name"], row["quantize"], row["arch"], f"{row['bytes']:,}", f"{speed:.0f}",
            f"{statistics.median(row['ratios']):.2f}", f"{row['byte_ratio']:.2f}",
            f"{statistics.median(own):.2f} ({own[0]:.2f} to {own[-1]:.2f})",
        ])  # fmt: skip
    return (
        f"{results.table(head, lines)}\n\n{about['model']}, "
        f"{about['tokens']} tokens written after a short prompt, {about['turns']} turns, "
        f"{about['llama_threads']} threads; medians (least to greatest).\n"
    )


if __name__ == "__main__":
    results.told(main)
