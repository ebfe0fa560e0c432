"""What forgetting costs on the domain, and how much more selective it makes a model.

    python examples/bench/forgetting.py --runs runs/f0,runs/r0.1 --out docs/bench/forgetting

Reads finished `prune` runs of one model, size and domain with different --forget-weight and
--forget-refit; no model is run. One of them has to be plain: --forget-weight 0 --forget-refit 0,
which forgets nothing and measures the same. The others are held against it.
"""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import results
from finished import Finished, percent, read

ALIKE = 0.01  # sizes count as one within this share
GOAL = 2.0  # selectivity ÷ that of the plain run that is worth naming
# What may differ beside what is compared: it changes no weights, or only their last digits.
FREE = ("measure", "blocks.batch_size", "score.forget_weight", "prune.forget_refit", "device",
        "train.save_every_minutes", "model.trust_remote_code")  # fmt: skip
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, hold each against the plain one, write the page and its figure."""
    args = parse(argv)
    runs = gathered([Path(part) for part in args.runs.split(",")])
    plain = next(run for run in runs if not (run.weight or run.refit))
    rows = [row_of(run, plain) for run in runs]
    about = {
        "model": plain.told["model"]["name"], "model_sha256": plain.before.sha256,
        "parameters_before": plain.before.parameters, "parameters": plain.after.parameters,
        "domain": plain.after.domain, "held_out_sha256": _held_out(plain),
        "held_out_tokens": plain.after.tokens, "documents": plain.after.documents,
        "forgotten": plain.forgotten, "plain": plain.name, "most_cost": args.most_cost,
        "best": {name: best(rows, name, args.most_cost) for name in plain.forgotten},
        "differing": differing(runs), "seed": plain.told.get("seed"),
        "versions": plain.told.get("versions"),
    }  # fmt: skip
    console = results.console_of()
    written = [f"{args.out}.json", f"{args.out}.md"]
    alt = None
    if find_spec("matplotlib") is None:
        console.print("No figure: pip install 'llm-narrow[report]'.")
    elif drawn := figure(about, rows):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        file = args.out.with_name(f"{args.out.name}.svg")
        file.write_text(drawn.svg, "utf-8")
        written.append(str(file))
        alt = drawn.alt
    results.write(args.out, about, rows, page(about, rows, args.out.name, alt))
    console.print(f"Written: {', '.join(written)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--runs", required=True, help="run folders, with commas between")
    parser.add_argument("--most-cost", type=percent, default="2%", metavar="PERCENT",
                        help="the most bits per byte above the plain run's")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("docs/bench/forgetting"),
                        help="writes OUT.json, OUT.md and OUT.svg")  # fmt: skip
    return parser.parse_args(argv)


def gathered(folders: Sequence[Path]) -> list[Finished]:
    """The runs, the plain one first. Raises BadInput with all that cannot be compared."""
    from llm_narrow.errors import problems

    runs = [read(folder) for folder in folders]
    found = [line for run in runs for line in _unfit(run)]
    if found:
        raise problems("--runs", found)
    first = runs[0]
    told = {
        "model": lambda r: r.before.sha256[:16],
        "domain": lambda r: f"{r.after.domain} ({str(_held_out(r))[:16]})",
        "held-out tokens": lambda r: r.after.tokens,
        "domains to forget": lambda r: ", ".join(r.forgotten),
    }
    for run in runs[1:]:
        found += [
            f"{run.folder} has another {what} than {first.folder}: {of(run)}, not {of(first)}"
            for what, of in told.items()
            if of(run) != of(first)
        ]
        if abs(run.after.parameters / first.after.parameters - 1) > ALIKE:
            found.append(
                f"{run.folder} has another size than {first.folder}: {run.after.parameters:,} "
                f"parameters, not {first.after.parameters:,}"
            )
    if not found:
        found = _named_twice(runs)
    if not found and all(run.weight or run.refit for run in runs):
        found.append(
            "none is the plain run that the others are held against: make it with `--forget "
            f"{','.join(first.forgotten)} --forget-weight 0 --forget-refit 0` and name it too"
        )
    if found:
        raise problems("--runs", found)
    return sorted(runs, key=lambda run: (run.weight, run.refit))


def _unfit(run: Finished) -> list[str]:
    """What keeps a run from the comparison, whatever the others are."""
    if run.told.get("made_from"):
        return [f"{run.folder} is a run of `recover`: give the `prune` runs"]
    if not (run.told.get("forget") or {}).get("domains"):
        return [
            f"{run.folder} was made without --forget, so nothing off its domain was measured: with "
            "--forget-weight 0 --forget-refit 0 it forgets nothing and measures it"
        ]
    return []


def _held_out(run: Finished) -> Any:
    from llm_narrow.report import at

    return at(run.told, "domain", "sha256", "held_out")


def _named_twice(runs: Sequence[Finished]) -> list[str]:
    """Runs that the table could not tell from one another."""
    found = []
    keys: tuple[tuple[str, Any], ...] = (
        ("name", lambda r: r.name), ("forgetting", lambda r: (r.weight, r.refit))
    )  # fmt: skip
    for what, of in keys:
        seen: dict[Any, Finished] = {}
        for run in runs:
            if (other := seen.setdefault(of(run), run)) is not run:
                found.append(f"{other.folder} and {run.folder} have the same {what}: leave one out")
    return found


def differing(runs: Sequence[Finished]) -> dict[str, dict[str, Any]]:
    """Settings that differ beside those that are compared, each with the value of every run."""
    flat = {run.name: dict(_flat(run.told["recipe"])) for run in runs}
    keys = {key: None for values in flat.values() for key in values}
    found = {}
    for key in keys:
        values = {name: own.get(key) for name, own in flat.items()}
        if any(key == free or key.startswith(f"{free}.") for free in FREE):
            continue
        if len({str(value) for value in values.values()}) > 1:
            found[key] = values
    return found


def _flat(section: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in section.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", value))
    return found


def row_of(run: Finished, plain: Finished) -> Row:
    """A run's figures on the domain and off it, and against the plain run's."""
    off = {}
    for name in run.forgotten:
        own, beside = (one.told["forget"]["domains"][name] for one in (run, plain))
        value, of_plain = own["selectivity"], beside["selectivity"]
        off[name] = {**own, "against_plain": value / of_plain if value and of_plain else None}
    ratio = run.after.bits_per_byte_ratio
    return {
        "name": run.name, "command": repeated(run), "forget_weight": run.weight,
        "forget_refit": run.refit, "parameters": run.after.parameters, "sha256": run.after.sha256,
        "bits_per_byte_before": run.before.bits_per_byte.value,
        "bits_per_byte": run.after.bits_per_byte.value,
        "bits_per_byte_ratio": None if ratio is None else vars(ratio),
        "cost": run.after.bits_per_byte.value / plain.after.bits_per_byte.value - 1,
        "off": off,
    }  # fmt: skip


def best(rows: Sequence[Row], name: str, most: float) -> str | None:
    """The most selective of those that forget and cost no more; None where there is none."""
    able = [
        row for row in rows
        if (row["forget_weight"] or row["forget_refit"]) and row["cost"] <= most
        and row["off"][name]["against_plain"] is not None
    ]  # fmt: skip
    return max(able, key=lambda row: row["off"][name]["selectivity"])["name"] if able else None


def repeated(run: Finished) -> str:
    """The command that gives the run today: its own, where the refit's default was 0 still."""
    plain = not run.refit and "--forget-refit" not in run.command
    return run.command.replace("--forget ", "--forget-refit 0 --forget ", 1 if plain else 0)


