"""What a run folder holds, read for the report: manifest, rows, training curves, tensors."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from . import report
from . import rows as rowfile
from .errors import BadInput
from .rows import Row

Curve = Mapping[str, NDArray[np.float64]]  # column -> (lines,), NaN where a line has none
Arrays = dict[str, NDArray[Any]]
STAGES = ("lasso", "train", "recover")  # in the order in which a run goes through them
COLUMNS = (
    "step", "tokens", "loss", "validation", "lr", "tokens_per_second", "strength", "zero",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder. `curves` are of the stages that trained; tensors are read when asked for."""

    path: Path
    label: str
    manifest: Mapping[str, Any]
    rows: tuple[Row, ...]
    curves: Mapping[str, Curve]
    warnings: tuple[str, ...] = ()

    def tensors(self, *names: str) -> Arrays:
        """Of the first of the files that is there, empty if none is. BadInput if it is broken."""
        file = next((self.path / n for n in names if (self.path / n).is_file()), None)
        if file is None:
            return {}
        try:
            return load_file(file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file} is not a readable safetensors file: {error}.") from None

    @property
    def plan(self) -> list[dict[str, Any]]:
        """{group, kind, before, after} of each group, as far as the manifest has it."""
        found = report.at(self.manifest, "plan")
        rows = found if isinstance(found, list) else []
        return [
            dict(row)
            for row in rows
            if isinstance(row, Mapping)
            and {"group", "kind"} <= row.keys()
            and all(isinstance(row.get(key), int) for key in ("before", "after"))
        ]

    def kind(self, group: str) -> str:
        """The kind of a group's units: by the plan, else by the name."""
        for row in self.plan:
            if row["group"] == group:
                return str(row["kind"])
        return "heads" if "att" in group.rpartition(".")[2] else "neurons"


def read(path: Path, label: str | None = None) -> Run:
    """The run in a folder. Raises BadInput where it is missing, half-written or not readable.

    Lines of a curve that were not written to their end are left out.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a run folder: there is no such folder.")
    if not (path / "manifest.json").is_file():
        raise BadInput(f"{path} is missing its manifest.json: the run was not finished.")
    manifest = report.read_manifest(path / "manifest.json")
    rows: list[Row] = []
    warnings: list[str] = []
    if (path / "rows.jsonl").is_file():
        rows, warnings = rowfile.read(path / "rows.jsonl")
    for number, row in enumerate(rows, 1):
        if row.loss is None:
            raise BadInput(f"{path / 'rows.jsonl'}, row {number} has no loss. Measure again.")
    curves = {}
    for stage in STAGES:
        curve, lost = read_curve(path / f"{stage}.jsonl")
        if curve is not None:
            curves[stage] = curve
        if lost:
            warnings.append(f"{path / stage}.jsonl: {lost} of its lines cannot be read: left out.")
    name = label or path.resolve().name
    return Run(path, name, manifest, tuple(rows), curves, tuple(warnings))


def read_curve(file: Path) -> tuple[Curve | None, int]:
    """The columns of a file of JSON lines in the order of their tokens, and how many were lost.

    None if the file is missing or no line has tokens.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, 0
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        found: list[Any] = json.loads(f"[{','.join(lines)}]")  # ten times as fast as one by one
    except ValueError:
        found = [_line(line) for line in lines]
    good = [row for row in found if isinstance(row, dict) and math.isfinite(_number(row, "tokens"))]
    if not good:
        return None, len(found)
    columns = {c: _column(good, c) for c in COLUMNS}
    order = np.argsort(columns["tokens"], kind="stable")
    return {c: values[order] for c, values in columns.items()}, len(found) - len(good)


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each run folder: its own, with as many of its parents as tell it from others."""
    full = [path.resolve() for path in paths]
    longest = max((len(path.parts) for path in full), default=1)
    for depth in range(1, longest + 1):
        names = ["/".join(path.parts[-depth:]) for path in full]
        if len(set(names)) == len(set(full)):
            return names
    return [str(path) for path in full]


def layer_of(group: str, otherwise: int) -> int:
    """The layer's number in a group's name."""
    number = re.search(r"\d+", group)
    return int(number[0]) if number else otherwise


def curve_points(curve: Curve, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens and values of the lines that have a finite value in the column, both (n,)."""
    has = np.isfinite(curve[column])
    return curve["tokens"][has], curve[column][has]


def whole_curve(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """Tokens from the start of the first stage and the loss after them, and which loss it is.

    While the lasso draws units to zero the model is still whole, so that its losses are not those
    of the size: where a stage follows, only the lasso's tokens count. The loss is that on the
    validation blocks; where none was measured, that of training, each point the mean of a fiftieth
    of the steps. Both empty if the run did not train.
    """
    for column in ("validation", "loss"):
        parts, begun = [], 0.0
        for stage in STAGES:
            if (curve := run.curves.get(stage)) is None:
                continue
            if stage == "lasso" and "recover" in run.curves:
                begun += float(curve["tokens"].max())
                continue
            tokens, values = curve_points(curve, column)
            parts.append((tokens + begun, values))
            begun += float(curve["tokens"].max())
        tokens = np.concatenate([np.empty(0), *(t for t, _ in parts)])
        values = np.concatenate([np.empty(0), *(v for _, v in parts)])
        if len(tokens) and column == "validation":
            return tokens, values, "validation"
        if len(tokens):
            pieces = min(50, len(tokens))
            return (
                np.array([part[-1] for part in np.array_split(tokens, pieces)]),
                np.array([part.mean() for part in np.array_split(values, pieces)]),
                "training",
            )
    return np.empty(0), np.empty(0), ""


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """The numbers under a key, NaN where there is none or something else, (rows,)."""
    try:
        return np.array([row.get(key) for row in rows], np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        return np.array([_number(row, key) for row in rows])


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
