"""From one layout of a model with uneven layers to the other: the command `convert`."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from . import checkpoint, models
from .checkpoint import KEEP, Verified
from .depth import take_out
from .errors import BadInput, UnknownName
from .families import find_groups
from .progress import Track, silent
from .units import keep_all, norms
from .vocabulary_rows import MAP

LAYOUTS = ("padded", "uneven")


def convert(
    model: Path | str, layout: str, out: Path | str, *, force: bool = False, track: Track = silent
) -> Verified:
    """Write the model of a run folder or model folder in another layout, proved like any other.

    Raises BadInput for a folder that has the layout already, and for one whose layers are all of
    one width, which no layout changes.
    """
    if layout not in LAYOUTS:
        raise UnknownName("Layout", layout, LAYOUTS)
    loaded = models.load(str(model), track=track)
    is_now = _layout(loaded.folder)
    if is_now == layout:
        raise BadInput(f"{model} is {layout} already. Choose another --layout.")
    if is_now == "uniform":
        raise BadInput(
            f"{model} has the same width in every layer: it is stored so that stock transformers "
            "opens it, and there is nothing to convert."
        )
    narrow, config = loaded.model, loaded.model.config
    if layout == "uneven":
        _without_zeros(narrow)
        narrow.narrow_keep = checkpoint.read_keep(loaded.folder / KEEP)
        config = _original_config(loaded.folder)
    groups = find_groups(narrow)
    saved = checkpoint.save(
        narrow, loaded.tokenizer, Path(out), original_config=config, groups=groups,
        keep=keep_all(groups), force=force, pad=layout == "padded",
        files={n: (loaded.folder / n).read_text("utf-8") for n in ("recipe.yaml",)
               if (loaded.folder / n).is_file()},
    )  # fmt: skip
    if (loaded.folder / MAP).is_file():
        shutil.copyfile(loaded.folder / MAP, Path(out) / MAP)
    return saved


def _layout(folder: Path) -> str:
    """Which layout a folder has; a padded one says so in its keep.safetensors."""
    found = checkpoint.layout(folder)
    if found == "uniform" and (folder / KEEP).is_file():
        with safe_open(folder / KEEP, "pt") as file:
            return str((file.metadata() or {}).get("layout", found))
    return found


def _original_config(folder: Path) -> Any:
    with safe_open(folder / KEEP, "pt") as file:
        fields = json.loads((file.metadata() or {})["original_config"])
    return AutoConfig.for_model(**fields)


def _without_zeros(model: Any) -> None:
    """Remove the units that are zero throughout, in place."""
    groups, params = find_groups(model), dict(model.named_parameters())
    keep = {g.name: (norms(g, params) > 0).cpu() for g in groups}
    take_out(model, groups, keep)
