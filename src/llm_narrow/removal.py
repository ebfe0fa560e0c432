"""The stage of a run that removes what the plan says, and repairs what is left."""

from collections.abc import Mapping
from typing import Any

import torch

from . import contrast, joint, work
from .blocks import Blocks
from .inputs import Inputs
from .plan import Plan
from .progress import Track
from .recipe import Recipe
from .refit import RefitFacts, refit_and_remove
from .units import Group, Keep, remove
from .work import Work


def refitted(
    recipe: Recipe, start: Inputs, blocks: Blocks, plan: Plan, told: Mapping[str, Any],
    left: Work | None, track: Track,
) -> dict[str, Any]:  # fmt: skip
    """Repair what is left, and remove the rest; what is told of it. `told` is the manifest."""
    model = start.loaded.model
    if left and (held := left.part("refitted")):
        remove(model, plan.groups, plan.keep)
        work.fill(model, held[0])
        return held[1]
    facts: dict[str, Any] = {}
    if all(bool(keep.all()) for keep in plan.keep.values()):
        facts = {"mode": "not needed: no unit was removed"}
    elif told.get("lasso", {}).get("removed_by_score") == 0 and not recipe.forgetting:
        remove(model, plan.groups, plan.keep)
        facts = {"mode": "not needed: only units of zeros were removed"}
    elif recipe.prune.refit == "none":
        remove(model, plan.groups, plan.keep)
    else:
        fitted = refit_and_remove(
            model,
            plan.groups,
            plan.keep,
            blocks.batches(recipe.blocks.batch_size),
            damping=recipe.prune.damping,
            sequential=recipe.prune.refit == "sequential",
            dtype=torch.bfloat16 if start.bf16 else None,
            against=contrast.against(start, recipe, track=track),
            track=track,
        )
        facts = _told(recipe, fitted)
    if left:
        left.finish("refitted", work.weights(model), facts)
    return facts


def without_parts(
    recipe: Recipe, start: Inputs, blocks: Blocks, plan: Plan, left: Work | None, track: Track
) -> tuple[tuple[Group, ...], Keep, Any, dict[str, Any]]:
    """As `refitted`, where layers or halves of layers go too.

    Gives what `joint.carried_out` does, with what is told of the refit.
    """
    held = left.part("refitted") if left else None
    groups, keep, config, fitted = joint.carried_out(
        recipe, start, blocks, plan, track=track,
        refit=recipe.prune.refit != "none" and held is None,
    )  # fmt: skip
    if held:
        work.fill(start.loaded.model, held[0])
        return groups, keep, config, held[1]
    facts = _told(recipe, fitted) if fitted else {}
    if left:
        left.finish("refitted", work.weights(start.loaded.model), facts)
    return groups, keep, config, facts


def _told(recipe: Recipe, fitted: RefitFacts) -> dict[str, Any]:
    errors = list(fitted.errors.values()) or [0.0]
    return {
        "mode": recipe.prune.refit,
        "tokens": fitted.tokens,
        "damping": fitted.damping,
        **({"forget": recipe.forgetting} if recipe.forgetting else {}),
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
    }
