"""Draw the picture of the README: sizes against what they cost, and what one run kept.

    python examples/docs/front.py --runs one=runs/a,runs/b --runs two=runs/c --map runs/a \
        --peers docs/bench/peers.json --out docs/bench/front.svg

Left, bits per byte on held-out projects as those of the whole model, against the share of its
parameters that is left: a line for each name and its run folders, and other tools at the sizes that
examples/bench/peers.py measured. Right, a line per layer: which of its units stayed in the run of
--map, sorted by score.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from llm_narrow.figure_style import COLOUR, SERIES, finished, sheet, styled

COLUMNS = 96  # of the map
OWN = "llm-narrow"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, draw, write."""
    args = parse(argv)
    lines = {name: sorted(map(point, folders)) for name, folders in args.runs}
    whole = rows_of(args.map)[0]["parameters"]
    peers = best_of_peers(args.peers, whole) if args.peers else {}
    kept, names = mapped(args.map)
    with styled():
        text = drawn(lines, peers, kept, names, args.map.name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"Written: {args.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=line, action="append", required=True,
                        help="NAME=FOLDER,FOLDER…: a line of run folders")  # fmt: skip
    parser.add_argument("--map", type=Path, required=True, help="the run folder whose units show")
    parser.add_argument("--peers", type=Path, help="what examples/bench/peers.py wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/bench/front.svg"))
    return parser.parse_args(argv)


def line(text: str) -> tuple[str, list[Path]]:
    """A name and its run folders."""
    name, _, folders = text.partition("=")
    if not folders:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER,FOLDER…")
    return name, [Path(folder) for folder in folders.split(",")]


def point(run: Path) -> tuple[float, float, float, float]:
    """Share of the parameters that is left, and the ratio of bits per byte with its interval."""
    rows = rows_of(run)
    before, after = rows[0], rows[-1]
    ratio = "bits_per_byte_ratio"
    return (after["parameters"] / before["parameters"], after[ratio], after[f"{ratio}_low"],
            after[f"{ratio}_high"])  # fmt: skip


def rows_of(run: Path) -> list[dict[str, float]]:
    """What was measured before and after."""
    return [json.loads(row) for row in (run / "rows.jsonl").read_text("utf-8").splitlines()]


def best_of_peers(file: Path, whole: float) -> dict[str, tuple[float, float]]:
    """Of each other tool the best of its settings: parameters left, ratio of bits per byte."""
    found: dict[str, tuple[float, float]] = {}
    told = json.loads(file.read_text("utf-8"))
    for row in told["rows"]:
        share = row["parameters"] / whole
        ratio = row["bits_per_byte_ratio"]["value"]
        if row["tool"] != OWN and ratio < found.get(row["tool"], (0.0, np.inf))[1]:
            found[row["tool"]] = share, ratio
    return found


def mapped(run: Path) -> tuple[np.ndarray, list[str]]:
    """A row per layer: the share of each bin of its neurons, best-scored first, that stayed."""
    keep = load_file(run / "model" / "keep.safetensors")
    scores = load_file(run / "scores.safetensors")
    names = sorted((n for n in keep if n.endswith("mlp")), key=lambda n: [int(p) for p in
                   n.split(".") if p.isdigit()])  # fmt: skip
    rows = []
    for name in names:
        stayed = keep[name][np.argsort(-scores[name], kind="stable")].astype(float)
        bins = np.array_split(stayed, min(COLUMNS, len(stayed)))
        rows.append([part.mean() for part in bins])
    return np.array(rows), names


def drawn(
    lines: dict[str, list[tuple[float, float, float, float]]],
    peers: dict[str, tuple[float, float]], kept: np.ndarray, names: list[str], run: str,
) -> str:  # fmt: skip
    """The picture as SVG."""
    figure, (left, right) = sheet(3.2, ncols=2, width_ratios=[1.25, 1])
    for (name, points), colour in zip(lines.items(), SERIES, strict=False):
        share, ratio, low, high = (np.array(v) for v in zip(*points, strict=True))
        left.errorbar(100 * share, ratio, yerr=[ratio - low, high - ratio], color=colour,
                      marker="o", markersize=4, capsize=2, label=name)  # fmt: skip
    # Of two that lie close together the lower one has its name below.
    for at, (name, (share, ratio)) in enumerate(sorted(peers.items(), key=lambda p: p[1][1])):
        left.plot(100 * share, ratio, "x", color=COLOUR["muted"])
        left.annotate(name, (100 * share, ratio), xytext=(6, (-9, 3)[at % 2]),
                      textcoords="offset points", fontsize=8, color=COLOUR["muted"])  # fmt: skip
    left.axhline(1.0, color=COLOUR["rule"], linewidth=1)
    left.set_xlabel("% of the parameters left")
    left.set_ylabel("bits per byte ÷ whole model")
    left.margins(x=0.25)
    left.invert_xaxis()
    left.legend(frameon=False, fontsize=8, loc="center left")
    right.imshow(kept, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
    right.set_title(f"neurons kept by layer, {run}", fontsize=9)
    right.set_xlabel("best-scored → worst")
    right.set_ylabel("layer")
    right.grid(False)
    right.set_xticks([])
    right.set_yticks(range(0, len(names), 5))
    picture = finished(figure, "front", title="", caption="", alt="")
    return picture.svg


if __name__ == "__main__":
    main()
