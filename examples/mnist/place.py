"""Where a run keeps what it has done: settings, finished cells, states of training, results.

    OUT/results.json   experiments that are finished, written whole after each
    OUT/figures/       their figures
    OUT/work/          finished cells, teachers, and states that a stopped training goes on from

All of it belongs to one setting and one set of digits: another preset needs another folder.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from digits import Digits
from presets import Preset

from llm_narrow import state as states
from llm_narrow.cache import made
from llm_narrow.errors import BadInput
from llm_narrow.progress import Track

FORMAT = 1


@dataclass(frozen=True)
class Place:
    """One run: its settings, its digits, its folder, and what it computes on."""

    preset: Preset
    name: str  # of the preset
    digits: Digits
    out: Path
    device: torch.device
    track: Track
    save_every: float  # seconds

    def begin(self) -> None:
        """Make the folder. Raises BadInput where it is of other settings, or of something else."""
        file = made(self.out) / "results.json"
        held = {path.name for path in self.out.iterdir()}
        if held and not file.exists() and not held <= {"work", "figures"}:
            raise BadInput(f"{self.out} holds {sorted(held)[0]} and no results.json. "
                           "Give --out a folder of its own.")  # fmt: skip
        results = self.results()
        if results["settings"] != self.settings():
            raise BadInput(
                f"{self.out} is of preset {results['preset']}, of other settings than "
                f"{self.name} has now. Choose another --out, or remove it to start anew."
            )
        if results["digits"]["sha256"] != self.digits.sha256:
            raise BadInput(
                f"{self.out} is of the digits of {results['digits']['source']}, which differ from "
                f"those of {self.digits.source}. Choose another --out, or give the same --data."
            )
        write(file, results)

    def settings(self) -> dict[str, Any]:
        """All that the outcomes follow from, as JSON has it."""
        return dict(json.loads(json.dumps(plain(asdict(self.preset)))))

    def results(self) -> dict[str, Any]:
        """What is finished. Raises BadInput where the file cannot be read."""
        file = self.out / "results.json"
        if not file.exists():
            return {"format": FORMAT, "preset": self.name, "settings": self.settings(),
                    "digits": self.digits.about(), "experiments": {}}  # fmt: skip
        try:
            found: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']}, not {FORMAT}")
            if lost := {"preset", "settings", "digits", "experiments"} - found.keys():
                raise ValueError(f"it has no {sorted(lost)[0]}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{file} cannot be used: {error}. Remove it to have it written anew from work/."
            ) from None
        return found

    def finish(self, experiment: str, found: Mapping[str, Any]) -> None:
        """Write a finished experiment beside the others."""
        results = self.results()
        results["experiments"][experiment] = dict(found)
        write(self.out / "results.json", results)

    def state(self, name: str) -> Path:
        """The folder of the states of one training."""
        return self.out / "work" / name

    def cell(self, name: str, make: Callable[[], Any], state: Path | None = None) -> Any:
        """A finished cell as it was kept, else made now and kept; then `state` is not needed."""
        file = self.out / "work" / f"{name}.json"
        if not file.exists():
            write(file, make())
        if state is not None:
            states.clear(state)
        return json.loads(file.read_text("utf-8"))


def write(file: Path, found: Any) -> None:
    """Write JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    with fresh.open("w", encoding="utf-8") as out:
        json.dump(plain(found), out, ensure_ascii=False, allow_nan=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(file)


def plain(found: Any) -> Any:
    """Numbers that are none as null, floats at six digits: what a reader of results needs."""
    if isinstance(found, Mapping):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    if isinstance(found, float):
        return float(f"{found:.6g}") if math.isfinite(found) else None
    return found
