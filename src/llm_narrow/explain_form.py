"""What an explanation says: of some units, what they are used for, and the text that shows it.

`explain.json` of a run folder has the form of `Explanation`, which docs/explain.md tells of.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import BadInput

FILE = "explain.json"


class Part(BaseModel):
    """Frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Attended(Part):
    """The token that a head looked at most, the block's first left out: how many tokens back it
    stood, and its share of the attention."""

    token: str
    back: int
    share: float


class Snippet(Part):
    """A place in the text: the token, what stands around it, and how much it uses the unit.

    `block` and `position` say where among the blocks that were read.
    """

    before: str
    token: str
    after: str
    use: float
    project: str
    path: str
    block: int
    position: int
    attended: Attended | None


class Often(Part):
    """A token, and how many of the strongest uses of a unit are at it."""

    token: str
    count: int


class Explained(Part):
    """One unit.

    `rank` is its place by score in its group, 1 the highest, of `size`. `use` is the mean over
    tokens, `share` its part in the use of its whole group, and `concentration` the part of its own
    use that falls on its strongest uses, `strongest` of them.
    """

    name: str
    group: str
    layer: int
    kind: Literal["neurons", "heads"]
    index: int
    kept: bool
    why: str
    score: float | None
    rank: int | None
    size: int
    use: float
    share: float
    concentration: float
    strongest: int
    often: tuple[Often, ...]
    snippets: tuple[Snippet, ...]


class Layer(Part):
    """One group: how many of its units went, and the share of its use that these had."""

    group: str
    layer: int
    units: int
    removed: int
    share: float


class Lot(Part):
    """One kind: as `Layer`, the share being the mean over the groups that lost units."""

    kind: Literal["neurons", "heads"]
    units: int
    removed: int
    share: float
    layers: tuple[Layer, ...]


class Explanation(Part):
    """Everything that `explain` found. `notes` are what its reader has to know, as sentences."""

    format: Literal["llm-narrow explanation"] = "llm-narrow explanation"
    version: Literal[1] = 1
    model: str
    sha256: str
    domain: str
    part: str
    blocks_sha256: str
    tokens: int
    documents: int
    chosen: str
    notes: tuple[str, ...]
    kinds: tuple[Lot, ...]
    units: tuple[Explained, ...]


def read(folder: Path) -> Explanation | None:
    """That of a run folder; None where it has none. Raises BadInput for a file of another form."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return Explanation.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(
            f"{file} is no explanation of this version ({first}). Make it again with "
            "`llm-narrow explain`."
        ) from None
