"""Contrastive narrowing: what is left does well on the domain, and not on others.

The refit has what reads the units give nothing on the others' text (`refit.Against`). With a
weight, units are also scored by what the domain needs less what the others use: with scores in the
same unit for every domain (what a unit's loss costs, in the criterion's own measure and per token),
score = own - weight x the mean over the domains to forget. Units that these use and the domain
does not go first then, in one shot as in the lasso, whose order follows the scores. What was
forgotten is measured beside what was kept.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import benchmark, domains, inputs, measure, scores, scoring
from .blocks import Blocks
from .cache import cache_dir
from .domains import Part
from .errors import BadInput
from .inputs import Inputs
from .measure import DocumentSums
from .progress import Track
from .recipe import Recipe
from .refit import Against
from .scoring import Scored
from .trimming import Trimmed
from .units import Scores


@dataclass(frozen=True)
class Forgotten:
    """A domain to forget: its held-out blocks, and what the model made of them before."""

    name: str
    blocks: Blocks
    before: DocumentSums


def contrasted(start: Inputs, recipe: Recipe, own: Scored, *, track: Track) -> Scored:
    """The scores of a run with domains to forget; `own` are those of its own domain.

    Without a weight these are they, and the others' text is not scored.
    One pass for each of them over as many tokens of its calibration part, or all that there are:
    scores are per token, so fewer are only noisier. Raises BadInput for a
    criterion that does not depend on text, and for domains that cannot be read.
    """
    if recipe.score.forget_weight and recipe.score.criterion in scores.WITHOUT_DATA:
        raise BadInput(
            f"--forget-weight needs scores that depend on the text, and {recipe.score.criterion} "
            "ones do not. Choose another --criterion, or weight 0."
        )
    places = {name: _at(start, recipe, name, track) for name in recipe.score.forget or ()}
    if not recipe.score.forget_weight:
        return own
    others: dict[str, Scored] = {}
    for name, there in places.items():
        blocks = _most(there, recipe, "calibration", recipe.score.tokens, track)
        others[name] = scoring.made(there, recipe, blocks, track=track)
    about = {
        **own.made_by,
        "seconds": str(sum(float(s.made_by["seconds"]) for s in (own, *others.values()))),
        "forget": json.dumps({name: s.made_by["domain"] for name, s in others.items()}),
        "forget_weight": str(recipe.score.forget_weight),
    }
    many = list(others.values())
    found = _less(own, many, recipe.score.forget_weight)
    halves = None
    if own.halves is not None and all(s.halves is not None for s in many):
        first, second = (
            _less(
                replace(own, scores=own.halves[n]),
                [replace(s, scores=s.halves[n]) for s in many if s.halves is not None],
                recipe.score.forget_weight,
            )
            for n in (0, 1)
        )
        halves = (first, second)
    held = dict(found)
    if halves:
        for prefix, half in zip(scoring.HALVES, halves, strict=True):
            held |= {prefix + name: values for name, values in half.items()}
    key = hashlib.sha256(json.dumps([about, sorted(found)], sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "scores" / f"{key[:16]}.safetensors"
    scores.write(path, held, about)
    reused = own.reused and all(s.reused for s in many)
    return Scored(found, halves, path, reused, about)


def against(start: Inputs, recipe: Recipe, *, track: Track) -> Against | None:
    """The text that the refit is to forget, as much of each domain as is refitted on."""
    if not recipe.forgetting:
        return None
    batches: list[Tensor] = []
    for name in recipe.score.forget or ():
        there = _at(start, recipe, name, track)
        blocks = _most(there, recipe, "calibration", recipe.tokens_to_refit, track)
        batches += blocks.batches(recipe.blocks.batch_size)
    return Against(batches, recipe.forgetting)


def measured(start: Inputs, recipe: Recipe, *, track: Track) -> tuple[Forgotten, ...]:
    """What the model makes of the held-out part of each domain to forget."""
    found = []
    for name in recipe.score.forget or ():
        there = _at(start, recipe, name, track)
        blocks = _most(there, recipe, "held_out", recipe.measure.held_out_tokens, track)
        sums = benchmark.known_sums(there.loaded, blocks, recipe, track)
        found.append(Forgotten(name, blocks, sums))
    return tuple(found)


def told(
    start: Inputs, recipe: Recipe, before: Sequence[Forgotten], kept: tuple[DocumentSums, ...],
    trimmed: Trimmed | None, *, track: Track,
) -> dict[str, Any]:  # fmt: skip
    """What the manifest says of each domain to forget; `kept` are the domain's own sums.

    Bits per byte before and after, their ratio, and the selectivity: how much more they have risen
    here than in the domain itself, as a quotient of differences. None where they have not risen
    there.
    """
    own = _risen(*kept)
    found: dict[str, Any] = {}
    for one in before:
        blocks = one.blocks if trimmed is None else trimmed.translated(one.blocks, start)
        after = benchmark.document_sums(start.loaded.model, blocks, recipe, track)
        same = after.documents.equal(one.before.documents)
        ratio = measure.bits_per_byte_ratio(one.before, after, seed=recipe.seed) if same else None
        was, now = _bits(one.before), _bits(after)
        found[one.name] = {
            "bits_per_byte_before": was, "bits_per_byte": now,
            "bits_per_byte_ratio": None if ratio is None else vars(ratio),
            "documents": len(after.documents), "bytes": int(after.bytes.sum()),
            "selectivity": (now - was) / own if own > 0 else None,
        }  # fmt: skip
    counts = {"weight": recipe.score.forget_weight, "refit": recipe.forgetting}
    return {**counts, "risen": own, "domains": found}


def _at(start: Inputs, recipe: Recipe, name: str, track: Track) -> Inputs:
    """The same with another domain."""
    if name == recipe.domain.name:
        raise BadInput(f"--forget names {name}, which is the domain to keep. Name another.")
    return replace(start, domain=domains.load(name, track=track))


def _most(start: Inputs, recipe: Recipe, part: Part, tokens: int, track: Track) -> Blocks:
    """So many tokens of a part, or all that it has."""
    blocks = inputs.blocks_of(start.loaded, start.domain, part, recipe, track=track)
    return blocks.take(min(tokens, blocks.tokens.numel()), seed=recipe.seed)


def _less(own: Scored, others: Sequence[Scored], weight: float) -> Scores:
    """Own scores less the weighted mean of the others', each per token of its own text."""
    tokens = float(own.made_by["tokens"])
    found = {name: values.clone() for name, values in own.scores.items()}
    for other in others:
        scale = weight / len(others) * tokens / float(other.made_by["tokens"])
        for name, values in found.items():
            values -= scale * other.scores[name]
    return found


def _bits(sums: DocumentSums) -> float:
    return float(sums.nats.sum() / sums.bytes.sum()) / math.log(2)


def _risen(before: DocumentSums, after: DocumentSums) -> float:
    return _bits(after) - _bits(before)
