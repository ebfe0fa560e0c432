"""What made a run: the manifest, with versions, hashes, the plan and the seconds of each stage."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

from .domains import Domain

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


def domain_facts(domain: Domain, tokens: dict[str, int]) -> dict[str, object]:
    """What is to be known of a domain to have it again; `tokens` are those used of each part."""
    return {
        "name": domain.name,
        "sha256": dict(domain.sha256),
        "dropped": dict(domain.dropped),
        "tokens": tokens,
    }
