"""The scores of a run: from the file given, else from the cache, else made now and cached.

A score file holds, beside the scores of all blocks, those of its two halves, by which the
stability of a choice is told for any sparsity.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from . import __version__, processes, scores
from .blocks import Blocks
from .cache import cache_dir, file_sha256
from .claims import claimed
from .errors import BadInput, problems
from .inputs import Inputs
from .precision import copied
from .progress import Track, silent
from .recipe import Recipe
from .units import Group, Scores

HALVES = ("first half: ", "second half: ")


@dataclass(frozen=True)
class Scored:
    """Scores of all groups, those of both halves (if known), and where and of what they are."""

    scores: Scores
    halves: tuple[Scores, Scores] | None
    path: Path
    reused: bool
    made_by: Mapping[str, str]

    def facts(self) -> dict[str, Any]:
        """What the manifest and `score --json` tell."""
        return {
            "criterion": self.made_by["criterion"],
            "tokens": int(self.made_by["tokens"]),
            "sha256": file_sha256(self.path),
            "seconds": float(self.made_by["seconds"]),
            "reused": self.reused,
        }


def made_by(inputs: Inputs, recipe: Recipe, blocks: Blocks) -> dict[str, str]:
    """What a score file was made of, as text; equal ones have equal scores."""
    return {
        "llm_narrow": __version__,
        "model": inputs.loaded.sha256,
        "dtype": recipe.dtype,
        "bf16": "parameters" if inputs.bf16 else "none",  # buffers keep their precision
        "domain": inputs.domain.sha256["calibration"],
        "blocks": blocks.sha256,
        "criterion": recipe.score.criterion,
        "tokens": str(blocks.tokens.numel()),
        "seed": str(recipe.seed),
        **({"thinned": inputs.thinned} if inputs.thinned else {}),
    }


def given(path: Path, inputs: Inputs, recipe: Recipe) -> Scored:
    """The scores of a file. Raises BadInput if they are of another model, domain or criterion."""
    try:
        held, about = scores.read(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput(
            f"{path} cannot be read as a score file: {error}. `llm-narrow score` makes one."
        ) from None
    asked = {
        "model": inputs.loaded.sha256,
        "domain": inputs.domain.sha256["calibration"],
        "criterion": recipe.score.criterion,
        **({"thinned": inputs.thinned} if inputs.thinned or "thinned" in about else {}),
    }
    found = [
        f"{what} must be {_brief(value)}, which is asked for, got {_brief(about.get(what, 'none'))}"
        for what, value in asked.items()
        if about.get(what) != value
    ]
    found += [
        f"scores of {kind} are missing; score again with --kinds {kind}"
        for kind in sorted({g.kind for g in inputs.groups if g.name not in held})
    ]
    if found:
        raise problems(str(path), found)
    scored = _split(held, inputs.groups, path, True, about)
    _check_finite(scored.scores, inputs, recipe)
    return scored


def made(inputs: Inputs, recipe: Recipe, blocks: Blocks, *, track: Track = silent) -> Scored:
    """The scores of the recipe on the blocks, from the cache where they are there."""
    about = made_by(inputs, recipe, blocks)
    names = sorted(g.name for g in inputs.groups)
    key = hashlib.sha256(json.dumps([about, names]).encode()).hexdigest()
    path = cache_dir() / "scores" / f"{key[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs side by side wait for the one that makes them; the processes of one make them together.
    with nullcontext() if processes.count() > 1 else claimed(path.parent, path.stem, wait=True):
        return _made(inputs, recipe, blocks, about, path, track)


def _made(
    inputs: Inputs, recipe: Recipe, blocks: Blocks, about: dict[str, str], path: Path, track: Track
) -> Scored:
    cached = None
    with suppress(OSError, SafetensorError, KeyError, ValueError):
        held, found = scores.read(path)
        cached = _split(held, inputs.groups, path, True, found)
    # Scores are made by all processes together, whose caches may be of different nodes.
    if processes.agreed(cached is not None) and cached is not None:
        _check_finite(cached.scores, inputs, recipe)
        return cached
    started = time.perf_counter()
    held = _score(inputs, recipe, blocks, track)
    _check_finite(held, inputs, recipe)
    about["seconds"] = f"{time.perf_counter() - started:.1f}"
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        scores.write(fresh, held, about)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return _split(held, inputs.groups, path, False, about)


def _score(inputs: Inputs, recipe: Recipe, blocks: Blocks, track: Track) -> Scores:
    model = inputs.loaded.model
    if inputs.bf16:  # a copy, since autocast would cast the frozen weights anew for every batch
        model = copied(model, torch.bfloat16)

    size = recipe.blocks.batch_size
    first_half, second_half = (half.batches(size) for half in blocks.halves())
    held, first, second = scores.score_halves(
        model,
        inputs.groups,
        (first_half, second_half),
        criterion=recipe.score.criterion,
        seed=recipe.seed,
        track=track,
    )
    held = dict(held)
    for half, found in zip(HALVES, (first, second), strict=True):
        held |= {half + name: values for name, values in found.items()}
    return held


def _check_finite(held: Scores, inputs: Inputs, recipe: Recipe) -> None:
    """Refuse scores by which nothing can be chosen; those of a broken model sort in any order."""
    wrong = [name for name, values in held.items() if not values.isfinite().all()]
    if not wrong:
        return
    broken = [n for n, p in inputs.loaded.model.named_parameters() if not p.isfinite().all()]
    why = (
        f"{broken[0]} holds numbers that are not finite: the weights are damaged. Fetch or make "
        "them again."
        if broken
        else "The weights are finite, but passes are not: try --dtype float32 or another device."
    )
    raise BadInput(
        f"The scores of {inputs.loaded.name} by {recipe.score.criterion} are not finite in "
        f"{len(wrong)} of {len(held)} groups. {why}"
    )


def _split(
    held: Scores, groups: Iterable[Group], path: Path, reused: bool, about: Mapping[str, str]
) -> Scored:
    names = [g.name for g in groups]
    halves = None
    if all(half + name in held for half in HALVES for name in names):
        first, second = ({name: held[half + name] for name in names} for half in HALVES)
        halves = (first, second)
    return Scored({name: held[name] for name in names}, halves, path, reused, about)


def _brief(text: str) -> str:
    """A hash by its beginning, as people compare them."""
    return text[:12] if len(text) == 64 else text
