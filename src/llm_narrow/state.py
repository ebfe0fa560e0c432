"""What a training run needs to go on as if nothing had happened, and how it reaches the disk.

A state folder holds the last two states, `step-00000040` each, so that one that turns out broken
leaves the one before it. Each is safetensors and JSON, written beside, flushed and then renamed.
"""

import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cache import written_whole
from .errors import BadInput, problems
from .processes import cut

KEPT = 2  # states on disk
FORMAT = 1

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Best:
    """The weights with the lowest validation loss so far, on the CPU; in a run, one's own part."""

    step: int
    loss: float
    weights: Tensors


@dataclass(frozen=True)
class Snapshot:
    """A run after `step` optimizer steps. Whole tensors, however many processes share them.

    weights:   all that is trained, and buffers, by name.
    optimizer: its tensors, as `name of the parameter.what`.
    after:     what the caller's own step remembers: tensors and JSON values.
    random:    per process, from `random_state`.
    facts:     numbers that the loop goes on from.
    """

    step: int
    weights: Tensors
    optimizer: Tensors
    best: Best | None
    after: Mapping[str, Any]
    random: list[dict[str, Any]]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The newest state that can be used, if any, and what is to be told about those that cannot."""

    snapshot: Snapshot | None = None
    warnings: list[str] = field(default_factory=list)


def save(folder: Path, snapshot: Snapshot, made_by: Mapping[str, Any]) -> None:
    """Write a state and drop all but the last two. `made_by` is what a later run must match.

    Raises BadInput where the disk is full or the folder cannot be written; the states that are
    there stay.
    """
    _sweep(folder)
    before = _states(folder)
    with written_whole(folder / _name(snapshot.step), force=True) as fresh:
        save_file(_plain(snapshot.weights), fresh / "model.safetensors")
        save_file(_plain(snapshot.optimizer), fresh / "optimizer.safetensors")
        best = snapshot.best
        if best is not None and best.step != snapshot.step:
            _save_best(best, before, fresh / "best.safetensors")
        tensors = {k: v for k, v in snapshot.after.items() if isinstance(v, Tensor)}
        if tensors:
            save_file(_plain(tensors), fresh / "after.safetensors")
        told = {
            "format": FORMAT,
            "step": snapshot.step,
            "made_by": dict(made_by),
            "facts": dict(snapshot.facts),
            "after": {k: v for k, v in snapshot.after.items() if k not in tensors},
            "best": None if best is None else {"step": best.step, "loss": best.loss},
            "random": snapshot.random,
            "files": {p.name: p.stat().st_size for p in sorted(fresh.glob("*.safetensors"))},
        }
        (fresh / "state.json").write_text(json.dumps(told), encoding="utf-8")
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def find(folder: Path, made_by: Mapping[str, Any]) -> Found:
    """The newest whole state of the folder; no snapshot where there is no state at all.

    Raises BadInput where all states are broken, and where the state was made by something else
    than `made_by`, with every key that differs.
    """
    warnings: list[str] = []
    for path in reversed(_states(folder)):
        try:
            snapshot, was = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            warnings.append(f"{path} cannot be used: {why}.")
            continue
        _check_same(path, was, json.loads(json.dumps(dict(made_by))))
        if warnings:
            warnings.append(f"Going on from the state before it, step {snapshot.step}.")
        return Found(snapshot, warnings)
    if warnings:
        raise problems(
            str(folder), [*warnings, "No state is left. Remove the folder to start anew."]
        )
    return Found()


def latest(folder: Path) -> int | None:
    """The step of the newest state, None where there is none. Does not read it."""
    states = _states(folder)
    return int(states[-1].name.removeprefix("step-")) if states else None


def clear(folder: Path) -> None:
    """Remove all states: the run is over."""
    shutil.rmtree(folder, ignore_errors=True)


def optimizer_tensors(optimizer: Any, params: Mapping[str, Tensor]) -> Tensors:
    """What the optimizer remembers of each parameter, flat, as `save` takes it."""
    return {
        f"{name}.{key}": value
        for name, p in params.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(optimizer: Any, params: Mapping[str, Tensor], held: Tensors) -> None:
    """The reverse, in place; by every process where parameters are sharded."""
    of: dict[str, Tensors] = {}
    for full, value in held.items():
        name, _, key = full.rpartition(".")
        of.setdefault(name, {})[key] = value
    beside = optimizer.defaults.get("fused")  # only then is the count of steps on the device
    for name, p in params.items():
        if name in of:
            optimizer.state[p] = {
                key: (cut(value, p) if value.shape == p.shape else value).to(p.device)
                if beside or key != "step"
                else value
                for key, value in of[name].items()
            }


@torch.no_grad()
def restore_weights(named: Mapping[str, Tensor], held: Tensors) -> None:
    """Copy held tensors into the model's own; by every process where these are sharded.

    Raises BadInput if names or shapes differ.
    """
    wrong = [f"{name} is in one only" for name in sorted(named.keys() ^ held.keys())]
    wrong += [
        f"{name} is {tuple(held[name].shape)} in the state and {tuple(t.shape)} in the model"
        for name, t in named.items()
        if name in held and held[name].shape != t.shape
    ]
    if wrong:
        more = [f"… and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        raise problems("The state is of another model", wrong[:5] + more)
    for name, t in named.items():
        t.copy_(cut(held[name], t))


def random_state() -> dict[str, Any]:
    """The random numbers to come, of this process: Python's, numpy's, torch's and CUDA's."""
    kind, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), at, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(s) for s in cuda],
    }


def restore_random(held: Mapping[str, Any]) -> None:
    """The reverse. The state of CUDA devices that are not there is left out."""
    version, numbers, gauss = held["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, at, has_gauss, cached = held["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), at, has_gauss, cached))
    torch.set_rng_state(_unhex(held["torch"]))
    if torch.cuda.is_available():
        for device, text in zip(range(torch.cuda.device_count()), held["cuda"], strict=False):
            torch.cuda.set_rng_state(_unhex(text), device)


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _unhex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _states(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.name[5:].isdigit())


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for left in [*folder.glob(".step-*.partial-*"), *folder.glob(".step-*.old-*")]:
        shutil.rmtree(left, ignore_errors=True)


def _plain(tensors: Tensors) -> Tensors:
    return {name: t.detach().contiguous() for name, t in tensors.items()}


def _save_best(best: Best, before: Iterable[Path], target: Path) -> None:
    """Link to the same weights in a state before, since they are as large as the model."""
    for state in before:
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads((state / "state.json").read_text(encoding="utf-8"))
            if told["best"] == {"step": best.step, "loss": best.loss}:
                name = "model" if told["step"] == best.step else "best"
                held = state / f"{name}.safetensors"
                if held.stat().st_size == told["files"][held.name]:
                    os.link(held, target)
                    return
    save_file(_plain(best.weights), target)


def _read(path: Path) -> tuple[Snapshot, dict[str, Any]]:
    told = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if told["format"] != FORMAT:
        raise ValueError(f"its format is {told['format']}, this version reads {FORMAT}")
    for name, size in told["files"].items():
        there = (path / name).stat().st_size
        if there != size:
            raise ValueError(f"{name} is {there:,} bytes long instead of {size:,}")

    def held(name: str) -> Tensors:
        file = f"{name}.safetensors"
        return dict(load_file(path / file)) if file in told["files"] else {}

    weights, best = held("model"), None
    if told["best"] is not None:
        step, loss = told["best"]["step"], told["best"]["loss"]
        best = Best(step, loss, dict(weights) if step == told["step"] else held("best"))
    snapshot = Snapshot(
        told["step"], weights, held("optimizer"), best,
        {**told["after"], **held("after")}, told["random"], told["facts"],
    )
    return snapshot, told["made_by"]


def _check_same(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differ = [
        f"{key} was {was.get(key)!r} and is {now.get(key)!r} now"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if differ:
        raise BadInput(
            f"{path} was made by another run:\n"
            + "".join(f"  {line}\n" for line in differ)
            + f"Go on with what it was made by, or remove {path.parent} to start anew."
        )
