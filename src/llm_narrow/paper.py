"""The paper that this library comes from, claim by claim: what was run of it here, and the verdict.

A row is judged from the results that lie in a folder, those of the preset `paper` before those of
`quick`. Nothing is written down by hand: what is not run has no verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from . import paper_run
from .errors import BadInput, UnknownName
from .paper_claims import CLAIMS, PRESETS, Claim, Preset, named
from .paper_judge import Judgement

RESULTS = Path("runs") / "paper"


@dataclass(frozen=True)
class Judged:
    """A row with its judgement, where there is one, and the preset that it is of."""

    claim: Claim
    preset: Preset
    place: Path  # of the results of the preset
    judgement: Judgement | None
    told: Mapping[str, str] = field(default_factory=dict)  # name of a figure -> what it shows

    @property
    def verdict(self) -> str:
        """The verdict, or that there is none."""
        return "not run" if self.judgement is None else self.judgement.verdict

    @property
    def commands(self) -> list[str]:
        """The commands that make the result, as one types them."""
        return [" ".join(step.line(self.place)) for step in self.claim.steps[self.preset]]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        c = self.claim
        return {
            "number": c.number, "name": c.name, "claim": c.says, "paper": c.paper,
            "source": c.source, "preset": self.preset, "commands": self.commands,
            "run": f"llm-narrow paper run {c.name}", "verdict": self.verdict,
            "judgement": self.judgement and self.judgement.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """All rows, judged."""

    rows: tuple[Judged, ...]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def shown(self) -> RenderableType:
        """What the command line prints."""
        table = Table(box=box.SIMPLE, title="On the creation of narrow AI, claim by claim")
        for column in ("", "name", "claim", "in the paper", "here"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            c, run = row.claim, f"llm-narrow paper run {row.claim.name}"
            preset = "" if row.judgement is None else f" ({row.preset})"
            table.add_row(str(c.number), c.name, c.says, c.paper, f"{row.verdict}{preset}\n{run}")
        return table


def judged(
    results: Path | str = RESULTS, names: Sequence[str] = (), *, preset: str | None = None
) -> Paper:
    """The rows (all unless named) with the verdicts of the results that are there.

    Raises UnknownName for a row or preset, BadInput for results that cannot be read.
    """
    place = Path(results)
    presets = PRESETS[::-1] if preset is None else (preset_of(preset),)
    rows = []
    for claim in asked(names):
        for one in presets:
            try:
                held = claim.read(place / one)
                found = None if held is None else claim.judge(held)
            except (KeyError, TypeError, IndexError, StopIteration) as error:
                raise BadInput(
                    f"The results of {claim.number} {claim.name} in {place / one} are not what "
                    f"this version writes ({type(error).__name__}: {error}). Run it again with "
                    "--force."
                ) from error
            if found is not None or one == presets[-1]:
                drawn = () if held is None else held.get("figures", ())
                told = {f["name"]: f"{f['caption']} {f['alt']}" for f in drawn}
                rows.append(Judged(claim, one, place / one, found, told))
                break
    return Paper(tuple(rows))


def run(
    names: Sequence[str], *, results: Path | str = RESULTS, preset: str = "quick",
    force: bool = False, console: Console | None = None,
) -> Paper:  # fmt: skip
    """Run rows, all unless named, and judge them; what is finished is not repeated.

    Raises UnknownName, BadInput where the examples are not there, and NarrowError where a command
    fails.
    """
    which = preset_of(preset)
    paper_run.run(
        asked(names), results=Path(results), preset=which, force=force,
        console=console or Console(quiet=True),
    )  # fmt: skip
    return judged(results, names, preset=which)


def asked(names: Sequence[str]) -> list[Claim]:
    """The rows of the names or numbers in their order; all for none."""
    if not names:
        return list(CLAIMS)
    wanted = {named(name).number for name in names}
    return [claim for claim in CLAIMS if claim.number in wanted]


def preset_of(name: str) -> Preset:
    """The preset of a name. Raises UnknownName."""
    for preset in PRESETS:
        if preset == name:
            return preset
    raise UnknownName("preset", name, PRESETS)
