"""How many units of each kind each layer has, before and after: the rows of a report's table."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from .errors import BadInput


def cells(plan: Any) -> list[list[str]]:
    """A row for each run of equal layers, the header first; none for a plan that is none."""
    if not isinstance(plan, list) or not plan or not all(_is_row(row) for row in plan):
        return []
    kinds = list(dict.fromkeys(str(p["kind"]) for p in plan))
    layers: dict[int, dict[str, tuple[int, int]]] = {}
    for p in plan:
        number = re.search(r"\d+", str(p["group"]))
        layer = layers.setdefault(int(number[0]) if number else len(layers), {})
        layer[str(p["kind"])] = (int(p["before"]), int(p["after"]))
    found = [["layers", *kinds]]
    for _, same in itertools.groupby(sorted(layers.items()), key=lambda item: item[1]):
        run = list(same)
        ends = {str(run[0][0]): None, str(run[-1][0]): None}
        found.append(["-".join(ends), *(_change(run[0][1].get(kind)) for kind in kinds)])
    total = [_sum(layer.get(kind) for layer in layers.values()) for kind in kinds]
    if len(found) > 2:
        found.append(["all", *(_change(t) for t in total)])
    return found


def _is_row(row: Any) -> bool:
    numbers = ("before", "after")
    return isinstance(row, dict) and {"group", "kind", *numbers} <= row.keys() and all(
        isinstance(row[n], int) for n in numbers
    )


def _change(width: tuple[int, int] | None) -> str:
    if width is None:
        return "-"
    before, after = width
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _sum(found: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    pairs = [pair for pair in found if pair is not None]
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def plan_of(run: Path) -> list[dict[str, Any]]:
    """The plan as keep.safetensors tells it, for a manifest that does not."""
    places = (run / "model/keep.safetensors", run / "keep.safetensors")
    file = next((f for f in places if f.exists()), None)
    if file is None:
        return []
    try:
        keep = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file} is not a readable safetensors file: {error}.") from None
    return [
        {"group": name, "kind": _kind(name), "before": units.size, "after": int(units.sum())}
        for name, units in keep.items()
    ]


def _kind(group: str) -> str:
    return "heads" if "att" in group.rpartition(".")[2] else "neurons"