def page(about: Mapping[str, Any], rows: Sequence[Row], out: str, alt: str | None) -> str:
    """The answer, the table, the figure, what was measured, and the commands."""
    parts = [_answer(about, rows, name) for name in about["forgotten"]]
    parts += [_table(about, rows, name) for name in about["forgotten"]]
    if alt is not None:
        parts.append(f"![{alt}]({out}.svg)")
    parts.append(
        f"{about['model']}, {about['parameters_before']:,} parameters of which "
        f"{about['parameters']:,} stay, narrowed to {about['domain']}: {about['held_out_tokens']:,}"
        f" held-out tokens of {about['documents']} documents, seed {about['seed']}. Cost: bits per "
        f"byte on {about['domain']} above those of {about['plain']}, which forgets nothing. "
        "Selectivity: the rise in bits per byte off the domain ÷ that on it. Brackets: 95 % "
        "intervals over documents, paired with the whole model; cost and selectivity have none. "
        "The best is chosen by the figures that are shown, which favours it a little."
    )
    if about["differing"]:
        told = "; ".join(
            f"`{key}`: {', '.join(f'{name} {value}' for name, value in values.items())}"
            for key, values in about["differing"].items()
        )
        parts.append(f"**Beside forgetting the runs differ in** {told}.")
    lines = "\n".join(row["command"] for row in rows)
    parts.append(f"The runs, in the order of the table:\n\n```sh\n{lines}\n```")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _answer(about: Mapping[str, Any], rows: Sequence[Row], name: str) -> str:
    most, domain, plain = about["most_cost"], about["domain"], about["plain"]
    chosen = next((row for row in rows if row["name"] == about["best"][name]), None)
    if chosen is None:
        forgetting = [row for row in rows if row["forget_weight"] or row["forget_refit"]]
        least = min(forgetting, key=lambda row: row["cost"], default=None)
        why = "no run that forgets is given" if least is None else (
            f"none of {len(forgetting)} runs that forget costs so little and has a selectivity "
            f"that is defined, as has {plain}; the cheapest is {least['name']} at "
            f"{least['cost']:+.2%}"
        )  # fmt: skip
        return f"Forgetting {name} at a cost of at most {most:.1%} on {domain}: {why}."
    off = chosen["off"][name]
    times = off["against_plain"]
    verdict = "more" if times > 1 else "**not more**"
    goal = "" if times < GOAL else f", at least the {GOAL:g} times that were wanted"
    return (
        f"Best at a cost of at most {most:.1%} on {domain}: **{chosen['name']}** (weight "
        f"{chosen['forget_weight']:g}, refit {chosen['forget_refit']:g}) is {verdict} selective "
        f"against {name} than {plain}: {off['selectivity']:.3g}, {times:.2f} times as much{goal}, "
        f"at {chosen['cost']:+.2%}."
    )


