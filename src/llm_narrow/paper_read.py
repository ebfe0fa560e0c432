"""What the judges are given: the results that lie in a folder, as plain data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import page_runs
from .errors import BadInput
from .report import at
from .rows import Row

Results = Mapping[str, Any]


def held(file: Path, *keys: str) -> Results | None:
    """The JSON object of a file, or what it holds under the keys; None where it is not there.

    Raises BadInput for a file that is not JSON.
    """
    try:
        found: Any = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} is not readable JSON: {error}. Run it again.") from None
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def comparison(*folders: Path) -> Results | None:
    """The finished runs of comparisons, and the advantages that the first one found.

    None until the first of them is finished. A run is {method, size, seed, lr, tokens, model,
    parameters, neurons_removed (a share; None of fresh weights), unpruned, loss, difference
    (paired with the unpruned model), training ([tokens, loss] of each step)}.
    """
    told = held(folders[0] / "compare.json") if folders else None
    if told is None:
        return None
    runs = []
    for folder in folders:
        for place in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (place / "manifest.json").is_file() and (run := _run(place)) is not None:
                runs.append(run)
    return {"runs": runs, "advantages": told["advantages"]}


def _run(place: Path) -> dict[str, Any] | None:
    run = page_runs.read(place)
    method = at(run.manifest, "compare", "method")
    rows: dict[str, Row] = {row.label: row for row in run.rows}
    if method is None or not {"before", "after"} <= rows.keys():
        return None
    before, after = rows["before"], rows["after"]
    if after.loss_difference is None:
        return None
    neurons = [row for row in run.plan if row["kind"] == "neurons"]
    whole = sum(row["before"] for row in neurons)
    gone = whole - sum(row["after"] for row in neurons)
    fresh = method in ("distilled", "scratch")
    curve = run.curves.get("recover")
    steps = () if curve is None else page_runs.curve_points(curve, "loss")
    return {
        **{key: at(run.manifest, "compare", key)
           for key in ("method", "size", "seed", "lr", "tokens")},
        "model": str(at(run.manifest, "model", "name") or before.model),
        "parameters": after.parameters,
        "neurons_removed": gone / whole if whole and not fresh else None,
        "unpruned": vars(before.loss), "loss": vars(after.loss),
        "difference": vars(after.loss_difference),
        "training": [list(pair) for pair in zip(*(s.tolist() for s in steps), strict=True)],
    }  # fmt: skip
