"""What tests of the command line share: small settings, what came out, and what a refusal is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = ["--length", "32", "--calibration-tokens", "512", "--held-out-tokens", "256"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Finished:
    folder: Path
    cache: Path
    told: dict[str, Any]
    err: str


def refused(done: Done, *texts: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout."""
    assert done.code == 2
    assert done.out == ""
    lines = done.err.strip().splitlines()
    for text in texts:
        assert text in lines[-1]
    assert "Traceback" not in done.err


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
