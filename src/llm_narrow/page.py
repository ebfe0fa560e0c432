"""The report people look at: report.html with its figures, report.md, and a CSV of all rows.

The page needs nothing but itself: style, script and drawings are in it, and it is read without
the script too.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from . import certificate_page, explain_page, figure_compare, figures, page_runs, report
from .cache import no_space
from .errors import BadInput, problems
from .figure_style import PALETTE, Drawn, visible
from .page_compare import compare, entry
from .page_compared import compared_page, markdown
from .page_runs import Run
from .page_text import run_page
from .rows import RANGES, Row

IDENTITY = ("run", "method", "size", "seed", "lr", "trained_tokens")


@dataclass(frozen=True)
class Written:
    """What `write` left: the files, what was wrong with the runs, and the bytes of it all."""

    html: Path
    md: Path
    csv: Path
    figures: tuple[Path, ...]
    warnings: tuple[str, ...]
    bytes: int


def write(runs: Sequence[Path], out: Path, *, strict: bool = False) -> Written:
    """Report one run, or compare several, into the folder `out`.

    A run that is missing, half-written or not readable is skipped with a warning; with `strict`
    it is refused. Raises BadInput if no run is left, if runs cannot be compared, or if `out`
    cannot be written.
    """
    found, warnings = _read(runs, strict)
    if len(runs) == 1:
        run = found[0]
        _check_measured(run)
        drawn, lost = figures.draw(run)
        held, refused = certificate_page.found(run.path)
        told, left_out = explain_page.found(run.path)
        warnings += [*run.warnings, *lost, *refused, *left_out]
        page = run_page(run, drawn) | {
            "certificate": certificate_page.section(held), "explained": explain_page.section(told)
        }  # fmt: skip
        md = report.markdown(run.path) + certificate_page.markdown(held)
        md += explain_page.markdown(told)
    else:
        comparison = compare(found)
        warnings += [*(w for run in found for w in run.warnings), *comparison.warnings]
        drawn = figure_compare.draw(comparison)
        page, md = compared_page(comparison, drawn), markdown(comparison, drawn, warnings)
    if strict and warnings:
        raise problems("The report", warnings)
    files: dict[str, bytes] = {
        "report.html": _bytes(render(page, drawn, warnings)),
        "report.md": _bytes(md),
        "rows.csv": _bytes(table(found)),
    }
    for d in drawn:
        files |= {f"figures/{d.name}.svg": _bytes(d.svg), f"figures/{d.name}.png": d.png}
    _write(out, files)
    return Written(
        out / "report.html",
        out / "report.md",
        out / "rows.csv",
        tuple(out / name for name in files if name.startswith("figures/")),
        tuple(warnings),
        sum(map(len, files.values())),
    )


def render(page: Mapping[str, Any], drawn: Sequence[Drawn], warnings: Sequence[str]) -> str:
    """The HTML of a page. Everything but our own drawings is escaped."""
    environment = Environment(
        loader=PackageLoader("llm_narrow"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )  # fmt: skip
    environment.filters["ranged"] = ranged
    template = environment.get_template("report.html.jinja")
    inline = {d.name: Markup(d.inline) for d in drawn}
    return template.render(
        **{"certificate": None, "explained": None, **page}, palette=PALETTE, drawn=drawn,
        inline=inline, warnings=list(warnings),
    )  # fmt: skip


def ranged(text: str) -> Markup:
    """`2.404 [2.35, 2.46]` with the interval set apart."""
    value, bracket, interval = visible(text).partition(" [")
    if not bracket:
        value, bracket, interval = value.partition(" (")
    shown = escape(value)
    if bracket:
        shown += Markup(' <span class="range">{}{}</span>').format(bracket.strip(), interval)
    return shown


def table(runs: Sequence[Run]) -> str:
    """All rows of all runs as CSV; an estimate has three columns, what was not measured is empty.

    `trained_tokens` are of the training of the run, `tokens` those that the row was measured on.
    """
    columns = list(IDENTITY)
    for f in fields(Row):
        columns += [f.name, f"{f.name}_low", f"{f.name}_high"] if f.name in RANGES else [f.name]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        if not run.rows:
            continue
        e = entry(run)
        identity = (run.label, e.method, e.size, e.seed, e.lr, e.tokens)
        for row in run.rows:
            writer.writerow(dict(zip(IDENTITY, identity, strict=True)) | row.to_dict())
    return out.getvalue()


def _read(paths: Sequence[Path], strict: bool) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and why the others cannot."""
    paths = list({path.resolve(): path for path in paths}.values())
    found, wrong = [], []
    for path, label in zip(paths, page_runs.labels(paths), strict=True):
        try:
            run = page_runs.read(path, label)
            if len(paths) > 1 and not run.rows:
                raise BadInput(f"{path} has no rows.jsonl: nothing of it was measured.")
        except BadInput as error:
            wrong.append(str(error))
            continue
        found.append(run)
    if wrong and (strict or not found):
        raise problems("The report", wrong) if len(wrong) > 1 else BadInput(wrong[0])
    if not found:
        raise BadInput("There is no run to report. Name at least one run folder.")
    return found, [f"Skipped: {text}" for text in wrong]


def _check_measured(run: Run) -> None:
    """Refuse rows that lack what the tables of one run are of."""
    for number, row in enumerate(run.rows, 1):
        lacking = [n for n in ("loss", "bits_per_byte", "accuracy") if getattr(row, n) is None]
        if lacking:
            raise BadInput(
                f"{run.path / 'rows.jsonl'}, row {number} has no {' and no '.join(lacking)}. "
                "Measure again."
            )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Each file whole or not at all; figures of an earlier report that are no more are removed."""
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name in {*figures.FIGURES, *figure_compare.COMPARED}:
            for old in (f"figures/{name}.svg", f"figures/{name}.png"):
                if old not in files:
                    (out / old).unlink(missing_ok=True)
        for name, data in files.items():
            fresh = (out / name).with_name(f".{Path(name).name}.partial")
            try:
                fresh.write_bytes(data)
                fresh.replace(out / name)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        raise no_space(error, out) or BadInput(
            f"{out} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error
