"""Checkpoints: write a narrowed model, prove it in a fresh process, load it again.

Layouts. *uniform*: every group of a kind keeps the same number of units and a stock config can
say so; the folder loads with `AutoModelForCausalLM.from_pretrained` where only transformers is
installed. *padded*: the same, with zeros up to the widest layer. *uneven*: anything else;
config.json holds the sizes of before and a model type that no other library knows, so that opening
it elsewhere fails by name, and `load` shrinks the whole skeleton to keep.safetensors before it
reads the weights.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from . import channels, depth, older
from .cache import remembered_sha256, written_whole
from .errors import BadInput, problems
from .families import find_groups
from .padding import padded_config, padded_state
from .stock import public
from .stock import uniform_config as uniform_config
from .units import Group, Keep
from .verify import TOLERANCE, Layout, Written, verify, weight_files

UNEVEN = "llm_narrow"  # the model type of an uneven folder
KEEP = "keep.safetensors"
KEEP_VERSION = 1
STOCK: Any = AutoModelForCausalLM


@dataclass(frozen=True)
class Verified:
    """A folder that was proved. `difference` is relative to the largest logit."""

    layout: Layout
    model_type: str
    difference: float
    tolerance: float
    files: Mapping[str, int]  # name -> bytes
    sha256: str  # of the weights


def save(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    original_config: Any,
    groups: Sequence[Group],
    keep: Keep,
    files: Mapping[str, str] | None = None,
    force: bool = False,
    dtype: torch.dtype | None = None,
    tokens: Tensor | None = None,
    pad: bool = False,
) -> Verified:
    """Write a model that `units.remove(model, groups, keep)` shrank, and prove the folder.

    The folder appears whole and proved, or not at all. `original_config` is the config from before
    the removal, `groups` those it had then; `files` are texts to put beside, by name; `dtype` casts
    the weights; `tokens`, (rows, length) int64, are what the proof is made on, random ones unless
    given. `tokenizer` may be None. `pad` fills uneven layers with zeros, so that stock transformers
    opens the folder (BadInput where none can). Raises NotVerified, and what `written_whole` does.
    """
    with written_whole(out, force=force) as folder:
        written = write(model, tokenizer, folder, original_config=original_config,
                        groups=groups, keep=keep, dtype=dtype, pad=pad)  # fmt: skip
        for name, text in (files or {}).items():
            if (folder / name).exists():
                raise ValueError(f"{name} is a file of the checkpoint itself")
            (folder / name).write_text(text, encoding="utf-8")
        difference = verify(folder, written, model, tokenizer, tokens=tokens)
    return Verified(
        layout=written.layout,
        model_type=written.model_type,
        difference=difference,
        tolerance=TOLERANCE[written.dtype],
        files={path.name: path.stat().st_size for path in sorted(out.iterdir())},
        sha256=weights_sha256(out),
    )


def write(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    original_config: Any,
    groups: Sequence[Group],
    keep: Keep,
    dtype: torch.dtype | None = None,
    pad: bool = False,
) -> Written:
    """Write the files of the checkpoint into `folder`, unproved. Leaves `model` as it is."""
    sizes = {g.name: g.size for g in find_groups(model)}
    wrong = [
        f"{g.name} has {sizes.get(g.name)} {g.kind}, and keep holds {int(keep[g.name].sum())}"
        for g in groups
        if sizes.get(g.name) != int(keep[g.name].sum())
    ]
    if wrong:
        raise problems("the model does not fit keep; remove first, then save", wrong[:8])
    dtype = dtype or model.dtype
    whole = _composed(getattr(model, "narrow_keep", {}), keep)
    config = uniform_config(original_config, groups, whole, keep)
    layout: Layout = "uneven" if config is None else "uniform"
    if config is None and pad:
        layout, config = "padded", padded_config(original_config, groups, whole, keep)
        if config is None:
            raise BadInput(
                "No stock model has norms over more channels than it has: it cannot be padded. "
                "Leave the layout uneven."
                if channels.wide(original_config) else
                "No stock model has layers as wide as the widest of these: they cannot be padded. "
                "Leave the layout uneven."
            )
    twin = _skeleton(original_config if config is None else config, dtype)
    if layout == "uneven":
        depth.take_out(twin, find_groups(twin), whole)
    held = padded_state(model, twin) if layout == "padded" else model.state_dict()
    state = {name: _cast(t.detach().cpu(), dtype) for name, t in held.items()}
    twin.load_state_dict(state, strict=True, assign=True)
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(model.generation_config)
    twin.config = channels.whole_config(twin.config)
    # Names as in memory for our own loader; stock classes expect those of the original format.
    with _no_bars():
        twin.save_pretrained(folder, save_original_format=layout != "uneven")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if layout == "uneven":
        _hide_type(folder / "config.json", original_config)
    else:
        older.say_twice(folder, twin.config)
    _write_keep(folder / KEEP, original_config, groups, whole, layout)
    _write_index(folder)
    return Written(layout, twin.config.model_type if config else UNEVEN, dtype)


def load(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """The model of a folder of either layout, in eval mode; its own dtype unless one is given.

    Raises BadInput for a folder without config or weights, for a damaged file, and for a keep that
    does not fit the config or the weights.
    """
    folder = Path(folder)
    found = layout(folder)
    weights = weight_files(folder)
    for path in [*weights, *([folder / KEEP] if found == "uneven" else [])]:
        _check_whole(path)
    if found == "uniform":
        try:
            with _no_bars():
                model, info = STOCK.from_pretrained(
                    folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(f"{folder} cannot be loaded: {_first_lines(error)}") from error
        if wrong := info["missing_keys"] or info["mismatched_keys"]:
            raise BadInput(f"{folder}: weights are missing or do not fit: {sorted(wrong)[:3]}")
        return model.eval().to(device)
    return _load_uneven(folder, weights, dtype).to(device)


def layout(folder: Path) -> Layout:
    """Which layout a folder has. Any folder for stock transformers counts as uniform."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "uneven" if fields["model_type"] == UNEVEN else "uniform"
    except OSError:
        raise BadInput(f"{folder} is no checkpoint: it has no config.json.") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{folder}/config.json is not the config of a model.") from None


