"""Two processes do what one does with twice the batch: DDP and FSDP2, scores, refits, resuming.

They are started once for all tests here; how far they may be from one process is said per test.
What differs is the order in which float32 numbers are added up.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import process_work as work
from llm_narrow import processes
from llm_narrow import state as states
from llm_narrow.errors import NarrowError
from llm_narrow.startup import check_processes
from training import ROOT

every_way = pytest.mark.parametrize("way", work.WAYS)


def start(part: str, place: Path) -> tuple[int, str]:
    """Two processes that do a part of the work; the exit code, and what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "process_work.py"), part, str(place)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their results, having been killed and started again twice."""
    place = tmp_path_factory.mktemp("two")
    for part, killed in (("everything", "killed-ddp"), ("first_again", "killed-fsdp")):
        code, said = start(part, place)
        assert code != 0 and "(exitcode: -9)" in said, said[-3000:]
        assert states.latest(place / killed / "state") == work.KILLED - 1
        assert not (place / killed / "done.0.json").exists()
    code, said = start("second_again", place)
    assert code == 0, said[-3000:]
    return place


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the two processes have, which add up in the same order then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by this process alone, each step with the same blocks."""
    place = tmp_path_factory.mktemp("one")
    for case in work.CASES:
        work.run(case, place / case, two=False)
    return place


