"""Make a small, strong, narrow language model out of a big general one.

    narrow = llm_narrow.prune(model="smollm2-135m", domain="python", sparsity=0.5)

Names are imported when they are first used: torch is not loaded by `import llm_narrow` alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anatomy import Inspected, inspect
    from .benchmark import Bench, bench
    from .compare_runs import Compared, compare
    from .errors import BadInput, NarrowError, TargetOutOfReach, UnknownName, Unreachable
    from .models import Loaded, load
    from .plan import Plan
    from .recipe import Recipe
    from .recovery import recover, resume
    from .scoring import Scored
    from .stages import Pruned, prune, score

    __version__: str

__all__ = [
    "BadInput",
    "Bench",
    "Compared",
    "Inspected",
    "Loaded",
    "NarrowError",
    "Plan",
    "Pruned",
    "Recipe",
    "Scored",
    "TargetOutOfReach",
    "UnknownName",
    "Unreachable",
    "__version__",
    "bench",
    "compare",
    "inspect",
    "load",
    "prune",
    "recover",
    "resume",
    "score",
]

_HOMES = {
    "anatomy": ("Inspected", "inspect"),
    "benchmark": ("Bench", "bench"),
    "compare_runs": ("Compared", "compare"),
    "errors": ("BadInput", "NarrowError", "TargetOutOfReach", "UnknownName", "Unreachable"),
    "models": ("Loaded", "load"),
    "plan": ("Plan",),
    "recipe": ("Recipe",),
    "recovery": ("recover", "resume"),
    "scoring": ("Scored",),
    "stages": ("Pruned", "prune", "score"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("llm-narrow")
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
