"""Kill a run with SIGKILL at random moments, resume it, and compare with one that nobody disturbed.

    python examples/bench/survival.py --out docs/bench/survival

The run has all parts that take long: scores, the lasso, the pass of the cached teacher, the
recovery. Each start gets a random number of seconds, then its process is killed, wherever it is;
`llm-narrow resume` (or, where nothing had begun, the same command) starts it again. After the
given number of kills it may finish, and its weights have to be those of the undisturbed run, bit
for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import results

PARTS = ("text and scores", "lasso", "refit", "teacher", "recovery", "proof and measurement")


def main(argv: Sequence[str] | None = None) -> None:
    """Run once undisturbed, once killed again and again; write what came of it."""
    args = parse(argv)
    work = results.KEPT / "survival"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    chance = random.Random(args.seed)
    began = time.monotonic()
    run(command(args, work / "whole"))
    whole = time.monotonic() - began
    print(f"undisturbed: {whole:.0f} s")
    place, kills, starts, equal = work / "killed", [], 0, []
    while len(kills) < args.kills:
        line = ["resume", str(place)] if unfinished(place).exists() else command(args, place)
        after = chance.uniform(args.least, args.most)
        starts += 1
        # A kill at the very end may find the run in its place, and nothing left to do.
        if run(line, after) or (place.exists() and not unfinished(place).exists()):
            equal.append(weights(place) == weights(work / "whole"))
            print(f"it finished before kill {len(kills) + 1}: started anew")
            shutil.rmtree(place)
            continue
        kills.append({"seconds": round(after, 1), "part": part(place)})
        print(f"kill {len(kills)} after {after:.1f} s, in: {kills[-1]['part']}")
    run(["resume", str(place)] if unfinished(place).exists() else command(args, place))
    equal.append(weights(place) == weights(work / "whole"))
    left = sorted(p.name for p in work.iterdir())
    found = {"kills": kills, "equal": equal, "starts": starts + 1, "left": left,
             "undisturbed_seconds": round(whole, 1)}  # fmt: skip
    counts = {name: sum(k["part"] == name for k in kills) for name in PARTS}
    lines = ["| killed in | times |", "| --- | --: |"]
    lines += [f"| {name} | {number} |" for name, number in counts.items()]
    told = "the same, bit for bit," if all(equal) else "DIFFERENT"
    lines += [
        "",
        f"{len(kills)} kills of runs of {args.model}, {len(equal)} of which came to their end; "
        f"their weights are {told} as those of an undisturbed run. Left on disk: "
        f"{', '.join(left)}.",
    ]
    results.write(args.out, {**vars(args), "out": args.out.name, **results.machine()}, [found],
                  "\n".join(lines) + "\n")  # fmt: skip
    shutil.rmtree(work)
    if not all(equal):
        raise SystemExit(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/bench/survival"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--domain", default="python")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--least", type=float, default=15.0, help="seconds before a kill")
    parser.add_argument("--most", type=float, default=90.0)
    parser.add_argument("--lasso-tokens", default="8k")
    parser.add_argument("--recover-tokens", default="8k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="further flags of prune, after --")
    return parser.parse_args(argv)


def command(args: argparse.Namespace, out: Path) -> list[str]:
    """The run, as a user would start it."""
    return ["prune", "--model", args.model, "--domain", args.domain, "--out", str(out),
            "--method", "lasso", "--control", "timetable", "--distill", "cached", "--no-speed",
            "--lasso-tokens", args.lasso_tokens, "--recover-tokens", args.recover_tokens,
            "--save-every-minutes", "0.01", *args.more]  # fmt: skip


def run(line: Sequence[str], seconds: float | None = None) -> bool:
    """Run a command to its end, or kill it after so many seconds. Whether it came to its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_narrow", *line, "--quiet", "--json"],
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        if process.wait(seconds) != 0:
            raise SystemExit(f"llm-narrow {' '.join(line)} ended with {process.returncode}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


def unfinished(place: Path) -> Path:
    """Where a run keeps what it has done so far."""
    return place.with_name(f"{place.name}.unfinished")


def part(place: Path) -> str:
    """Where a killed run was, by what it had left."""
    left = unfinished(place)
    there = {p.name for p in left.iterdir()} if left.exists() else set()
    if "recovered" in there:
        return PARTS[5]
    if "recover.jsonl" in there:
        return PARTS[4]
    if "refitted" in there:
        return PARTS[3]
    if "aligned" in there:
        return PARTS[2]
    if "lasso.jsonl" in there:
        return PARTS[1]
    return PARTS[3] if any(n.startswith("teacher-") for n in there) else PARTS[0]


def weights(run: Path) -> str:
    """The hash of the weights of a run folder."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest["checkpoint"]["sha256"])


if __name__ == "__main__":
    main()
