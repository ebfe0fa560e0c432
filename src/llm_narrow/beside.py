"""Prices of what goes beside units: tokens of the vocabulary, query heads, residual channels.

Each is offered at a few settings of `prune`, carried out on a copy of the whole model, and measured
on ten times as much text as everything else in the price list: there are few of them, and what
tokens that are gone cost hangs on the few places where they come up. Query heads are refitted, as
`prune` does it; channels are not. They go before a budget is spent on units, so they are chosen by
name; of the vocabulary alone a budget can buy its share (vocabulary_budget.py).
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from . import channels, measure, queries, scoring, trimming
from .blocks import Blocks
from .budget import Amounts, amounts
from .errors import BadInput
from .inputs import Inputs
from .progress import Track, silent
from .recipe import Recipe
from .vocabulary_rows import rows_of

if TYPE_CHECKING:
    from .pricing import Ground

Beside = Literal["vocabulary", "query_heads", "channels"]
BESIDE: tuple[Beside, ...] = get_args(Beside)
THRESHOLDS = (1, 2, 5, 10, 20)  # how often a token has to come up to stay
SHARES = (0.875, 0.75, 0.5)  # of the channels


@dataclass(frozen=True)
class Option:
    """A setting of `prune`, what it leaves, what it saves, and the rise of the loss.

    `increase` is in nats per token of the whole vocabulary.
    """

    kind: Beside
    setting: str
    left: int
    whole: int
    saves: Amounts
    increase: float
    threshold: int | None = None  # of the vocabulary

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "kind": self.kind, "setting": self.setting, "left": self.left, "of": self.whole,
            "increase": self.increase, "parameters": self.saves.parameters,
            "flops": self.saves.flops, "kv_bytes": self.saves.kv_bytes,
        }  # fmt: skip


def options(
    start: Inputs,
    recipe: Recipe,
    ground: "Ground",
    calibration: Blocks,
    *,
    kinds: Sequence[Beside] = BESIDE,
    track: Track = silent,
) -> tuple[tuple[Option, ...], dict[str, str]]:
    """What each setting costs, and of kinds that cannot go, why.

    What the log of `ground` knows is not measured again.
    """
    found: list[Option] = []
    refused: dict[str, str] = {}
    make = {"vocabulary": _vocabulary, "query_heads": _query_heads, "channels": _channels}
    for kind in kinds:
        try:
            for one in make[kind](start, recipe, ground, calibration, track):
                found.append(one)  # one by one: what was found before a refusal stays
        except BadInput as error:
            refused[kind] = str(error)
    return tuple(found), refused


def check(refused: Mapping[str, str]) -> None:
    """Raise BadInput with why the first of the kinds that `options` refused cannot go."""
    for why in refused.values():
        raise BadInput(why)


def _vocabulary(
    start: Inputs, recipe: Recipe, ground: "Ground", _: Blocks, track: Track
) -> Iterator[Option]:
    rows, seen = rows_of(start.loaded.model), set()
    for threshold in THRESHOLDS:
        setting = {"vocabulary": "domain", "vocabulary_threshold": threshold}
        asked = recipe.model_copy(update={"prune": recipe.prune.model_copy(update=setting)})
        loaded = replace(start.loaded, model=copy.deepcopy(start.loaded.model))
        # As many tokens as `prune` keeps, but chosen without the part that is measured here.
        wanted = int(trimming.chosen(start, asked, track=track).keep.sum())
        apart = trimming.chosen(start, asked, counted_in=("train",), rows=wanted, track=track)
        now, cut = trimming.trimmed(
            replace(start, loaded=loaded), asked, found=apart, track=track
        )  # fmt: skip
        left = rows_of(now.loaded.model)
        if left in seen or left == rows:
            continue
        seen.add(left)
        text = cut.translated(ground.wide, now)
        ids = hashlib.sha256(cut.new_ids.numpy().tobytes()).hexdigest()[:16]
        priced = _option(
            start, ground, "vocabulary", f"--kinds vocabulary --vocabulary-threshold {threshold}",
            (left, rows), now.loaded.model, text, f"vocabulary {left} {ids}",
        )  # fmt: skip
        yield replace(priced, threshold=threshold)


def _query_heads(
    start: Inputs, recipe: Recipe, ground: "Ground", calibration: Blocks, track: Track
) -> Iterator[Option]:
    model = start.loaded.model
    groups, each = queries.groups_of(model), queries.per_head(model.config)
    scored = scoring.made(replace(start, groups=tuple(groups)), recipe, calibration, track=track)
    for stay in range(each - 1, 0, -1):
        keep = queries.chosen(scored.scores, groups, stay, each)
        narrow, name = copy.deepcopy(model), f"query heads {stay} {scored.path.stem}"
        queries.thin(
            narrow, keep, () if ground.known(_on(ground, name)) is not None else ground.text.fitted,
            damping=ground.text.damping, dtype=ground.text.dtype, track=track,
        )  # fmt: skip
        yield _option(
            start, ground, "query_heads", f"--query-heads {stay}", (stay, each), narrow,
            ground.wide, name,
        )  # fmt: skip


def _channels(
    start: Inputs, recipe: Recipe, ground: "Ground", calibration: Blocks, track: Track
) -> Iterator[Option]:
    model = start.loaded.model
    group = channels.group_of(model)
    scored = scoring.made(replace(start, groups=(group,)), recipe, calibration, track=track)
    sizes = [channels.allowed(model, int(group.size * share)) for share in SHARES]
    for stay in dict.fromkeys(size for size in sizes if size):
        narrow = copy.deepcopy(model)
        channels.thin(narrow, channels.chosen(scored.scores[group.name], stay))
        yield _option(
            start, ground, "channels", f"--channels {stay}", (stay, group.size), narrow,
            ground.wide, f"channels {stay} {scored.path.stem}",
        )  # fmt: skip


def _option(
    start: Inputs, ground: "Ground", kind: Beside, setting: str, left: tuple[int, int],
    narrow: Any, blocks: Blocks, name: str,
) -> Option:  # fmt: skip
    """Measured: the rise of the loss per token that the text has in the whole vocabulary."""
    whole = _nats(start, ground, "whole", start.loaded.model, ground.wide)
    targets = ground.wide.tokens.numel() - len(ground.wide.tokens)
    increase = (_nats(start, ground, name, narrow, blocks) - whole) / targets
    saves = amounts(start.loaded.model) - amounts(narrow)
    return Option(kind, setting, *left, saves, increase)


def _nats(start: Inputs, ground: "Ground", name: str, model: Any, blocks: Blocks) -> float:
    """The summed loss, separators apart, measured or known."""
    found = ground.known(_on(ground, name))
    if found is None:
        with torch.no_grad():
            sums = measure.document_sums(
                model, blocks, batch_size=len(ground.text.measured[0]), bf16=start.bf16
            )
        found = float(sums.nats.sum())
        ground.add(_on(ground, name), found)
    return found


def _on(ground: "Ground", name: str) -> str:
    """What is measured under a name in a log: of what, and on which text."""
    return f"{name} on {len(ground.wide.tokens)} {ground.wide.sha256[:16]}"
