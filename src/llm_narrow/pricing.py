"""The command `prices`: what everything in a model costs to remove, before anything is cut."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType

from . import __version__, beside, inputs, processes, scoring
from . import recipe as recipes
from .beside import BESIDE, Beside, Option
from .blocks import Blocks
from .budget import PRICED
from .cache import cache_dir
from .cost import size
from .errors import BadInput, UnknownName
from .inputs import Inputs, begin
from .manifest import Clock
from .plan import Plan
from .prices import Prices, price
from .progress import Track, silent
from .purchases import Spent
from .recipe import Recipe
from .spend import spend
from .trials import Log, Measured, Text, Trials

if TYPE_CHECKING:
    from .figure_style import Drawn

BLOCKS = 6  # that each removal is measured on
WIDE = 10  # times as many, that what goes beside units is measured on
FIT_TOKENS = 16384  # that it is refitted on
BESIDE_LOG = "beside"  # in a log, where the name of a decision stands else


@dataclass(frozen=True)
class Ground:
    """What removals are tried on: the blocks, and the losses that are known already.

    `wide` are the blocks that what goes beside units is measured on.
    """

    text: Text
    log: Log
    bytes_per_token: float
    wide: Blocks

    def trials(self, model: Any) -> Any:
        """What `spend` takes: the trials of a decision on the model, which stays whole."""
        return lambda decision: Trials(model, decision, self.text, self.log)

    def known(self, name: str) -> float | None:
        """What was measured before beside decisions about units."""
        found = self.log.known.get((BESIDE_LOG, name))
        return None if found is None else found.loss

    def add(self, name: str, value: float) -> None:
        """Keep it."""
        self.log.add(BESIDE_LOG, name, Measured(value))


@dataclass(frozen=True)
class Priced:
    """The price list of a model, and what each of the sizes asked for buys from it."""

    name: str
    domain: str
    prices: Prices
    beside: tuple[Option, ...]
    refused: Mapping[str, str]  # what of that cannot go, with why
    sizes: tuple[tuple[str, Spent], ...]
    seconds: Mapping[str, float]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "model": self.name,
            "domain": self.domain,
            "seconds": self.seconds,
            **self.prices.facts(),
            "beside": [option.facts() for option in self.beside],
            "refused": dict(self.refused),
            "sizes": {size: spent.facts() for size, spent in self.sizes},
        }

    def shown(self) -> RenderableType:
        """What the command line prints."""
        from .show_prices import shown

        return shown(self)

    def drawn(self) -> "Drawn":
        """The figure."""
        from .figure_prices import figure

        return figure(self.prices)


def prices(
    recipe: Recipe | Path | str | None = None,
    *,
    kinds: str | Sequence[str] | None = None,
    blocks: int = BLOCKS,
    fit_tokens: int = FIT_TOKENS,
    curves: int = 4,
    sizes: str | Sequence[str] = (),
    console: Console | None = None,
    **given: object,
) -> Priced:
    """Price every large unit by really removing it, and neurons on curves from a few removals.

    Losses are measured on `blocks` blocks of the calibration part, readers refitted on other ones.
    What was measured before is taken from the cache, so that the same call goes on after a stop.
    `sizes`, as target_params, are bought from the list in seconds, without measuring again.
    """
    recipe, console, track = begin(recipe, given, console)
    if processes.count() > 1:
        raise BadInput("`prices` runs in one process. Start it without torchrun.")
    of_units, others = _sorted(_split(kinds))
    clock = Clock()
    with clock.stage("load"):
        start = inputs.gather(recipe, track=track)
        start = replace(start, groups=start.all_groups)
        ground = ground_of(start, recipe, blocks=blocks, fit_tokens=fit_tokens, track=track)
        calibration = inputs.calibration(start, recipe, track=track)
    with clock.stage("score"):
        scored = scoring.made(start, recipe, calibration, track=track)
    with clock.stage("price"):
        found = listed(
            start, ground, scored.scores, kinds=of_units, curves=curves, track=track
        )
        options, refused = beside.options(
            start, recipe, ground, calibration, kinds=others, track=track
        )
    asked = _split(sizes) or ()
    whole = size(start.loaded.model).parameters
    with clock.stage("spend"):
        bought = (
            spend(found, [{"parameters": recipes.target(s, whole)} for s in asked]) if asked else []
        )
    return Priced(
        recipe.model.name, recipe.domain.name, found, options, refused,
        tuple(zip(asked, bought, strict=True)), dict(clock.seconds),
    )  # fmt: skip


def listed(
    start: Inputs,
    ground: Ground,
    scores: Mapping[str, torch.Tensor],
    *,
    kinds: Sequence[str] | None = None,
    curves: int = 4,
    track: Track = silent,
) -> Prices:
    """The price list of the model that a run starts from; `scores` are those of all its groups."""
    return price(
        start.loaded.model, ground.text, dict(scores), kinds=kinds, log=ground.log, curves=curves,
        bytes_per_token=ground.bytes_per_token, track=track,
    )  # fmt: skip


def ground_of(
    start: Inputs,
    recipe: Recipe,
    *,
    blocks: int = BLOCKS,
    fit_tokens: int = FIT_TOKENS,
    track: Track = silent,
) -> Ground:
    """The blocks to measure and to refit on, from the calibration part, and their log."""
    if blocks < 1 or fit_tokens < 1:
        raise BadInput(f"blocks and fit_tokens must be at least 1, got {blocks} and {fit_tokens}.")
    length = recipe.blocks.length
    every = inputs.blocks_of(start.loaded, start.domain, "calibration", recipe, track=track)
    taken = every.take(blocks * length + fit_tokens, seed=recipe.seed)
    measured = taken.only(torch.arange(blocks))
    fitted = taken.only(torch.arange(blocks, len(taken.tokens)))
    most = min(len(every.tokens), len(taken.tokens) + WIDE * blocks) * length
    wide = every.take(most, seed=recipe.seed)
    # Others than were refitted on, where there are any.
    rest = torch.arange(len(taken.tokens), len(wide.tokens))
    wide = wide.only(torch.cat([torch.arange(blocks), rest])[: WIDE * blocks])
    batch = recipe.blocks.batch_size
    text = Text(
        measured=measured.batches(batch), fitted=fitted.batches(batch),
        damping=recipe.prune.damping, dtype=torch.bfloat16 if start.bf16 else None,
    )  # fmt: skip
    log = Log.open(_log_path(start, recipe, measured, fitted))
    return Ground(text, log, _bytes(measured), wide)


def plan_of(start: Inputs, spent: Spent) -> Plan:
    """The decision of a budget as the plan that is shown before anything is cut."""
    entry = next(start.loaded.model.parameters()).element_size()
    before, after = size(start.loaded.model).parameters, round(spent.left.parameters)
    groups = start.all_groups
    keep = {g.name: spent.decision.keep[g.name] for g in groups}
    layers = spent.decision.layers
    return Plan(groups, keep, before, after, before * entry, after * entry, layers)


def _log_path(start: Inputs, recipe: Recipe, measured: Blocks, fitted: Blocks) -> Path:
    """Losses in one file were measured alike."""
    about = {
        "llm_narrow": __version__, "model": start.loaded.sha256, "dtype": recipe.dtype,
        "bf16": start.bf16, "measured": measured.sha256, "fitted": fitted.sha256,
        "batch": recipe.blocks.batch_size, "damping": recipe.prune.damping,
        **({"thinned": start.thinned} if start.thinned else {}),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "prices" / f"{name}.jsonl"


def _bytes(blocks: Blocks) -> float:
    return float(blocks.sizes[:, 1:].sum()) / blocks.sizes[:, 1:].numel()


def _sorted(
    kinds: Sequence[str] | None,
) -> tuple[Sequence[str] | None, tuple[Beside, ...]]:
    """Kinds of units and parts of layers, None for all; and those beside them.

    Raises UnknownName for what is neither.
    """
    if kinds is None:
        return None, BESIDE
    known = (*PRICED, *BESIDE)
    for kind in kinds:
        if kind not in known:
            raise UnknownName("kind", kind, known)
    return [k for k in kinds if k not in BESIDE], tuple(k for k in BESIDE if k in kinds)


def _split(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(names, str):
        return tuple(name.strip() for name in names.split(",") if name.strip())
    return None if names is None else tuple(names)
