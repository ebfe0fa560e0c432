"""What a run begins from: the model without what goes before units are looked at, and scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from . import contrast, inputs, report, scoring, show, thinning, trimming, vocabulary_budget
from .blocks import Blocks
from .budget import Amounts, amounts
from .cost import size
from .inputs import Inputs
from .manifest import Clock
from .progress import Track
from .recipe import Recipe
from .scores import memory_estimate
from .scoring import Scored
from .trimming import Trimmed
from .work import Work


@dataclass(frozen=True)
class Begun:
    """What a run begins from: `start` is what the vocabulary and query heads are gone from.

    `parameters` are those of the model as it was loaded, `loaded` is all that it had, where a
    budget asks for it. There are no scores where no unit may go.
    """

    start: Inputs
    cut: Trimmed | None
    thin: Mapping[str, Mapping[str, Any]]  # what is told of query heads and channels that went
    blocks: Blocks
    scored: Scored | None
    parameters: int
    loaded: Amounts | None
    told: Mapping[str, Any] = field(default_factory=dict)  # more for the manifest


def begun(
    recipe: Recipe, file: Path | str | None, console: Console, track: Track, clock: Clock,
    left: Work | None,
) -> Begun:  # fmt: skip
    """Load, take out what goes before units are looked at, and score these.

    `file` is one of scores, `left` the unfinished run, whose query heads are not chosen again.
    """
    with clock.stage("load"):
        start = inputs.gather(recipe, track=track)
        model = start.loaded.model
        parameters = size(model).parameters
        loaded = amounts(model) if recipe.prune.allocation == "joint" else None
    cut, told = None, {}
    trims = recipe.prune.vocabulary == "domain"
    if recipe.prune.vocabulary_threshold == "auto":
        assert loaded is not None  # auto asks for a joint budget
        blocks = inputs.calibration(start, recipe, track=track)
        units = {}
        if start.groups:
            units = _scores(recipe, file, start, blocks, console, track, clock).scores
        with clock.stage("price the vocabulary"):
            found = vocabulary_budget.settled(
                recipe, start, units, loaded, console=console, track=track
            )
        trims, told = found.threshold is not None, {"vocabulary_priced": found.facts}
        recipe = recipe.with_threshold(found.threshold or 1)
        console.print(show.bought(found.threshold, found.facts))
    if trims:
        with clock.stage("trim the vocabulary"):
            start, cut = trimming.trimmed(start, recipe, track=track)
        console.print(show.vocabulary(cut.facts))
    with clock.stage("load"):
        blocks = inputs.calibration(start, recipe, track=track)
    thin: dict[str, Any] = {}
    if recipe.prune.query_heads is not None:
        with clock.stage("query heads"):
            start, thin["query_heads"] = thinning.query_heads(
                start, recipe, blocks, left, track=track
            )
        console.print(show.query_heads(thin["query_heads"]))
    if recipe.prune.channels is not None:
        with clock.stage("channels"):
            start, thin["channels"] = thinning.residual_channels(
                start, recipe, blocks, left, track=track
            )
        console.print(show.channels(thin["channels"]))
    scored = None
    if start.groups:
        scored = _scores(recipe, file, start, blocks, console, track, clock)
    return Begun(start, cut, thin, blocks, scored, parameters, loaded, told)


def _scores(
    recipe: Recipe, file: Path | str | None, start: Inputs, blocks: Blocks, console: Console,
    track: Track, clock: Clock,
) -> Scored:  # fmt: skip
    """The scores of what may go: those of the file, or made."""
    if file is not None:
        scored = scoring.given(Path(file), start, recipe)
        if recipe.score.forget and "forget" not in scored.made_by:
            scored = contrast.contrasted(start, recipe, scored, track=track)
        return scored
    peak = memory_estimate(
        start.loaded.model,
        start.groups,
        batch_size=recipe.blocks.batch_size,
        length=recipe.blocks.length,
        criterion=recipe.score.criterion,
    )
    console.print(
        f"Scoring {sum(g.size for g in start.groups):,} units by {recipe.score.criterion} on "
        f"{blocks.tokens.numel():,} tokens{' in bfloat16' if start.bf16 else ''}; "
        f"about {report.size(peak)} of memory at the peak."
    )
    with clock.stage("score"):
        scored = scoring.made(start, recipe, blocks, track=track)
        if recipe.score.forget:
            scored = contrast.contrasted(start, recipe, scored, track=track)
    if scored.reused:
        console.print(f"The scores were made before, in {scored.made_by['seconds']} s; used again.")
    return scored