def weights_sha256(folder: Path) -> str:
    """The hex SHA-256 of the weights: of the file, or of the list of hashes of its parts."""
    hashes = [remembered_sha256(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_keep(path: Path) -> Keep:
    """What a keep.safetensors decided. Raises BadInput if it is not one."""
    _check_whole(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("version") != str(KEEP_VERSION):
        raise BadInput(
            f"{path} has keep version {metadata.get('version')}; this llm-narrow reads version "
            f"{KEEP_VERSION}."
        )
    keep: Keep = load_file(path)
    return keep


def _composed(earlier: Keep, keep: Keep) -> Keep:
    """`keep` in terms of the units that the model had before it was narrowed the first time."""
    whole = {name: stay.cpu().clone() for name, stay in keep.items()}
    for name, before in earlier.items():
        whole[name] = before.clone()
        whole[name][before] = keep[name].cpu()
    return whole


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The stock model of a config: parameters without memory, buffers (rotary …) computed."""
    with init_empty_weights(include_buffers=False):
        return channels.skeleton(config, dtype=dtype)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _hide_type(path: Path, config: Any) -> None:
    """Have every other library refuse the config by its type, rather than by wrong sizes."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    # Not under the key model_type: transformers would take such a dict for the config of a part.
    fields["narrow"] = {"of": fields["model_type"], "version": KEEP_VERSION}
    if channels.wide(config):
        fields["narrow"][channels.NAME] = config.hidden_size
    fields["model_type"] = UNEVEN
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_keep(
    path: Path, original: Any, groups: Sequence[Group], whole: Keep, layout: Layout
) -> None:
    about = {
        g.name: {
            "kind": g.kind,
            "size": len(whole[g.name]),
            "kept": int(whole[g.name].sum()),
        }
        for g in groups
    }
    metadata = {
        "format": "llm-narrow keep",
        "version": str(KEEP_VERSION),
        "layout": layout,
        "groups": json.dumps(about),
        "original_config": json.dumps(public(original)),
    }
    save_file({name: stay.contiguous() for name, stay in whole.items()}, path, metadata)


def _write_index(folder: Path) -> None:
    """Say which file holds the weights: some loaders (vLLM) else take every *.safetensors."""
    path = folder / "model.safetensors.index.json"
    if path.exists():
        return
    (weights,) = weight_files(folder)
    with safe_open(weights, framework="pt") as file:
        names = {name: weights.name for name in sorted(file.keys())}
    index = {"metadata": {"total_size": weights.stat().st_size}, "weight_map": names}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def uneven_config(folder: Path) -> Any:
    """The config of an uneven folder as it was before `keep`; `channels.skeleton` makes its model.

    Raises BadInput for one that is damaged.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        narrow = fields.pop("narrow")
        config = AutoConfig.for_model(**{**fields, "model_type": narrow["of"]})
        if channels.NAME in narrow:
            config = channels.narrowed(config, int(narrow[channels.NAME]))
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise BadInput(f"{folder}/config.json is damaged: {_first_lines(error)}") from error
    return config


def _load_uneven(folder: Path, weights: Sequence[Path], dtype: torch.dtype | None) -> Any:
    config = uneven_config(folder)
    keep = read_keep(folder / KEEP)
    stored: Any = config.dtype
    model = _skeleton(config, dtype or stored)
    groups = find_groups(model)
    wrong = [f"{name} is no group of this model" for name in keep.keys() - {g.name for g in groups}]
    for g in groups:
        here = keep.get(g.name)
        if here is None:
            wrong.append(f"{g.name} is missing")
        elif here.shape != (g.size,) or here.dtype != torch.bool:
            wrong.append(f"{g.name} must be {g.size} bools, is {list(here.shape)} {here.dtype}")
    if wrong:
        raise problems(f"{folder / KEEP} does not fit {folder}/config.json", sorted(wrong))
    depth.take_out(model, groups, keep)
    state: dict[str, Tensor] = {}
    for path in weights:
        state |= {name: _cast(t, model.dtype) for name, t in load_file(path).items()}
    try:
        absent, surplus = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise BadInput(f"{folder}: weights do not fit {KEEP}: {_first_lines(error)}") from error
    if wrong := sorted({*absent} - {*model.all_tied_weights_keys}) + sorted(surplus):
        raise BadInput(f"{folder}: weights are missing or unknown: {', '.join(wrong[:3])}.")
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.narrow_keep = keep  # so that `save` can say what is left of the original
    return model.eval()


def _check_whole(path: Path) -> None:
    """Refuse a safetensors file that is absent, cut short or no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except FileNotFoundError:
        raise BadInput(f"{path} is missing. Take the whole folder.") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{path} is damaged or cut short ({_first_lines(error)}). Copy or download it again."
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own."""
    switch: Any = transformers_logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