def left(place: Path, name: str) -> dict[str, Tensor]:
    """The tensors that both processes left, which are the same in every bit."""
    first, second = (load_file(place / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    return first


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(t.equal(second[n]) for n, t in first.items())


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference in any tensor, as a share of its largest entry."""
    assert found.keys() == wanted.keys()
    apart = [(t - wanted[n]).abs().max() / wanted[n].abs().max() for n, t in found.items()]
    return float(torch.stack(apart).max())


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "done.0.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@every_way
@pytest.mark.parametrize("case", ["plain", "lasso", "lora"])
def test_a_run_is_that_of_one_process_with_twice_the_batch(
    case: str, way: str, two: Path, one: Path
) -> None:
    """Losses to 1e-6, gradient norms and weights to 1e-5, relative. Accumulation, clipping and
    validation on batches that do not divide evenly are in all; best weights are chosen in one."""
    here, alone = two / way / case, one / case
    assert farthest(left(here, "final"), load_file(alone / "final.0.safetensors")) < 1e-5
    found, wanted = told(here), told(alone)
    assert (found["steps"], found["tokens"]) == (wanted["steps"], wanted["tokens"])
    assert found["chosen"] == wanted["chosen"]
    assert (found["chosen"] < work.DONE) == (case == "plain")
    # What the caller is left with has the loss that was told, when asked without any sharding.
    assert found["loss"] == pytest.approx(found["validation"], rel=1e-6)
    for ours, theirs in zip(rows(here), rows(alone), strict=True):
        for name, tolerance in (("loss", 1e-6), ("validation", 1e-6), ("gradient_norm", 1e-5)):
            assert (ours.get(name) is None) == (theirs.get(name) is None)
            if theirs.get(name) is not None:
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance), ours["step"]


@every_way
def test_the_controlled_lasso_zeroes_the_same_units(way: str, two: Path, one: Path) -> None:
    here, alone = two / way / "lasso", one / "lasso"
    found = told(here)["zero"]
    assert found == told(alone)["zero"]
    gone = [not stays for units in found.values() for stays in units]
    assert 0.2 < sum(gone) / len(gone) < 0.4
    steps = zip(rows(here)[1:], rows(alone)[1:], strict=True)
    strengths = [(a["strength"], b["strength"], a["zero"] == b["zero"]) for a, b in steps]
    assert all(a == pytest.approx(b, rel=1e-5) and alike for a, b, alike in strengths)
    assert len({a for a, _, _ in strengths}) > 2  # the control did something


@every_way
def test_bfloat16_and_checkpointing(way: str, two: Path, one: Path) -> None:
    """Losses to 1e-3, relative: FSDP2 keeps the residual stream in bfloat16, autocast does not."""
    here, alone = two / way / "checkpointing", one / "checkpointing"
    for ours, theirs in zip(rows(here)[1:], rows(alone)[1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert rows(here)[-1]["loss"] < rows(here)[1]["loss"] - 0.05
    assert {t.dtype for t in left(here, "final").values()} == {torch.float32}
    layer = {"ddp": "LlamaDecoderLayer", "fsdp": "FSDPLlamaDecoderLayer"}[way]
    narrow = {"ddp": "float32", "fsdp": "bfloat16"}[way]  # what the head is held in
    assert told(here)["seen"] == [f"{layer} torch.{narrow}"]
    assert told(two / way / "plain")["seen"] == [f"{layer} torch.float32"]


@every_way
def test_a_killed_run_goes_on_to_the_same_bits(way: str, two: Path) -> None:
    """Of weights, losses and strengths; on CPU, with gloo, for FSDP2 too."""
    whole, again = two / way / "lasso", two / f"killed-{way}"
    assert (told(whole)["resumed"], told(again)["resumed"]) == (None, work.KILLED - 1)
    assert same(left(whole, "final"), left(again, "final"))
    for ours, theirs in zip(rows(again), rows(whole), strict=True):
        assert {**ours, "tokens_per_second": 0} == {**theirs, "tokens_per_second": 0}
    last = f"state/step-{work.DONE:08d}/optimizer.safetensors"
    assert same(load_file(whole / last), load_file(again / last))


def test_states_are_whole_whoever_wrote_them(two: Path, one: Path) -> None:
    """The same tensors in the same files, to 1e-4 (second moments of gradients that are almost 0);
    best weights apart from the last among them."""
    for case in ("plain", "lasso"):
        written = [p / case / "state" / f"step-{work.DONE:08d}" for p in (two / "fsdp", one)]
        names = sorted(p.name for p in written[1].iterdir())
        assert names == sorted(p.name for p in written[0].iterdir())
        assert ("best.safetensors" in names) == (case == "plain")
        for name in names:
            if name.endswith(".safetensors"):
                assert farthest(*(load_file(w / name) for w in written)) < 1e-4, name
    best = load_file(two / "fsdp" / "plain" / f"state/step-{work.DONE:08d}/best.safetensors")
    assert same(best, left(two / "fsdp" / "plain", "final"))


def test_a_state_of_ddp_goes_on_sharded(two: Path) -> None:
    """To weights within 1e-5 of those that DDP reaches, and the same units of zeros."""
    whole, other = two / "ddp" / "lasso", two / "other-way"
    assert told(other)["resumed"] == work.KILLED - 1
    assert farthest(left(other, "final"), left(whole, "final")) < 1e-5
    assert told(other)["zero"] == told(whole)["zero"]


@pytest.mark.parametrize("case", work.GRADIENTS)
def test_the_chunked_loss_and_its_gradients_on_shards(case: str, two: Path) -> None:
    """To 1e-6 of the largest gradient of each parameter; heads tied, untied, capped, distilled."""
    wanted = work.gradients(case)
    assert len(wanted) > 10
    assert farthest(left(two, case), wanted) < 1e-6


def test_scores_are_those_of_one_process(two: Path) -> None:
    """To 1e-6 of the largest score of each group, by every criterion; ablation, a difference of
    two losses of the same size, to 1e-4."""
    found, wanted = left(two, "scores"), work.scored()
    assert found.keys() == wanted.keys()
    for criterion in work.CRITERIA:
        names = [name for name in wanted if name.startswith(criterion)]
        assert len(names) == 4
        limit = 1e-4 if criterion == "ablation" else 1e-6
        assert farthest({n: found[n] for n in names}, {n: wanted[n] for n in names}) < limit


def test_refitted_weights_are_those_of_one_process(two: Path) -> None:
    """To 1e-4, since a linear system stands between sums and weights."""
    wanted = work.refitted()
    found = left(two, "refit")
    assert sum(" error " in name for name in wanted) == 4 * 4
    assert farthest(found, wanted) < 1e-4


def test_one_process_has_all_the_work_and_all_the_sums(tmp_path: Path) -> None:
    items, sums = [1, 2, 3], torch.ones(2)
    assert (processes.rank(), processes.count()) == (0, 1)
    assert processes.share(items) == items
    assert processes.summed(sums) is sums and sums.equal(torch.ones(2))
    work.run("plain", tmp_path / "sharded", two=False, sharded=True)  # by itself, there is no need
    work.run("plain", tmp_path / "whole", two=False)
    first, second = (load_file(tmp_path / n / "final.0.safetensors") for n in ("sharded", "whole"))
    assert same(first, second)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_by_accelerate_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes(1, None)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(NarrowError, match=f"ACCELERATE_USE_{name} is set.*shards by itself"):
        check_processes(1, None)
