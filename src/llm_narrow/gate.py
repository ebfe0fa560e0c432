"""Limits that a run has to keep: `gate`, for CI. Each is told with what was measured."""

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import certificate
from .certificate_form import Certificate
from .certificate_text import relearning_text, selectivity_text
from .cost import weight_bytes
from .errors import BadInput, problems
from .report import size, times

UNITS = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9,
         "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """A limit, what was measured, and whether it is kept; `told` is the measured value in words."""

    name: str
    limit: float
    measured: float | None  # None where only a bound is known, or there is no bound
    told: str
    passed: bool


@dataclass(frozen=True)
class Gate:
    """All limits of a run."""

    run: Path
    sha256: str
    limits: tuple[Limit, ...]

    @property
    def passed(self) -> bool:
        """Whether all are kept."""
        return all(limit.passed for limit in self.limits)

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        limits = [asdict(limit) for limit in self.limits]
        return {"run": str(self.run), "sha256": self.sha256, "passed": self.passed,
                "limits": limits}  # fmt: skip

    def shown(self) -> RenderableType:
        """What the command line prints."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(("limit", "asked for", "measured", "")):
            table.add_column(name, justify="right" if number in (1, 2) else "left", overflow="fold")
        for x in self.limits:
            state = Text("pass", style="green") if x.passed else Text("FAIL", style="bold red")
            table.add_row(Text(x.name), _asked(x), Text(x.told), state)
        missed = sum(not x.passed for x in self.limits)
        verdict = f"{missed} of {len(self.limits)} limits missed" if missed else "all limits kept"
        return Group(table, Text(f"{self.run}: {verdict}"))


def gate(
    run: Path | str,
    *,
    max_on_domain_loss: str | None = None,
    min_speedup: float | None = None,
    min_selectivity: float | None = None,
    min_relearning: float | None = None,
    max_size: str | None = None,
) -> Gate:
    """Hold a run against limits, by its certificate; without one, by its own rows.

    `max_on_domain_loss` is the greatest relative increase of bits per byte (`2%`); `min_speedup`
    holds for prefill and decoding both. Raises BadInput for limits that are none, and for those on
    something that was not measured, with the command that measures it.
    """
    folder = Path(run)
    allowed, largest = _percent(max_on_domain_loss), _bytes(max_size)
    lowest = {
        "--min-speedup": min_speedup, "--min-selectivity": min_selectivity,
        "--min-relearning": min_relearning,
    }  # fmt: skip
    wrong = [
        f"{flag} must be at least 0, got {value}"
        for flag, value in lowest.items()
        if value is not None and not value >= 0
    ]
    if wrong:
        raise BadInput(f"{wrong[0]}.") if len(wrong) == 1 else problems("the limits", wrong)
    if all(x is None for x in (allowed, largest, *lowest.values())):
        raise BadInput("Give at least one limit, e.g. --max-on-domain-loss 2%.")
    found = certificate.load(folder) or certificate.of(folder)
    _check_measured(found, lowest)
    limits: list[Limit] = []
    if allowed is not None:
        rise = found.on_domain.increase.value
        limits.append(Limit("max-on-domain-loss", allowed, rise, f"{rise:+.2%}", rise <= allowed))
    if min_speedup is not None:
        limits.append(_speed(found, min_speedup))
    if min_selectivity is not None:
        limits.append(_selectivity(found, min_selectivity))
    if min_relearning is not None:
        limits += _relearning(found, min_relearning)
    if largest is not None:
        own = weight_bytes(folder / "model")
        limits.append(Limit("max-size", largest, own, size(own), own <= largest))
    return Gate(folder, found.model.sha256, tuple(limits))


def _check_measured(found: Certificate, lowest: dict[str, float | None]) -> None:
    needed = {"--min-speedup": "speed", "--min-selectivity": "selectivity",
              "--min-relearning": "relearning"}  # fmt: skip
    lacking = [
        f"{flag}: {what} was not measured; this does: {found.not_measured[what]}"
        for flag, what in needed.items()
        if lowest[flag] is not None and what in found.not_measured
    ]
    if lacking:
        name = shlex.quote(found.model.name)
        raise BadInput(lacking[0]) if len(lacking) == 1 else problems(f"gate {name}", lacking)


def _speed(found: Certificate, wanted: float) -> Limit:
    assert found.speed is not None
    both = {"prefill": found.speed.prefill.value, "decode": found.speed.decode.value}
    slowest = min(both, key=lambda name: both[name])
    told = ", ".join(f"{name} {times(value)}" for name, value in both.items())
    return Limit("min-speedup", wanted, both[slowest], told, both[slowest] >= wanted)


def _selectivity(found: Certificate, wanted: float) -> Limit:
    s = found.selectivity
    assert s is not None
    passed = s.unbounded if s.value is None else s.value >= wanted
    return Limit("min-selectivity", wanted, s.value, selectivity_text(s), passed)


def _relearning(found: Certificate, wanted: float) -> list[Limit]:
    """One for each domain. A ratio that is only bounded passes where its lower bound does."""
    limits = []
    for r in found.relearning:
        passed = r.at_least is not None and r.at_least >= wanted
        told = f"{relearning_text(r)} ({r.domain})"
        limits.append(Limit("min-relearning", wanted, r.ratio, told, passed))
    return limits


def _asked(x: Limit) -> str:
    if x.name == "max-on-domain-loss":
        return f"at most {100 * x.limit:g} %"
    if x.name == "max-size":
        return f"at most {size(x.limit)}"
    return f"at least {x.limit:g}"


def _percent(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if found is None:
        raise BadInput(
            "--max-on-domain-loss must be a percentage of the whole model's bits per byte, as 2%, "
            f"got {text!r}."
        )
    return float(found[1]) / 100


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?i?B)?", text.strip())
    if found is None or (found[2] or "") not in UNITS:
        raise BadInput(f"--max-size must be a size such as 200MB or 1.5GiB, got {text!r}.")
    return float(found[1]) * UNITS[found[2] or ""]
