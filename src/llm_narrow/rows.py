"""A row is what was measured of one model on one part of one domain; rows.jsonl holds them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import BadInput


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval over documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """The median of repeated timings, with the least and the greatest of them."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One model on one part of a domain. What is None was not measured.

    `loss` is in nats per token. `loss_difference` and `bits_per_byte_ratio` are paired, document
    by document, with the first row of the same run. Speeds are tokens per second; their ratios
    are to the first model, timed side by side. `flops` are those of one token with half of
    `prompt_tokens` as context, `prefill_flops` those of the whole prompt.
    """

    label: str
    model: str
    sha256: str
    domain: str
    part: str
    tokens: int
    documents: int
    loss: Estimate
    bits_per_byte: Estimate
    accuracy: Estimate
    parameters: int
    parameters_without_embeddings: int
    bytes: int | None = None
    loss_difference: Estimate | None = None
    bits_per_byte_ratio: Estimate | None = None
    prompt_tokens: int | None = None
    flops: float | None = None
    prefill_flops: float | None = None
    prefill: float | None = None
    decode: float | None = None
    prefill_ratio: Spread | None = None
    decode_ratio: Spread | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able: an estimate `loss` becomes `loss`, `loss_low` and `loss_high`."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in RANGES and value is not None:
                flat |= {name: value["value"], f"{name}_low": value["low"]}
                flat[f"{name}_high"] = value["high"]
            else:
                flat[name] = value
        return flat

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "Row":
        """The row that `to_dict` flattened; unknown keys are left out. Raises KeyError."""
        found: dict[str, Any] = {}
        for f in fields(cls):
            value = flat.get(f.name) if f.default is not MISSING else flat[f.name]
            if f.name in RANGES and value is not None:
                value = RANGES[f.name](value, flat[f"{f.name}_low"], flat[f"{f.name}_high"])
            found[f.name] = value
        return cls(**found)


RANGES: dict[str, type[Estimate] | type[Spread]] = {
    "loss": Estimate,
    "bits_per_byte": Estimate,
    "accuracy": Estimate,
    "loss_difference": Estimate,
    "bits_per_byte_ratio": Estimate,
    "prefill_ratio": Spread,
    "decode_ratio": Spread,
}


def append(file: Path, rows: Sequence[Row]) -> None:
    """Add the rows to `file` as whole lines, in one write, on the disk when this returns.

    A last line that an earlier, interrupted write left unfinished is cut off first.
    """
    lines = "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
    with file.open("ab+") as out:
        out.seek(0)
        held = out.read()
        whole = held.rfind(b"\n") + 1
        if _is_json(held[whole:]):
            lines = "\n" + lines
        elif whole < len(held):
            out.truncate(whole)
        out.write(lines.encode())
        out.flush()
        os.fsync(out.fileno())


def read(file: Path) -> tuple[list[Row], list[str]]:
    """The rows of `file`, and warnings: an unfinished last line is skipped, and said so.

    Raises BadInput if the file is missing or any other line is not a row.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}. Measure first.") from None
    rows, warnings = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise BadInput(
                    f"{file}, line {number} is not a row: {why}. Remove the line or measure again."
                ) from None
            warnings.append(f"{file.name}, line {number} was not written to its end: skipped.")
    return rows, warnings


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
