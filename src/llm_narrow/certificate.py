"""Make the certificate of a run: from its own rows, a domain matrix and relearning audits."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import RenderableType

from . import checkpoint, manifest
from .certificate_form import (
    FILE,
    Certificate,
    Interval,
    OffDomain,
    Relearning,
    Selectivity,
    Speed,
    Weights,
)
from .certificate_run import Measured, bench_command, json_of, on_domain, read, speed_of, timed
from .certificate_text import card_section, markdown, shown
from .cost import weight_bytes
from .errors import BadInput
from .relearn import replaced
from .relearn_subjects import method_of
from .report import at

TEXT = "certificate.md"
BEGIN, END = "<!-- certificate -->", "<!-- /certificate -->"  # around its section of a model card
ON, OFF = "domain", "off the domain"  # as matrix.json calls them
BYTES = math.log(2)  # nats of a bit


@dataclass(frozen=True)
class Certified:
    """A certificate, and the files that it was written to."""

    certificate: Certificate
    files: tuple[Path, ...]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return self.certificate.model_dump(mode="json")

    def shown(self) -> RenderableType:
        """What the command line prints."""
        return shown(self.certificate, self.files)


def certify(
    run: Path | str,
    *,
    matrix: Path | str | None = None,
    relearn: Sequence[Path | str] = (),
    bench: Path | str | None = None,
    command: str | None = None,
) -> Certified:
    """Write certificate.json and certificate.md into a run folder, and a section into its card.

    `matrix` is the matrix.json of `bench --matrix`, `relearn` folders of audits, `bench` the JSON
    of a `bench` that timed the model. Raises BadInput for files that are not of this model.
    """
    folder = Path(run)
    given = {"matrix": matrix and str(matrix), "relearn": [str(f) for f in relearn],
             "bench": bench and str(bench)}  # fmt: skip
    told = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    line = command or f"llm_narrow.certificate.certify({str(run)!r}{told})"
    made = of(folder, matrix=matrix, relearn=relearn, bench=bench, command=line)
    text = json.dumps(made.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    card = folder / "model" / "README.md"
    files = {
        folder / FILE: text, folder / TEXT: markdown(made),
        folder / "model" / FILE: text, card: with_section(card, card_section(made)),
    }  # fmt: skip
    for file, content in files.items():
        replaced(file, content)
    return Certified(made, tuple(files))


def of(
    folder: Path, *, matrix: Path | str | None = None, relearn: Sequence[Path | str] = (),
    bench: Path | str | None = None, command: str = "",
) -> Certificate:  # fmt: skip
    """The certificate of a run folder; nothing is written. Raises BadInput."""
    run = read(folder, None if bench is None else Path(bench))
    before, after = run.rows
    off: list[OffDomain] = []
    selectivity = None
    if matrix is not None:
        measured, selectivity = _of_matrix(json_of(Path(matrix)), Path(matrix), run)
        off += measured
    again = []
    for audit in map(Path, relearn):
        found, lost, chosen = _of_audit(json_of(audit / "relearn.json"), audit, run)
        again.append(found)
        off.append(lost)
        if selectivity is None:
            selectivity = chosen
    recovered = at(run.told, "recover", "tokens")
    size = after.bytes if after.bytes is not None else weight_bytes(folder / "model")
    speed = speed_of(run) if bench is None else timed(Path(bench), run)
    stability = {str(k): float(v) for k, v in (at(run.told, "stability") or {}).items()}
    return Certificate(
        command=command, versions=manifest.versions(),
        purpose=(
            f"Text of the domain {run.domain}, and nothing else: {run.original['name']}, narrowed "
            "to it by removing what it does not need. Off that domain expect worse."
        ),
        method=method_of(run.told),
        model=Weights(
            name=str(folder), sha256=run.sha256, parameters=after.parameters, bytes=size
        ),
        original=Weights(
            name=str(run.original["name"]), sha256=str(run.original["sha256"]),
            parameters=int(run.original.get("parameters") or before.parameters),
            bytes=before.bytes,
        ),
        made_by=run.command, recovered_tokens=recovered if isinstance(recovered, int) else 0,
        on_domain=on_domain(run), speed=speed, off_domain=tuple(off), selectivity=selectivity,
        relearning=tuple(again), stability=stability,
        not_measured=dict(_lacking(run, speed, selectivity, again, off, stability)),
    )  # fmt: skip


def load(folder: Path) -> Certificate | None:
    """The certificate of a run folder, if it has one. Raises BadInput where it is not of its model,
    or not a certificate."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        found = Certificate.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise BadInput(
            f"{file} is no certificate of this version ({str(error).splitlines()[0]}). Write it "
            "again with `llm-narrow certify`."
        ) from None
    if found.model.sha256 != (own := checkpoint.weights_sha256(folder / "model")):
        raise BadInput(
            f"{file} is of weights with SHA-256 {found.model.sha256[:16]}…, and those in "
            f"{folder / 'model'} have {own[:16]}…. Measure this model and certify it again."
        )
    return found


