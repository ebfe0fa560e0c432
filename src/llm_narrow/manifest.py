"""What made a run: the manifest, with versions, hashes, the plan and the seconds of each stage."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from .domains import Domain
from .models import Loaded
from .recipe import Recipe

PACKAGES = ("llm-narrow", "torch", "transformers", "tokenizers", "safetensors", "datasets")


@dataclass
class Clock:
    """Seconds by stage, in the order in which they began."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + taken, 2)


def versions() -> dict[str, str]:
    """The versions that the result of a run depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def begun(
    command: str, recipe: Recipe, loaded: Loaded, parameters: int, domain: Domain,
    tokens: dict[str, int], clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    """What a manifest says from the start: what is run, on what, and the clock as it goes on.

    `parameters` are those of the model as it was loaded, `tokens` those used of each part of the
    domain; the hashes say which text it was.
    """
    return {
        "command": command,
        "versions": versions(),
        "seed": recipe.seed,
        "model": {"name": loaded.name, "sha256": loaded.sha256, "parameters": parameters},
        "domain": {
            "name": domain.name,
            "sha256": dict(domain.sha256),
            "dropped": dict(domain.dropped),
            "tokens": tokens,
        },
        "recipe": recipe.resolved(),
        "seconds": clock.seconds,
    }