def _table(about: Mapping[str, Any], rows: Sequence[Row], name: str) -> str:
    domain = about["domain"]
    head = ["run", "weight", "refit", f"bits per byte on {domain} ÷ whole", "cost",
            f"bits per byte on {name}, before → after", "÷ whole", "selectivity",
            f"÷ {about['plain']}"]  # fmt: skip
    lines = []
    for row in rows:
        off = row["off"][name]
        mark = "**" if row["name"] == about["best"][name] else ""
        lines.append([
            f"{mark}{row['name']}{mark}", f"{row['forget_weight']:g}", f"{row['forget_refit']:g}",
            _ranged(row["bits_per_byte_ratio"]), f"{row['cost']:+.2%}",
            f"{off['bits_per_byte_before']:.3f} → {off['bits_per_byte']:.3f}",
            _ranged(off["bits_per_byte_ratio"]), _or(off["selectivity"], "{:.3g}"),
            _or(off["against_plain"], "{:.2f}"),
        ])  # fmt: skip
    return results.table(head, lines)


def _ranged(e: Mapping[str, float] | None) -> str:
    if e is None:
        return "not paired"
    return f"{e['value']:.3f} ({e['low']:.3f} to {e['high']:.3f})"


def _or(value: float | None, form: str) -> str:
    return "not defined" if value is None else form.format(value)


def figure(about: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """Selectivity against cost, by what forgets; None where no selectivity is defined."""
    from llm_narrow import figure_style

    with figure_style.styled():
        return _figure(about, rows)


def _figure(about: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from llm_narrow.figure_style import COLOUR, MARKERS, SERIES, finished, legend, named, sheet

    points = [
        (row, name, row["off"][name]["selectivity"])
        for name in about["forgotten"] for row in rows
        if row["off"][name]["selectivity"] is not None
    ]  # fmt: skip
    if not points:
        return None
    several = len(about["forgotten"]) > 1
    drawing, axes = sheet(3.2)
    kinds = dict.fromkeys((_kind(row), name) for row, name, _ in points)
    handles = {}
    for number, (kind, name) in enumerate(kinds):
        own = [(row, y) for row, of, y in points if (_kind(row), of) == (kind, name)]
        own.sort(key=lambda pair: pair[0]["cost"])
        label = f"{kind}: {name}" if several else kind
        handles[label] = axes.plot(
            [row["cost"] for row, _ in own], [y for _, y in own],
            MARKERS[number % len(MARKERS)], ls=":", color=SERIES[number % len(SERIES)],
        )[0]  # fmt: skip
        for row, y in own:
            axes.annotate(named(row["name"]), (row["cost"], y), xytext=(4, 5), fontsize=8,
                          textcoords="offset points", color=COLOUR["muted"])  # fmt: skip
    axes.axvline(about["most_cost"], color=COLOUR["ink"], lw=0.8, ls=(0, (3, 3)))
    costs = [row["cost"] for row, _, _ in points]
    widest = max(*costs, about["most_cost"])
    # Straight up to the cost that is still borne, and in ratios beyond it.
    axes.set_xscale("symlog", linthresh=max(about["most_cost"], 1e-3))
    axes.set_xlim(min(0, *costs) - 0.2 * about["most_cost"], 1.6 * widest)
    ticks = [0.0, *(t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if t <= 1.6 * widest)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    values = [0.0, *(y for *_, y in points)]
    axes.set_ylim(1.15 * min(values), 1.15 * max(values))
    axes.set_xlabel(f"bits per byte on {about['domain']} above those of {about['plain']}")
    axes.set_ylabel("selectivity")
    legend(drawing, list(handles.values()), list(handles))
    told = "; ".join(f"{row['name']} {y:.3g} at {row['cost']:+.1%}" for row, _, y in points)
    return finished(
        drawing, "forgetting", title="What forgetting costs",
        caption="The dashed line is the cost that is still borne.",
        alt=f"Selectivity against what it costs on {about['domain']}: {told}.",
    )  # fmt: skip


def _kind(row: Row) -> str:
    if row["forget_weight"] and row["forget_refit"]:
        return "scores and refit"
    if row["forget_weight"]:
        return "scores"
    return "refit" if row["forget_refit"] else "forgets nothing"


if __name__ == "__main__":
    results.told(main)