def with_section(card: Path, section: str) -> str:
    """The text of a model card with the section, in the place of one that was there before."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    begin, end = text.find(BEGIN), text.find(END)
    if 0 <= begin < end:
        return f"{text[:begin]}{BEGIN}\n{section}\n{text[end:]}"
    return f"{text.rstrip()}\n\n{BEGIN}\n{section}\n{END}\n".lstrip()


def _of_matrix(
    found: Mapping[str, Any], file: Path, run: Measured
) -> tuple[list[OffDomain], Selectivity | None]:
    """What a matrix.json (form 1) says of the model off its domain."""
    try:
        models = {one["sha256"]: str(one["name"]) for one in found["models"]}
        sets, first = found["sets"], str(found["models"][0]["name"])
        command = at(found, "command") or _matrix([*models.values()], sets)
        name = models.get(run.sha256)
        whole = found["models"][0]["sha256"]
        if found.get("form") != 1:
            raise BadInput(
                f"{file} is of form {found.get('form')}, and this version reads form 1. Run "
                f"`{_matrix([*models.values()], sets)}` again."
            )
        if name is None or whole != run.original["sha256"]:
            raise BadInput(
                f"{file} does not compare {run.folder} with its whole model. "
                f"`{_matrix([str(run.original['name']), str(run.folder)])}` does."
            )
        rows = {(r["set"], r["model"]): r for r in [*found["losses"], *found["choices"]]}
        off = []
        for key, about in sets.items():
            own, base = rows.get((key, name)), rows.get((key, first))
            if about["own"] or own is None or base is None:
                continue
            text = "bits_per_byte" in own
            measure, rise = ("bits_per_byte", "increase") if text else ("acc", "acc_difference")
            off.append(
                OffDomain(
                    name=key, group=about["group"],
                    measure="bits_per_byte" if text else "accuracy",
                    before=_flat(base, measure), after=_flat(own, measure),
                    increase=None if own.get(rise) is None else _flat(own, rise),
                    sha256=about["sha256"], command=command,
                )
            )  # fmt: skip
        ratios = [r for r in found["selectivities"] if r["model"] == name and r["off"] == OFF]
        ratios.sort(key=lambda r: r["on"] != ON)
        return off, _selected(ratios[0], command) if ratios else None
    except (KeyError, TypeError, IndexError, AttributeError, ValidationError) as error:
        raise BadInput(f"{file} is no matrix.json of `bench --matrix`: {error!r}.") from None


def _selected(row: Mapping[str, Any], command: str) -> Selectivity:
    on, off = float(row["on_increase"]), float(row["off_increase"])
    return Selectivity(
        value=row["selectivity"], low=row["selectivity_low"], high=row["selectivity_high"],
        unbounded=on <= 0 < off, on_increase=on, off_increase=off,
        over=f"{row['off']}, against {row['on']}", command=command,
    )  # fmt: skip


def _of_audit(
    found: Mapping[str, Any], folder: Path, run: Measured
) -> tuple[Relearning, OffDomain, Selectivity]:
    """What an audit says: the ratio, the domain before any training, selectivity against it."""
    file = folder / "relearn.json"
    try:
        lines = found["lines"]
        whole = next(x for x in lines if x["subject"]["kind"] == "whole")
        own = next((x for x in lines if x["subject"]["sha256"] == run.sha256), None)
        if own is None or whole["subject"]["sha256"] != run.original["sha256"]:
            raise BadInput(
                f"{folder} does not audit {run.folder} against its whole model. `llm-narrow "
                f"relearn {shlex.quote(str(run.folder))} --domain … --tokens …` does."
            )
        name, domain = own["subject"]["name"], found["domain"]
        answer = next(a for a in found["answers"] if a["subject"] == name and a["asked"])
        kept = {
            key: answer[key] for key in
            ("goal", "target", "tokens", "scratch_tokens", "budget", "ratio", "at_least", "at_most",
             "low", "high")
        }  # fmt: skip
        about = {"sha256": domain["sha256"]["held_out"], "command": found["command"]}
        relearning = Relearning(domain=domain["name"], seeds=len(own["seeds"]), **kept, **about)
        pair = [Interval(**line["curve"][0]["bits_per_byte"]) for line in (whole, own)]
    except (KeyError, TypeError, IndexError, StopIteration, ValidationError) as error:
        raise BadInput(f"{file} is no relearn.json of `relearn`: {error!r}.") from None
    rise = (pair[1].value - pair[0].value) * BYTES
    before, after = (row.bits_per_byte.value for row in run.rows)
    on = (after - before) * BYTES
    lost = OffDomain(
        name=domain["name"], group="own", measure="bits_per_byte", before=pair[0], after=pair[1],
        increase=Interval(value=rise, low=None, high=None), **about,
    )  # fmt: skip
    selectivity = Selectivity(
        value=rise / on if on > 0 else None, low=None, high=None, unbounded=on <= 0 < rise,
        on_increase=on, off_increase=rise, over=f"{domain['name']}, against {run.domain}",
        command=found["command"],
    )  # fmt: skip
    return relearning, lost, selectivity


def _lacking(
    run: Measured, speed: Speed | None, selectivity: Selectivity | None,
    again: Sequence[Relearning], off: Sequence[OffDomain], stability: Mapping[str, float],
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """What is not measured, each with the commands that do."""
    certify = f"llm-narrow certify {shlex.quote(str(run.folder))}"
    names = [str(run.original["name"]), str(run.folder)]
    if speed is None:
        yield "speed", f"{bench_command(run)} > bench.json; {certify} --bench bench.json"
    if selectivity is None:
        yield "selectivity", f"{_matrix(names)} --out matrix; {certify} --matrix matrix/matrix.json"
    if not off:
        yield "off_domain", f"{_matrix(names)} --out matrix; {certify} --matrix matrix/matrix.json"
    if not again:
        audit = f"llm-narrow relearn {shlex.quote(str(run.folder))} --domain english --tokens 500k"
        yield "relearning", f"{audit} --out audit; {certify} --relearn audit"
    if not stability:
        recipe = shlex.quote(str(run.folder / "recipe.yaml"))
        yield "stability", f"llm-narrow prune --recipe {recipe} --dry-run"


def _matrix(names: Sequence[str], sets: Sequence[str] | Mapping[str, Any] = ("all",)) -> str:
    return shlex.join(["llm-narrow", "bench", *names, "--matrix", ",".join(sets)])


def _flat(row: Mapping[str, Any], name: str) -> Interval:
    return Interval(value=row[name], low=row[f"{name}_low"], high=row[f"{name}_high"])


