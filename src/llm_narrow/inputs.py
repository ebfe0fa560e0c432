"""What a run starts from: the recipe, the device, the model and its groups, blocks of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import domains, models, processes
from . import recipe as recipes
from .blocks import Blocks, pack
from .cost import positions
from .domains import Domain
from .errors import BadInput
from .families import find_groups, refused_kinds
from .models import Loaded
from .progress import Track, shown, silent
from .recipe import Recipe
from .scores import CRITERIA
from .units import Group, Kind


@dataclass(frozen=True)
class Inputs:
    """A loaded model, its groups (`groups` are those of the kinds that may go), and the domain."""

    loaded: Loaded
    all_groups: tuple[Group, ...]
    groups: tuple[Group, ...]
    domain: Domain
    device: torch.device
    bf16: bool  # whether forward passes run on a bfloat16 copy of the model
    # Where the vocabulary is trimmed: the old id of every row, and how many rows there were.
    vocabulary: tuple[Tensor, int] | None = None
    thinned: str = ""  # what tells apart models of which query heads went before all else


def begin(
    recipe: Recipe | Path | str | None, given: Mapping[str, object], console: Console | None
) -> tuple[Recipe, Console, Track]:
    """The recipe of a command, checked, from a recipe, its file, or settings by name."""
    if isinstance(recipe, Recipe):
        if given:
            raise TypeError(f"give a recipe or settings, not both: {', '.join(given)}")
        settled = recipe
    else:
        settled = recipes.load(recipe, given, criteria=CRITERIA)
    processes.join(settled.device)
    if console is None or not processes.first():
        console = Console(quiet=True)
    return settled, console, track_on(console)


def track_on(console: Console) -> Track:
    """How loops are shown on the console; not at all on a quiet one."""
    return silent if console.quiet else shown(console)


def gather(recipe: Recipe, *, track: Track = silent) -> Inputs:
    """Load what the recipe names.

    Raises BadInput where the model has no groups of the kinds asked for.
    """
    device = device_of(recipe.device)
    domains.check(recipe.domain.name, **_asked(recipe))  # before the model, which may take long
    loaded = model_of(recipe, recipe.model.name, track=track)
    every = tuple(find_groups(loaded.model))
    groups = groups_of(every, recipe.prune.chosen_kinds, refused_kinds(loaded.model))
    domain = domain_of(recipe, track=track)
    return Inputs(loaded, every, groups, domain, device, bf16(recipe))


def device_of(name: str) -> torch.device:
    """The device that the name stands for; `auto` is the fastest there is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        if cuda:  # each process has one of its own: see `processes.join`
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise BadInput(
            f"Device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices. "
            "Choose auto or cpu."
        )
    if device.type == "mps" and not mps:
        raise BadInput("Device 'mps' is not there: this is no Apple GPU. Choose auto or cpu.")
    return device


def bf16(recipe: Recipe) -> bool:
    """Whether forward passes should run in bfloat16 although the weights are float32."""
    return recipe.dtype == "float32" and fast_bf16(device_of(recipe.device))


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def model_of(recipe: Recipe, name: str, *, track: Track = silent) -> Loaded:
    """A model by name, in the precision and on the device of the recipe."""
    return models.load(
        name,
        dtype=getattr(torch, recipe.dtype),
        device=str(device_of(recipe.device)),
        revision=recipe.model.revision if name == recipe.model.name else None,
        trust_remote_code=recipe.model.trust_remote_code,
        track=track,
    )


def domain_of(recipe: Recipe, *, track: Track = silent) -> Domain:
    """The domain that the recipe names."""
    return domains.load(recipe.domain.name, **_asked(recipe), track=track)


def _asked(recipe: Recipe) -> dict[str, Any]:
    """The options of the domain, by name."""
    d = recipe.domain
    return {
        "glob": d.glob,
        "text_column": d.text_column,
        "project_column": d.project_column,
        "max_documents": d.max_documents,
    }


def groups_of(
    groups: Sequence[Group], kinds: Sequence[Kind], refused: Mapping[Kind, str] | None = None
) -> tuple[Group, ...]:
    """Those of a model's groups that are of the given kinds.

    Raises BadInput if a kind has none, with the reason where `refused` has it.
    """
    for kind in kinds:
        if not any(g.kind == kind for g in groups):
            there = ", ".join(sorted({g.kind for g in groups}))
            why = f": {(refused or {})[kind]}" if kind in (refused or {}) else ""
            raise BadInput(f"The model has no {kind} that could be removed{why}. It has: {there}.")
    return tuple(g for g in groups if g.kind in kinds)


def calibration(inputs: Inputs, recipe: Recipe, *, track: Track = silent) -> Blocks:
    """The blocks to score on."""
    blocks = blocks_of(inputs.loaded, inputs.domain, "calibration", recipe, track=track)
    return blocks.take(recipe.score.tokens, seed=recipe.seed)


def fitted(inputs: Inputs, recipe: Recipe, scored: Blocks, *, track: Track = silent) -> Blocks:
    """The blocks to refit on: those that were scored, or as many as the recipe names.

    These begin with the scored ones, or are the first of them.
    """
    if recipe.prune.refit_tokens is None:
        return scored
    blocks = blocks_of(inputs.loaded, inputs.domain, "calibration", recipe, track=track)
    return blocks.take(recipe.tokens_to_refit, seed=recipe.seed)


def held_out(loaded: Loaded, domain: Domain, recipe: Recipe, *, track: Track = silent) -> Blocks:
    """The blocks to measure on; the same documents for every tokenizer."""
    blocks = blocks_of(loaded, domain, "held_out", recipe, track=track)
    return blocks.take(recipe.measure.held_out_tokens, seed=recipe.seed)


def blocks_of(
    loaded: Loaded, domain: Domain, part: domains.Part, recipe: Recipe, *, track: Track = silent
) -> Blocks:
    """All blocks of a part. Raises BadInput if they are longer than the model can read."""
    length = recipe.blocks.length
    most = positions(loaded.model)
    if most is not None and length > most:
        raise BadInput(
            f"blocks.length must be at most {most}, the positions of {loaded.name}, got {length}. "
            "Give a smaller --length."
        )
    return pack(domain, part, loaded.tokenizer, length=length, track=track)


def prompts(loaded: Loaded, blocks: Blocks, number: int) -> list[str]:
    """The beginnings of some blocks, from their first whole line on, for sample completions."""
    length = min(96, blocks.tokens.shape[1] // 2)
    found: list[str] = []
    for tokens in blocks.tokens[:, :length]:
        if len(found) < number and not (tokens == loaded.tokenizer.eos_token_id).any():
            text = loaded.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            line = text.partition("\n")[2]
            found.append(line if line.strip() else text)
    return [prompt for prompt in found if prompt]
