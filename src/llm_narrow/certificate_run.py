"""What a run folder says of its model for a certificate: figures on its domain, and its speed."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import checkpoint
from . import rows as rowfile
from .certificate_form import Interval, OnDomain, Speed
from .errors import BadInput
from .relearn_subjects import manifests, whole_of
from .report import at, read_manifest
from .rows import Estimate, Row, Spread


@dataclass(frozen=True)
class Measured:
    """What a run folder says of its model."""

    folder: Path
    told: Mapping[str, Any]
    sha256: str
    original: Mapping[str, Any]
    rows: tuple[Row, Row]  # of the whole model, and of its own
    paired: bool  # whether the ratios in its row are to the whole model's
    measured_by: str

    @property
    def domain(self) -> str:
        """What it was narrowed to."""
        return self.rows[1].domain

    @property
    def command(self) -> str:
        """The one that made it."""
        found = at(self.told, "command")
        return " ".join(map(str, found)) if isinstance(found, list) else str(found)


def read(folder: Path, bench: Path | None) -> Measured:
    """What a run folder says, its rows against the whole model; `bench` where they are not.

    Raises BadInput, also for weights that are not those that were measured.
    """
    manifests([folder])  # refuses what is no finished run
    told = read_manifest(folder / "manifest.json")
    rows, _ = rowfile.read(folder / "rows.jsonl")
    labelled = {row.label: row for row in rows}
    if not {"before", "after"} <= labelled.keys():
        raise BadInput(f"{folder / 'rows.jsonl'} lacks the rows before and after. Run it again.")
    before, after = labelled["before"], labelled["after"]
    own = checkpoint.weights_sha256(folder / "model")
    if own != after.sha256:
        raise BadInput(
            f"{folder / 'model'} has weights with SHA-256 {own[:16]}…, and its figures are of "
            f"{after.sha256[:16]}…. Measure again: they are not of this model."
        )
    try:
        original = whole_of(told)
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from None
    run = Measured(folder, told, own, original, (before, after), True, "")
    run = replace(run, measured_by=run.command)
    if before.sha256 == original["sha256"]:
        return run
    # A run that went on with another one was measured against that.
    if bench is not None:
        return replace(run, rows=_benched(bench, run), measured_by=bench_command(run))
    if (whole := _earlier(told, original["sha256"])) and _comparable(whole, after):
        return replace(run, rows=(whole, after), paired=False)
    raise BadInput(
        f"{folder} was measured against {before.model}, and not against the whole model "
        f"{original['name']}. `{bench_command(run)} > bench.json` does: give it as --bench."
    )


def _earlier(told: Mapping[str, Any], sha256: str) -> Row | None:
    """The row of the whole model in the runs that a run goes back to."""
    while name := at(told, "model", "name"):
        folder = Path(name).parent if Path(name).name == "model" else Path(name)
        if not (folder / "rows.jsonl").is_file():
            return None
        for row in rowfile.read(folder / "rows.jsonl")[0]:
            if row.sha256 == sha256:
                return row
        told = read_manifest(folder / "manifest.json")
    return None


def _comparable(one: Row, other: Row) -> bool:
    """Whether two rows are of the same text, as far as rows tell."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("domain", "part", "tokens", "documents")
    )


def on_domain(run: Measured) -> OnDomain:
    """The part of the certificate on its own domain."""
    before, after = run.rows
    ratio = after.bits_per_byte_ratio if run.paired else None
    difference = after.loss_difference if run.paired else None
    rise = after.bits_per_byte.value / before.bits_per_byte.value - 1
    sha256 = at(run.told, "domain", "sha256", after.part)
    return OnDomain(
        domain=run.domain, part=after.part, sha256=sha256 if isinstance(sha256, str) else None,
        tokens=after.tokens, documents=after.documents,
        loss=(_interval(before.loss), _interval(after.loss)),
        bits_per_byte=(_interval(before.bits_per_byte), _interval(after.bits_per_byte)),
        accuracy=(_interval(before.accuracy), _interval(after.accuracy)),
        increase=(
            Interval(value=rise, low=None, high=None) if ratio is None
            else Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)
        ),
        difference=None if difference is None else _interval(difference), command=run.measured_by,
    )  # fmt: skip


def speed_of(run: Measured, row: Row | None = None) -> Speed | None:
    """That of a row which is timed against the whole model; by default the run's own."""
    own = row or run.rows[1]
    if own.prefill_ratio is None or own.decode_ratio is None or not (row or run.paired):
        return None
    return Speed(
        prefill=_interval(own.prefill_ratio), decode=_interval(own.decode_ratio),
        command=bench_command(run) if row else run.measured_by,
    )  # fmt: skip


def _benched(file: Path, run: Measured) -> tuple[Row, Row]:
    """The rows of the whole model and of the run's in the JSON of a `bench`."""
    try:
        rows = [Row.from_dict(row) for row in json_of(file)["rows"]]
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{file} is not what `bench --json` prints. Give that.") from None
    own = next((row for row in rows[1:] if row.sha256 == run.sha256), None)
    if own is None or rows[0].sha256 != run.original["sha256"] or own.domain != run.domain:
        raise BadInput(
            f"{file} does not compare {run.folder} with its whole model on {run.domain}. "
            f"`{bench_command(run)}` does."
        )
    return rows[0], own


def timed(file: Path, run: Measured) -> Speed:
    """The speed in the JSON of a `bench`. Raises BadInput where it has none of the model."""
    speed = speed_of(run, _benched(file, run)[1])
    if speed is None:
        raise BadInput(f"{file} has no speeds: it was made with --no-speed. Make it without.")
    return speed


def bench_command(run: Measured) -> str:
    """What measures a run against its whole model."""
    names = [str(run.original["name"]), str(run.folder)]
    return shlex.join(["llm-narrow", "bench", *names, "--domain", run.domain, "--json"])


def json_of(file: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises BadInput."""
    if not file.is_file():
        raise BadInput(f"There is no {file}. Give the file that the command wrote.")
    return read_manifest(file)


def _interval(found: Estimate | Spread) -> Interval:
    return Interval(value=found.value, low=found.low, high=found.high)
