"""The certificate of a run as a part of its report, where its folder has one."""

from pathlib import Path
from typing import Any

from . import certificate
from .certificate_form import FILE, Certificate
from .certificate_text import card_section, off_domain, sources, summary
from .errors import BadInput


def found(folder: Path) -> tuple[Certificate | None, list[str]]:
    """The certificate of a run folder, if it has one, and why it is left out if it has another."""
    try:
        return certificate.load(folder), []
    except BadInput as error:
        return None, [f"The certificate is left out: {error}"]


def section(held: Certificate | None) -> dict[str, Any] | None:
    """What the template needs."""
    if held is None:
        return None
    tables = [("What was measured", summary(held))]
    if held.off_domain:
        tables.append(("What it is not for", off_domain(held)))
    where = [[cell.strip("`") for cell in row] for row in sources(held)]
    return {
        "purpose": held.purpose, "tables": tables, "sources": where, "file": FILE,
        "lacking": list(held.not_measured.items()),
    }  # fmt: skip


def markdown(held: Certificate | None) -> str:
    """The section of report.md; empty without a certificate."""
    return "" if held is None else f"\n{card_section(held)}\n"
