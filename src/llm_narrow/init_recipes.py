"""The recipes that come with it: where they are, and what the head of each says."""

from dataclasses import dataclass
from pathlib import Path

from .errors import BadInput, UnknownName

SCHEMA = "recipe.schema.json"
EDITOR = "# yaml-language-server: $schema="  # the first line of a recipe, for editors
NEEDS = "Needs: "
COMMAND = "#   llm-narrow "


@dataclass(frozen=True)
class Shipped:
    """A recipe that comes with it. `what` it is for, `needs` and `commands` are of its head."""

    name: str
    file: Path
    what: str
    needs: str
    commands: tuple[str, ...]

    @property
    def text(self) -> str:
        """The file as it is."""
        return self.file.read_text(encoding="utf-8")


def folder() -> Path:
    """The recipes and their schema: in the package, or, of the sources, at their top."""
    here = Path(__file__).resolve()
    places = (here.parent / "recipes", here.parents[2] / "recipes")
    for place in places:
        if (place / SCHEMA).is_file():
            return place
    raise BadInput(
        f"The recipes are missing from the installation: {places[0]} is not there. Install "
        "llm-narrow anew."
    )


def shipped() -> list[Shipped]:
    """All of them, by name."""
    return [read(file) for file in sorted(folder().glob("*.yaml"))]


def named(name: str) -> Shipped:
    """One of them. Raises UnknownName."""
    for found in shipped():
        if found.name == name.removesuffix(".yaml"):
            return found
    raise UnknownName("Template", name, [found.name for found in shipped()])


def read(file: Path) -> Shipped:
    """What the comments at the top of a recipe say."""
    head = [line for line in head_of(file.read_text(encoding="utf-8")) if EDITOR not in line]
    commands = tuple(line.lstrip("# ") for line in head if line.startswith(COMMAND))
    first = next((n for n, line in enumerate(head) if line.startswith(COMMAND)), len(head))
    told = " ".join(line.lstrip("# ") for line in head[:first])
    what, _, needs = told.partition(NEEDS)
    return Shipped(file.stem, file, what.strip(), needs.strip(), commands)


def head_of(text: str) -> list[str]:
    """The lines of comment that a recipe begins with."""
    lines = text.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]
