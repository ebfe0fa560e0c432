"""The vocabulary in a run: trimmed right after loading, so that all else works on what is left.

The teacher loses the same rows, which leaves its distribution over the tokens that stay. What was
measured before is measured with the whole vocabulary; what is measured after, on the same text in
the tokens of the trimmed one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import inputs, vocabulary, vocabulary_rows
from .blocks import Blocks
from .cost import positions, size
from .domains import Part
from .errors import BadInput, TargetOutOfReach
from .families import find_groups
from .inputs import Inputs
from .models import Loaded
from .progress import Track
from .recipe import Recipe
from .units import Group, Keep, count, keep_all

MULTIPLE = 64  # of the rows that stay, which runtimes like
PARTS: tuple[Part, ...] = ("train", "calibration")  # that tokens are counted in, never held-out


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


@dataclass(frozen=True)
class Chosen:
    """The tokens that stay, as a mask, of those that came up often enough in so many tokens."""

    keep: Tensor
    used: int
    counted: int


def chosen(
    start: Inputs, recipe: Recipe, *, counted_in: Sequence[Part] = PARTS, rows: int | None = None,
    track: Track,
) -> Chosen:  # fmt: skip
    """The tokens that the domain uses: those that came up often enough in the parts named.

    With `rows`, as many as that instead, the most frequent ones. Where the recipe asks for a number
    of parameters that this alone goes below, the most frequent of the others stay too, up to it.
    """
    loaded, p = start.loaded, recipe.prune
    model, old = loaded.model, loaded.tokenizer
    there = vocabulary_rows.rows_of(model)
    packed = [inputs.blocks_of(loaded, start.domain, c, recipe, track=track) for c in counted_in]
    counted = torch.stack([vocabulary.counts(blocks, old) for blocks in packed]).sum(0)
    threshold = 1
    if rows is None:
        assert p.vocabulary_threshold != "auto"  # it is settled by now
        threshold = p.vocabulary_threshold
    while True:
        used = vocabulary.used(counted, threshold)
        closed = vocabulary.closure(old, used, named=vocabulary_rows.named_ids(model))
        if rows is None or int(closed.sum()) <= rows or threshold >= int(counted.max()):
            break
        threshold += max(1, threshold // 4)
        threshold = min(threshold, int(counted.max()))
    whole, row = size(model).parameters, vocabulary_rows.parameters_of_a_row(model)
    least = rows or 0
    entry = next(model.parameters()).element_size()
    if rows is None and (target := p.parameters_wanted(whole, entry)) is not None:
        least = min(there, (target - (whole - row * there)) // row) // MULTIPLE * MULTIPLE
    keep = vocabulary.filled(old, closed, counted, multiple=MULTIPLE, least=least)
    return Chosen(keep, int(used.sum()), sum(blocks.tokens.numel() for blocks in packed))


def trimmed(
    start: Inputs, recipe: Recipe, *, found: Chosen | None = None, track: Track
) -> tuple[Inputs, Trimmed]:
    """Trim the vocabulary of the loaded model in place to what the domain uses.

    `found` are the tokens that stay, `chosen` ones unless given. Raises BadInput for a tokenizer
    or a model that cannot be trimmed and a domain without text.
    """
    loaded, p = start.loaded, recipe.prune
    model, old = loaded.model, loaded.tokenizer
    whole, rows = size(model).parameters, vocabulary_rows.rows_of(model)
    found = found or chosen(start, recipe, track=track)
    keep = found.keep
    # A model may have more rows than its tokenizer has ids.
    new, new_ids = vocabulary.trimmed(old, keep)
    old_ids = vocabulary_rows.new_rows(keep, multiple=MULTIPLE)
    vocabulary_rows.remove_rows(model, old_ids)
    left = size(model).parameters
    facts = {
        "threshold": p.vocabulary_threshold, "rows_before": rows, "rows": len(old_ids),
        "used": found.used, "parameters_before": whole, "parameters": left,
        "counted_tokens": found.counted,
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
