"""What goes wrong because of what the user gave us, as one tree.

    NarrowError             every error below; the command line prints it as one red line and
    │                       exits with code 2
    ├── UnknownName         a name that is not in a table of choices; suggests the nearest
    ├── BadInput            a value, file or folder that breaks a rule
    ├── Unreachable         a hub, package or file that cannot be fetched now
    └── TargetOutOfReach    a sparsity or size that no set of removals can meet

A message says the value, the rule and the way out. Several problems of one input are told at once.
"""

import difflib
from collections.abc import Iterable, Sequence


class NarrowError(Exception):
    """An error that the user can mend; its text is the whole explanation."""


class UnknownName(NarrowError):
    """A name that no table of choices holds."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        """Say that `what` called `name` is unknown, and list (and suggest from) `known`."""
        choices = sorted(known)
        near = difflib.get_close_matches(name, choices, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        listing = f" Known: {', '.join(choices)}." if choices else ""
        advice = f" {hint}" if hint else ""
        super().__init__(f"{what} {name!r} is unknown.{suggestion}{listing}{advice}")


class BadInput(NarrowError):
    """A value, file or folder that breaks a rule."""


class Unreachable(NarrowError):
    """Something that has to be fetched and cannot be fetched now."""


class TargetOutOfReach(NarrowError):
    """A sparsity or a size that cannot be met by removing units."""


def problems(source: str, found: Sequence[str]) -> BadInput:
    """All problems of one input in one error: `source: 2 problems`, then a line each."""
    plural = "problem" if len(found) == 1 else "problems"
    lines = [f"{source}: {len(found)} {plural}", *(f"  {line}" for line in found)]
    return BadInput("\n".join(lines))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, as a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".") + "."
