"""What goes from the whole model at once, before its units are looked at: query heads, channels.

Each is scored on the calibration text as units are, and counted: the recipe says how many stay.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import channels, inputs, queries, scoring, work
from .blocks import Blocks
from .cost import size
from .errors import BadInput
from .families import find_groups
from .inputs import Inputs
from .progress import Track
from .recipe import Recipe
from .units import Group, Keep, Scores
from .work import Work

KEPT = "kept: "  # before the names of masks that are stored beside weights


def query_heads(
    start: Inputs, recipe: Recipe, blocks: Blocks, left: Work | None, *, track: Track
) -> tuple[Inputs, dict[str, Any]]:
    """Leave as many query heads with each key/value head as the recipe says, and refit.

    Gives what is told of it too. Raises BadInput for a number that is not below what there is.
    """
    model, p = start.loaded.model, recipe.prune
    assert p.query_heads is not None
    stay, groups, each = p.query_heads, queries.groups_of(model), queries.per_head(model.config)
    if stay >= each:
        raise BadInput(
            f"prune.query_heads must be from 1 to {each - 1}, as each key/value head has {each} "
            f"query heads, got {stay}."
        )
    batches = blocks.batches(recipe.blocks.batch_size) if p.refit != "none" else []

    def carry_out(keep: Keep, again: bool) -> dict[str, Any]:
        fitted = queries.thin(
            model, keep, () if again else batches, damping=p.damping,
            sequential=p.refit == "sequential", dtype=torch.bfloat16 if start.bf16 else None,
            track=track,
        )  # fmt: skip
        errors = list(fitted.errors.values()) if fitted else []
        return {"before": each, "after": stay,
                "mean_error": sum(errors) / len(errors) if errors else None}  # fmt: skip

    return _thinned(
        start, recipe, blocks, left, "query heads", groups,
        lambda scores: queries.chosen(scores, groups, stay, each), carry_out, track,
    )  # fmt: skip


def residual_channels(
    start: Inputs, recipe: Recipe, blocks: Blocks, left: Work | None, *, track: Track
) -> tuple[Inputs, dict[str, Any]]:
    """Leave as many channels of the residual stream as the recipe says.

    Gives what is told of it too. Raises BadInput for a number that is not below what there is.
    """
    model, stay = start.loaded.model, recipe.prune.channels
    assert stay is not None
    group = channels.group_of(model)
    channels.check(model.config, stay)

    def carry_out(keep: Keep, again: bool) -> dict[str, Any]:
        channels.thin(model, keep[group.name])
        return {"before": group.size, "after": stay}

    return _thinned(
        start, recipe, blocks, left, "channels", [group],
        lambda scores: {group.name: channels.chosen(scores[group.name], stay)}, carry_out, track,
    )  # fmt: skip


def _thinned(
    start: Inputs, recipe: Recipe, blocks: Blocks, left: Work | None, name: str,
    groups: Sequence[Group], choose: Callable[[Scores], Keep],
    carry_out: Callable[[Keep, bool], dict[str, Any]], track: Track,
) -> tuple[Inputs, dict[str, Any]]:  # fmt: skip
    """Score and choose, or take up what was chosen; the model changes in place."""
    model = start.loaded.model
    before = size(model).parameters
    held = left.part(name) if left else None
    if held:
        keep = {g.name: held[0].pop(f"{KEPT}{g.name}") for g in groups}
        carry_out(keep, True)
        work.fill(model, held[0])
        facts = held[1]
    else:
        scored = scoring.made(replace(start, groups=tuple(groups)), recipe, blocks, track=track)
        keep = choose(scored.scores)
        facts = {
            **carry_out(keep, False), "parameters_before": before,
            "parameters": size(model).parameters,
            "kept": {name: stay.nonzero().flatten().tolist() for name, stay in keep.items()},
        }  # fmt: skip
        if left:
            masks = {f"{KEPT}{name}": stay for name, stay in keep.items()}
            left.finish(name, {**work.weights(model), **masks}, facts)
    told = hashlib.sha256(json.dumps(facts["kept"]).encode()).hexdigest()[:16]
    every = tuple(find_groups(model))
    return replace(
        start, all_groups=every, groups=inputs.groups_of(every, recipe.prune.chosen_kinds),
        thinned=f"{start.thinned} {recipe.prune.refit} {recipe.prune.damping} {told}".lstrip(),
    ), facts  # fmt: skip
