"""Finished run folders, as the pages of them are made: what each says of itself, and in words."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finished:
    """A run folder: its manifest, and its rows before and after."""

    name: str
    folder: Path
    told: Mapping[str, Any]
    before: Any
    after: Any

    @property
    def command(self) -> str:
        """The one that made it."""
        return one_line(self.told.get("command"))

    @property
    def commands(self) -> list[str]:
        """Those that made it: of a recovered run also the one before."""
        first = (self.told.get("made_from") or {}).get("command")
        return [*([one_line(first)] if first else []), self.command]

    @property
    def forgotten(self) -> list[str]:
        """The domains that it was to forget."""
        from llm_narrow.report import at

        return list(at(self.told, "recipe", "score", "forget") or ())

    @property
    def weight(self) -> float:
        """How much the others' use counted against a unit, in effect."""
        from llm_narrow.report import at

        return float(at(self.told, "recipe", "score", "forget_weight") or 0)

    @property
    def refit(self) -> float:
        """How much the refit unlearned them, in effect: 0 where it says nothing of it."""
        from llm_narrow.report import at

        return float(at(self.told, "refit", "forget") or 0)

    @property
    def method(self) -> str:
        """How units were chosen; a recovered run says what the one before was."""
        from llm_narrow.relearn_subjects import method_of

        return "lasso" if self.told.get("lasso") else method_of(self.told)

    @property
    def trained(self) -> int:
        """Tokens that it was trained on after the removal."""
        from llm_narrow.report import at

        return int(at(self.told, "recover", "tokens") or 0)

    @property
    def made(self) -> str:
        """How it was made, in words."""
        words = [self.method]
        if self.weight or self.refit:
            words.append(
                f"forgetting {', '.join(self.forgotten)} (weight {self.weight:g}, refit "
                f"{self.refit:g})"
            )
        words.append(f"{self.trained:,} tokens of training" if self.trained else "no training")
        return ", ".join(words)


def read(folder: Path, name: str | None = None) -> Finished:
    """What a run folder says. Raises BadInput where it is none, or not finished."""
    from llm_narrow import rows
    from llm_narrow.errors import BadInput
    from llm_narrow.relearn_subjects import manifests

    ((_, _, told),) = manifests([folder])
    labelled = {row.label: row for row in rows.read(folder / "rows.jsonl")[0]}
    if not {"before", "after"} <= labelled.keys():
        raise BadInput(f"{folder / 'rows.jsonl'} lacks the rows before and after. Run it again.")
    return Finished(name or folder.name, folder, told, labelled["before"], labelled["after"])


def one_line(command: Any) -> str:
    """A command of a manifest."""
    return " ".join(map(str, command)) if isinstance(command, list) else str(command)


def percent(text: str) -> float:
    """0.02 of `2%`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a percentage as 2%, got {text!r}")
    return float(found[1]) / 100
