"""Models measured side by side on the same held-out text: `bench`, and before and after a cut."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__, inputs, measure, trimming
from .blocks import Blocks
from .cache import cache_dir
from .cost import positions, speed
from .errors import BadInput
from .inputs import begin
from .models import Loaded
from .progress import Track
from .recipe import Recipe
from .rows import Row

PROMPT, DECODED = 512, 32  # tokens of a timed turn


@dataclass(frozen=True)
class Bench:
    """What was measured of several models, one row each."""

    rows: tuple[Row, ...]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"rows": [row.to_dict() for row in self.rows]}


def bench(
    recipe: Recipe | Path | str | None = None,
    names: Sequence[str] = (),
    *,
    console: Console | None = None,
    **given: object,
) -> Bench:
    """Measure models by name on the same held-out text, all compared with the first."""
    if not names:
        raise BadInput("Give at least one model to measure.")
    if not isinstance(recipe, Recipe):
        given = {"model": names[0], **given}
    recipe, console, track = begin(recipe, given, console)
    domain = inputs.domain_of(recipe, track=track)
    loaded: dict[str, Loaded] = {}
    sums: list[measure.DocumentSums] = []
    first: Blocks | None = None
    for name in names:
        if name in loaded:
            raise BadInput(f"{name} is named twice; name each model once.")
        console.print(f"Measuring {name}")
        loaded[name] = inputs.model_of(recipe, name, track=track)
        blocks = None
        if first is not None:
            blocks = trimming.held_out_as(loaded[names[0]], first, loaded[name])
        if blocks is None:
            blocks = inputs.held_out(loaded[name], domain, recipe, track=track)
        first = blocks if first is None else first
        sums.append(document_sums(loaded[name].model, blocks, recipe, track))
    rows = [
        row(name, one, found, domain.name, recipe, first=sums[0] if found is not sums[0] else None)
        for (name, one), found in zip(loaded.items(), sums, strict=True)
    ]
    if recipe.measure.speed:
        rows = timed(rows, {name: one.model for name, one in loaded.items()}, recipe, track)
    return Bench(tuple(rows))


def document_sums(model: Any, blocks: Blocks, recipe: Recipe, track: Track) -> measure.DocumentSums:
    """What the model makes of the blocks, in the precision that the recipe runs it in."""
    return measure.document_sums(
        model,
        blocks,
        batch_size=recipe.blocks.batch_size,
        bf16=inputs.bf16(recipe),
        track=track,
    )


def known_sums(
    loaded: Loaded, blocks: Blocks, recipe: Recipe, track: Track
) -> measure.DocumentSums:
    """`document_sums` of a model as it was loaded, from the cache where they were made before.

    Every run from one model begins with the same figures, which take minutes on a CPU.
    """
    about = {
        "llm_narrow": __version__, "torch": version("torch"),
        "transformers": version("transformers"), "model": loaded.sha256, "blocks": blocks.sha256,
        "dtype": recipe.dtype, "bf16": str(inputs.bf16(recipe)),
        "device": str(next(loaded.model.parameters()).device.type),
        "batch": str(recipe.blocks.batch_size),
        # Equal tokens may be of other documents, or stand for other bytes.
        "documents": _digest(blocks.documents), "sizes": _digest(blocks.sizes),
        "config": hashlib.sha256(loaded.model.config.to_json_string().encode()).hexdigest(),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / "sums" / f"{name}.safetensors"
    with suppress(OSError, SafetensorError, TypeError):
        return measure.DocumentSums(**load_file(path))
    found = document_sums(loaded.model, blocks, recipe, track)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        save_file(dict(vars(found)), fresh, metadata=about)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return found


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def row(
    label: str,
    loaded: Loaded,
    sums: measure.DocumentSums,
    domain: str,
    recipe: Recipe,
    *,
    first: measure.DocumentSums | None = None,
) -> Row:
    """All that is measured of a model on the held-out part; `first` is what to compare with."""
    return measure.row(
        label,
        loaded.model,
        sums,
        name=loaded.name,
        sha256=loaded.sha256,
        domain=domain,
        part="held_out",
        first=first,
        folder=loaded.folder,
        prompt_tokens=_prompt_tokens([loaded.model]),
        seed=recipe.seed,
    )


def timed(
    rows: Sequence[Row], by_label: Mapping[str, Any], recipe: Recipe, track: Track
) -> list[Row]:
    """The rows with the speeds of the models of the same labels, timed side by side."""
    found = speed(
        by_label,
        prompt_tokens=_prompt_tokens(list(by_label.values())),
        new_tokens=DECODED,
        seed=recipe.seed,
        track=track,
    )
    return [replace(row, **vars(found[row.label])) for row in rows]


def _prompt_tokens(several: Sequence[Any]) -> int:
    """The length of a timed prompt: that which all the models have positions for."""
    most = [positions(model) for model in several]
    return min([PROMPT, *(max(1, n - DECODED) for n in most if n is not None)])
