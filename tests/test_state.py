"""Survival: a run that is killed goes on to the same weights, and what cannot go on says so."""

import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_narrow import state as states
from llm_narrow.errors import BadInput
from llm_narrow.losses import language_loss
from llm_narrow.settings import Settings
from llm_narrow.train import train
from training import ROOT, Fading, small, text, weights

SETTINGS = Settings(tokens=12 * 4 * 9, lr=1e-2, batch_size=4, evaluate_every=4)


class Stopped(Exception):
    """A run that a test ends."""


class StopsAfter(Fading):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def __call__(self, model: Any, step: Any) -> dict[str, Any]:
        if step.number > self.step:
            raise Stopped
        return super().__call__(model, step)


def go(folder: Path, settings: Settings = SETTINGS, stop: int = 99, **given: Any) -> Any:
    """A run of 12 steps with states after 4, 8 and 12; gives the model and what became of it."""
    model = given.pop("model", None) or small("gpt2")
    blocks = given.pop("blocks", text())
    given = {"validation": text(4, seed=9), "after_step": StopsAfter(stop), **given}
    done = train(
        model, blocks, loss=language_loss, settings=settings, state=folder / "state",
        rows=folder / "train.jsonl", **given,
    )
    return weights(model), done


def stopped(folder: Path, at: int) -> None:
    with pytest.raises(Stopped):
        go(folder, stop=at)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(t.equal(second[n]) for n, t in first.items())


def killed(mode: str, place: Path, kills: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "training.py"), mode, str(place), str(kills), "7"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("mode", ["language", "cached"])
def test_killed_at_random_moments_the_run_ends_in_the_same_bits(mode: str, tmp_path: Path) -> None:
    """`cached` is killed while the teacher's predictions are written, too."""
    found = killed(mode, tmp_path, 4)
    assert len(found["kills"]) >= 4 and found["runs"] >= 1
    assert found["same"] == found["runs"]
    assert found["resumed"] >= 1


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("mode", ["language", "cached"])
def test_killed_often(mode: str, tmp_path: Path) -> None:
    found = killed(mode, tmp_path, 30)
    print(found)
    assert len(found["kills"]) >= 30 and found["runs"] >= 1
    assert found["same"] == found["runs"]


@pytest.mark.parametrize("at", [2, 4, 9, 11])
def test_a_stopped_run_goes_on(at: int, tmp_path: Path) -> None:
    whole, done = go(tmp_path / "whole")
    stopped(tmp_path / "cut", at)
    again, resumed = go(tmp_path / "cut")
    assert same(whole, again)
    assert resumed.resumed == (at // 4 * 4 or None)
    assert (resumed.chosen, resumed.validation, resumed.first) == (
        done.chosen, done.validation, done.first,
    )  # fmt: skip
    # Once more, after its end: nothing is trained, the same weights come out.
    third, over = go(tmp_path / "cut", after_step=StopsAfter(0))
    assert same(whole, third) and over.resumed == 12


def test_best_weights_survive_in_a_state_of_later_ones(tmp_path: Path) -> None:
    wild = replace(SETTINGS, lr=0.5, schedule="constant", warmup=0.0)
    whole, alone = go(tmp_path / "whole", wild)
    with pytest.raises(Stopped):
        go(tmp_path, wild, stop=11)
    again, done = go(tmp_path, wild)
    assert done.resumed == 8 and done.chosen == alone.chosen < 8
    assert same(whole, again)
    inodes = {p.stat().st_ino for p in tmp_path.glob("state/*/best.safetensors")}
    assert len(inodes) == 1  # linked, not written again


def test_two_states_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    left = tmp_path / "state" / ".step-00000003.partial-123"
    left.mkdir(parents=True)
    go(tmp_path)
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert names == ["step-00000008", "step-00000012"]
    assert states.latest(tmp_path / "state") == 12
    suffixes = {p.suffix for p in (tmp_path / "state").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors"}
    states.clear(tmp_path / "state")
    assert states.latest(tmp_path / "state") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_state_falls_back_to_the_one_before(name: str, tmp_path: Path) -> None:
    whole, _ = go(tmp_path / "whole")
    stopped(tmp_path, 11)
    file = tmp_path / "state" / "step-00000008" / name
    file.write_bytes(file.read_bytes()[:-100])
    again, done = go(tmp_path)
    assert same(whole, again) and done.resumed == 4
    assert "step-00000008 cannot be used" in done.warnings[0]
    assert done.warnings[1] == "Going on from the state before it, step 4."


def test_without_a_whole_state_the_run_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 11)
    for file in tmp_path.glob("state/*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(BadInput) as told:
        go(tmp_path)
    assert str(told.value).count("safetensors is 0 bytes long instead of") == 2
    assert "Remove the folder to start anew" in str(told.value)


def test_another_recipe_or_corpus_is_refused_with_what_differs(tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(BadInput) as told:
        go(tmp_path, replace(SETTINGS, lr=0.02, seed=3), made_by={"model": "b"})
    for line in ("lr was 0.01 and is 0.02 now", "seed was 0 and is 3", "model was None and is 'b'"):
        assert line in str(told.value)
    assert "betas" not in str(told.value)
    with pytest.raises(BadInput, match=r"blocks\.sha256 was"):
        go(tmp_path, blocks=text(seed=1))
    with pytest.raises(BadInput, match=r"validation\.sha256 was"):
        go(tmp_path, validation=None)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    go(tmp_path, replace(SETTINGS, save_every_minutes=1.0))  # changes nothing but when


def test_another_model_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    with pytest.raises(BadInput, match=r"another model.*\n.*c_fc"):
        go(tmp_path, model=small("gpt2", n_inner=40))


def test_a_full_disk_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = go(tmp_path / "whole")
    real, calls = states.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(states, "save_file", full)
    with pytest.raises(BadInput, match="No space left on the disk"):
        go(tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-00000004"]
    monkeypatch.setattr(states, "save_file", real)
    again, done = go(tmp_path)
    assert same(whole, again) and done.resumed == 4


def test_states_are_saved_by_the_clock(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        go(tmp_path, replace(SETTINGS, save_every_minutes=1e-9, evaluate_every=99), stop=6)
    assert states.latest(tmp_path / "state") == 6


def test_random_numbers_go_on() -> None:
    held = json.loads(json.dumps(states.random_state()))

    def draw() -> list[float]:
        ours = [random.random(), random.gauss(0, 1), float(np.random.rand())]
        return [*ours, float(np.random.randn()), float(torch.rand(())), float(torch.randn(()))]

    first = draw()
    assert draw() != first
    states.restore_random(held)
    assert draw() == first
