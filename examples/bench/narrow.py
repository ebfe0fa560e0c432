"""What narrowing a real model comes to: the whole one against runs of several methods and sizes.

    python examples/bench/narrow.py --runs oneshot-70=runs/a,lasso-70=runs/b --out docs/bench/narrow

Reads finished run folders and the results of `bench --matrix`, `bench --tasks`, `relearn` and
`certify` on them, which lie in --results as narrow_steps.py says; with --run it has those that are
missing made first, and goes on where it was stopped. What is of other weights does not count, and
what is missing is told with its command.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import results
from finished import Finished, percent, read
from narrow_found import against_plain, alike, found
from narrow_page import page
from narrow_steps import STEPS, Asked, do
from narrow_weak import weak


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing if asked to, then the page of what is there."""
    from llm_narrow.errors import problems

    args = parse(argv)
    asked = asked_of(args)
    console = results.console_of()
    failed = []
    if args.run:
        try:
            failed = do(asked, args.steps, console)
        except KeyboardInterrupt:
            console.print("Stopped. The same command goes on.")
            raise SystemExit(130) from None
    rows = [found(asked, run) for run in asked.runs]
    against_plain(rows)
    if wrong := alike(rows):
        raise problems("the results", wrong)
    first = asked.runs[0]
    about = {
        "model": asked.whole, "model_sha256": asked.whole_sha256,
        "parameters": rows[0]["parameters_before"],
        "domain": rows[0]["own"]["domain"], "held_out_tokens": rows[0]["own"]["tokens"],
        "documents": rows[0]["own"]["documents"], "most_cost": args.most_cost,
        "least_pass": args.least_pass, "versions": first.told.get("versions"),
        "command": shlex.join(["python", "examples/bench/narrow.py", *(argv or sys.argv[1:])]),
    }  # fmt: skip
    told = weak(rows, most_cost=args.most_cost, least_pass=args.least_pass)
    results.write(args.out, {**about, "weak": told}, rows, page(about, rows, told))
    console.print(f"Written: {args.out}.json, {args.out}.md")
    if failed:
        console.print("\n".join(failed), soft_wrap=True)
        raise SystemExit(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--runs", required=True, metavar="NAME=FOLDER,...",
                        help="run folders by the name they have on the page")  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("runs/narrow"),
                        help="where the results are")  # fmt: skip
    parser.add_argument("--run", action="store_true", help="have what is missing made")
    parser.add_argument("--steps", type=steps, default="matrix,tasks,relearn,certify",
                        help=f"what --run makes, of {', '.join(STEPS)}")  # fmt: skip
    parser.add_argument("--model", help="the whole model, where it has moved since the runs")
    parser.add_argument("--sets", default="all", help="of the matrix, as for `bench --matrix`")
    parser.add_argument("--limit", type=int, default=100, help="items of each set of the matrix")
    parser.add_argument("--tasks", default="humaneval,mbpp", help="as for `bench --tasks`")
    parser.add_argument("--prompt", default="both", choices=("chat", "raw", "both"))
    parser.add_argument("--task-limit", type=int, help="problems of each set of --tasks")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--lost", default="english", help="domains to relearn, commas between")
    parser.add_argument("--tokens", default="100k", help="that each model relearns from")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each model")
    parser.add_argument("--also", action="append", type=also, default=[], metavar="STEP=FLAGS",
                        help="more flags of a step, as --also 'relearn=--target scratch'; "
                        "repeatable")  # fmt: skip
    parser.add_argument("--most-cost", type=percent, default="2%", metavar="PERCENT",
                        help="bits per byte above the whole's that are no weakness")  # fmt: skip
    parser.add_argument("--least-pass", type=percent, default="80%", metavar="PERCENT",
                        help="of the whole model's passes that is no weakness")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("docs/bench/narrow"),
                        help="writes OUT.json and OUT.md")  # fmt: skip
    return parser.parse_args(argv)


def steps(text: str) -> list[str]:
    """Names of steps, in the order that they are done in."""
    named = [part.strip() for part in text.split(",")]
    if unknown := [name for name in named if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(STEPS)}, got {unknown[0]!r}")
    return [step for step in STEPS if step in named]


def also(text: str) -> tuple[str, list[str]]:
    """A step, and more flags for it."""
    step, equals, flags = text.partition("=")
    if not equals or step not in STEPS:
        raise argparse.ArgumentTypeError(
            f"must be a step ({', '.join(STEPS)}), = and its flags, got {text!r}"
        )
    return step, shlex.split(flags)


def asked_of(args: argparse.Namespace) -> Asked:
    """What the options name. Raises BadInput with all that is wrong with the runs."""
    from llm_narrow.relearn_subjects import origin_of

    runs = named(args.runs)
    whole = origin_of([(run.folder, run.name, dict(run.told)) for run in runs])
    more: dict[str, list[str]] = {}
    for step, flags in args.also:
        more.setdefault(step, []).extend(flags)
    return Asked(
        whole=args.model or whole["name"], whole_sha256=whole["sha256"], runs=runs,
        results=args.results, sets=args.sets, limit=args.limit, tasks=args.tasks,
        prompt=args.prompt, task_limit=args.task_limit, max_new_tokens=args.max_new_tokens,
        lost=[part.strip() for part in args.lost.split(",") if part.strip()],
        tokens=args.tokens, seeds=args.seeds, also=more,
    )  # fmt: skip


def named(text: str) -> list[Finished]:
    """The runs by their names."""
    from llm_narrow.errors import NarrowError, problems

    runs: list[Finished] = []
    wrong = []
    for part in text.split(","):
        name, _, folder = part.partition("=")
        if not folder or not name or "/" in name:
            wrong.append(f"{part!r} is not NAME=FOLDER, with a name that can be a folder's")
        elif name in {"matrix", "tasks", "whole"} or name.startswith(("relearn-", ".")):
            wrong.append(f"{name!r} is what something else in --results is called: choose another")
        elif name in {run.name for run in runs}:
            wrong.append(f"the name {name!r} is given twice")
        else:
            try:
                runs.append(read(Path(folder), name))
            except NarrowError as error:
                wrong.append(str(error))
    if wrong:
        raise problems("--runs", wrong)
    return runs


if __name__ == "__main__":
    results.told(main)
