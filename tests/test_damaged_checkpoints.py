"""What is missing, damaged or made for another model is told in one line and never loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_narrow import checkpoint, units
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups
from tiny import even, tiny, uneven


def written(kind: str, decide, folder: Path) -> Path:
    model = tiny(kind)
    groups = find_groups(model)
    keep = decide(groups)
    original = copy.deepcopy(model.config)
    units.remove(model, groups, keep)
    checkpoint.write(model, None, folder, original_config=original, groups=groups, keep=keep)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return written("gpt_neox", uneven, tmp_path)


@pytest.fixture
def even_folder(tmp_path) -> Path:
    return written("llama", lambda groups: even(groups, neurons=16), tmp_path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite_keep(folder: Path, change, **metadata: str) -> None:
    keep = checkpoint.read_keep(folder / "keep.safetensors")
    change(keep)
    save_file(keep, folder / "keep.safetensors", {"version": "1", **metadata})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


NEOX = "gpt_neox.layers.1.mlp"
ACCIDENTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "not the config of a model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "weights cut short": (lambda f: cut_short(f / "model.safetensors"), "damaged or cut short"),
    "weights no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02}q\x00."), "damaged or cut",
    ),
    "no keep": (lambda f: (f / "keep.safetensors").unlink(), "keep.safetensors is missing"),
    "keep cut short": (lambda f: cut_short(f / "keep.safetensors"), "damaged or cut short"),
    "newer keep": (
        lambda f: rewrite_keep(f, lambda keep: None, version="9"), "keep version 9.*reads version 1"
    ),
    "keep lacks a group": (
        lambda f: rewrite_keep(f, lambda keep: keep.pop(NEOX)), f"1 problem\n  {NEOX} is missing",
    ),
    "keep of another model": (
        lambda f: rewrite_keep(f, lambda keep: keep.update(x=keep.pop(NEOX))),
        f"2 problems\n  {NEOX} is missing\n  x is no group",
    ),
    "keep of another size": (
        lambda f: rewrite_keep(f, lambda keep: keep.update({NEOX: torch.ones(5).bool()})),
        rf"{NEOX} must be 48 bools, is \[5\]",
    ),
    "keep of other weights": (
        lambda f: rewrite_keep(f, lambda keep: keep.update({NEOX: torch.ones(48).bool()})),
        "weights do not fit keep.safetensors",
    ),
    "a weight too few": (
        lambda f: drop_weight(f, "lm_head.weight"), "missing or unknown: lm_head.weight",
    ),
    "damaged config": (lambda f: edit_config(f, narrow={}), "config.json is damaged"),
    "refused config": (lambda f: edit_config(f, hidden_size="wide"), "config.json is damaged"),
}  # fmt: skip


def drop_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_damaged_uneven_folder_is_refused(folder, accident):
    happen, told_of = ACCIDENTS[accident]
    happen(folder)
    with pytest.raises(BadInput, match=told_of):
        checkpoint.load(folder)


EVEN_ACCIDENTS = {
    "no config": ACCIDENTS["no config"],
    "no weights": ACCIDENTS["no weights"],
    "weights cut short": ACCIDENTS["weights cut short"],
    "other sizes": (lambda f: edit_config(f, intermediate_size=47), "cannot be loaded"),
    "a weight too few": (lambda f: drop_weight(f, "model.norm.weight"), "missing.*model.norm"),
    "unknown type": (lambda f: edit_config(f, model_type="x"), "cannot be loaded"),
}


@pytest.mark.parametrize("accident", EVEN_ACCIDENTS)
def test_a_damaged_uniform_folder_is_refused(even_folder, accident):
    happen, told_of = EVEN_ACCIDENTS[accident]
    happen(even_folder)
    with pytest.raises(BadInput, match=told_of):
        checkpoint.load(even_folder)
