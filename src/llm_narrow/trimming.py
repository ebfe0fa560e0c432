"""The vocabulary in a run: trimmed right after loading, so that all else works on what is left.

The teacher loses the same rows, which leaves its distribution over the tokens that stay. What was
measured before is measured with the whole vocabulary; what is measured after, on the same text in
the tokens of the trimmed one.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from . import inputs, vocabulary, vocabulary_rows
from .blocks import Blocks
from .cost import positions, size
from .errors import BadInput, TargetOutOfReach
from .families import find_groups
from .inputs import Inputs
from .models import Loaded
from .progress import Track
from .recipe import Recipe
from .units import Group, Keep, count, keep_all

MULTIPLE = 64  # of the rows that stay, which runtimes like


@dataclass(frozen=True)
class Trimmed:
    """What was trimmed: the tokenizer of before, and old id -> new id, -1 where it is gone."""

    tokenizer: Any
    new_ids: Tensor
    facts: dict[str, Any]

    def translated(self, blocks: Blocks, start: Inputs) -> Blocks:
        """Blocks of the old tokens as those of the new ones, of the same bytes."""
        most = positions(start.loaded.model)
        return vocabulary_rows.translated(
            blocks, self.tokenizer, start.loaded.tokenizer, self.new_ids, longest=most
        )


def trimmed(start: Inputs, recipe: Recipe, *, track: Track) -> tuple[Inputs, Trimmed]:
    """Trim the vocabulary of the loaded model in place to what the domain's training part uses.

    Where the recipe asks for a number of parameters that this alone goes below, the most frequent
    of the other tokens stay too, up to it. Raises BadInput for a tokenizer or a model that cannot
    be trimmed and a domain without text.
    """
    loaded, p = start.loaded, recipe.prune
    model, old = loaded.model, loaded.tokenizer
    whole, rows = size(model).parameters, vocabulary_rows.rows_of(model)
    packed = inputs.blocks_of(loaded, start.domain, "train", recipe, track=track)
    counted = vocabulary.counts(packed, old)
    used = vocabulary.used(counted, p.vocabulary_threshold)
    closed = vocabulary.closure(old, used, named=vocabulary_rows.named_ids(model))
    row = vocabulary_rows.parameters_of_a_row(model)
    least = 0
    entry = next(model.parameters()).element_size()
    if (target := p.parameters_wanted(whole, entry)) is not None:
        least = min(rows, (target - (whole - row * rows)) // row) // MULTIPLE * MULTIPLE
    keep = vocabulary.filled(old, closed, counted, multiple=MULTIPLE, least=least)
    # A model may have more rows than its tokenizer has ids.
    new, new_ids = vocabulary.trimmed(old, keep)
    old_ids = vocabulary_rows.new_rows(keep, multiple=MULTIPLE)
    vocabulary_rows.remove_rows(model, old_ids)
    left = size(model).parameters
    facts = {
        "threshold": p.vocabulary_threshold, "rows_before": rows, "rows": len(old_ids),
        "used": int(used.sum()), "parameters_before": whole, "parameters": left,
        "train_tokens": packed.tokens.numel(),
    }  # fmt: skip
    every = tuple(find_groups(model))
    start = replace(
        start, loaded=replace(loaded, tokenizer=new), all_groups=every,
        groups=inputs.groups_of(every, recipe.prune.chosen_kinds),
        vocabulary=_composed(loaded, old_ids, rows),
    )  # fmt: skip
    return start, Trimmed(old, new_ids, facts)


def map_of(loaded: Loaded) -> tuple[Tensor, int] | None:
    """The map of a model whose vocabulary was trimmed before; None of any other."""
    path = loaded.folder / vocabulary_rows.MAP
    return vocabulary_rows.read_map(path) if path.is_file() else None


def write_map(start: Inputs, folder: Path) -> None:
    """Put the map beside the weights, if the vocabulary is a trimmed one."""
    found = start.vocabulary or map_of(start.loaded)
    if found is not None:
        vocabulary_rows.write_map(folder / vocabulary_rows.MAP, *found)


def fit(teacher: Any, start: Inputs) -> None:
    """Take from the teacher, in place, the rows that its student has lost.

    Nothing where both have the same number; a teacher of yet another vocabulary is refused when it
    is asked.
    """
    own = vocabulary_rows.rows_of(start.loaded.model)
    found = start.vocabulary or map_of(start.loaded)
    if found is not None and vocabulary_rows.rows_of(teacher) == found[1] != own:
        vocabulary_rows.remove_rows(teacher, found[0])


def held_out_as(first: Loaded, blocks: Blocks, other: Loaded) -> Blocks | None:
    """The blocks of the first model in the tokens of another, whose vocabulary is a part of its.

    None where it is not.
    """
    found = map_of(other)
    if found is None or found[1] != vocabulary_rows.rows_of(first.model):
        return None
    ids = vocabulary_rows.new_ids(*found)
    most = positions(other.model)
    return vocabulary_rows.translated(
        blocks, first.tokenizer, other.tokenizer, ids, longest=most
    )


def check_reached(model: Any, groups: tuple[Group, ...], target: int) -> Keep:
    """Keep all units, where nothing but the vocabulary may go.

    Raises TargetOutOfReach where that leaves more parameters than the target.
    """
    keep = keep_all(groups)
    left = count(dict(model.named_parameters()), groups, keep)
    if left > target:
        raise TargetOutOfReach(
            f"target_params {target:,} is below {left:,}, the least that removing unused tokens "
            "can reach. Ask for more parameters, raise --vocabulary-threshold, or allow more kinds."
        )
    return keep


def _composed(loaded: Loaded, old_ids: Tensor, rows: int) -> tuple[Tensor, int]:
    """The map in terms of the vocabulary that the model had before it was trimmed the first time.

    Raises BadInput where the map that the model brings is not its own.
    """
    earlier = map_of(loaded)
    if earlier is None:
        return old_ids, rows
    first, size_then = earlier
    if len(first) != rows:
        raise BadInput(
            f"{vocabulary_rows.MAP} of {loaded.name} has {len(first):,} rows, and the model "
            f"{rows:,}. Take the whole folder of one run."
        )
    return first[old_ids.clamp(min=0)].masked_fill(old_ids < 0, -1), size_then
