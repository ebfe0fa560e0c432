"""Runs that train: what they leave, and that a stopped one goes on to the same result."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import left_behind, refused
from folders import write_domain, write_model
from llm_narrow import inputs, recipe, recovery, stages, train, training
from llm_narrow.blocks import pack
from llm_narrow.errors import BadInput, NarrowError
from llm_narrow.progress import silent

SMALL = {"length": 32, "batch_size": 2, "calibration_tokens": 512, "held_out_tokens": 256,
         "validation_tokens": 128, "evaluate_every": 4, "speed": False, "samples": 0}  # fmt: skip
LASSO = {"method": "lasso", "control": "timetable", "lasso_tokens": "640"}
RECOVER = {"recover_tokens": "512"}


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof in a fresh process, which takes seconds; test_real has it."""
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)


@pytest.fixture
def narrow(model_folder: Path, domain_folder: Path, tmp_path: Path) -> Any:
    """`prune` of the tiny model."""

    def go(out: str = "run", **given: object) -> Any:
        names = {"model": model_folder, "domain": domain_folder}
        settled = recipe.load(None, {**names, **SMALL, **given})
        return stages.prune(settled, out=tmp_path / out)

    return go


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def test_lasso_then_recovery_leaves_records_of_both(narrow: Any, tmp_path: Path) -> None:
    done = narrow(**LASSO, **RECOVER)
    run = done.folder
    assert left_behind(tmp_path) == ["run"]
    assert {"lasso.jsonl", "recover.jsonl", "norms.safetensors", "logs"} <= set(left_behind(run))
    lasso, recovered = done.manifest["lasso"], done.manifest["recover"]
    assert lasso["logits_change"]["masked"] == 0
    assert (lasso["zero"], lasso["removed"], lasso["removed_by_score"]) == (48, 48, 0)
    assert (lasso["steps"], recovered["steps"]) == (10, 8)
    assert recovered["tokens"] == 512
    assert done.manifest["refit"] == {"mode": "not needed: only units of zeros were removed"}
    rows = [json.loads(line) for line in (run / "recover.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(9))
    assert rows[0]["validation"] == pytest.approx(recovered["validation_first"])
    assert min(r["validation"] for r in rows if r["validation"]) == recovered["validation"]
    norms = load_file(run / "norms.safetensors")
    assert all((n > 0).all() for name, n in norms.items() if name.startswith("before: "))
    after = torch.cat([n for name, n in norms.items() if name.startswith("after: ")])
    assert int((after == 0).sum()) == 48
    assert list((run / "logs").rglob("events.out.tfevents.*"))


def test_a_lasso_that_falls_short_is_filled_up_by_score(narrow: Any) -> None:
    told = narrow(method="lasso", lasso_tokens=256, control="fixed", strength=800.0).manifest
    lasso = told["lasso"]
    assert told["refit"]["mode"] == "sequential"
    assert 0 < lasso["zero"] < 48
    assert lasso["removed"] == 48
    assert lasso["removed_zero"] + lasso["removed_by_score"] == 48
    assert lasso["removed_zero"] <= lasso["zero"]
    assert {(row["before"], row["after"]) for row in told["plan"] if row["kind"] == "neurons"} == {
        (48, 24)
    }


def test_the_papers_gradient_leaves_no_zeros_and_all_goes_by_score(narrow: Any) -> None:
    told = narrow(method="lasso", lasso_tokens=256, step="gradient", control="loss").manifest
    assert told["lasso"]["zero"] == 0
    assert told["lasso"]["removed_by_score"] == 48
    assert told["lasso"]["logits_change"] is None


def test_regularize_takes_out_zeros_only(
    run: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()
             if name not in ("speed",)]  # fmt: skip
    done = run("regularize", "--model", model_folder, "--domain", domain_folder, *flags,
               "--no-speed", "--control", "timetable", "--sparsity", "0.25", "--multiple", "1",
               "--lasso-tokens", "640", "--out", tmp_path / "r", "--json")  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["lasso"]["removed_zero"] == told["lasso"]["removed"] == 24
    assert told["lasso"]["logits_change"] == {"masked": 0.0, "removed": pytest.approx(0, abs=1e-5)}
    assert told["refit"]["mode"].startswith("not needed") and "recover" not in told
    assert "by 0 (exactly)" in done.err
    # What the lasso trained is what was saved: the same loss with and without the zeros.
    rows = [json.loads(line) for line in (tmp_path / "r/lasso.jsonl").read_text().splitlines()]
    assert rows[-1]["validation"] == pytest.approx(told["lasso"]["validation"])


def test_recover_goes_on_from_a_run_and_learns_from_its_whole_model(
    run: Any, narrow: Any, tmp_path: Path, model_folder: Path
) -> None:
    first = narrow()
    done = run("recover", first.folder, "--tokens", "512", "--validation-tokens", "128",
               "--no-speed", "--out", tmp_path / "better", "--json")  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["recipe"]["train"]["teacher"] == str(model_folder)
    assert told["recipe"]["train"]["distill"] == "teacher"
    assert told["plan"] == first.manifest["plan"]
    assert told["made_from"]["command"] == first.manifest["command"]
    assert told["recover"]["validation"] < told["recover"]["validation_first"]
    before, after = told["rows"]
    assert before["sha256"] == first.manifest["checkpoint"]["sha256"] != after["sha256"]
    kept = (tmp_path / "better/model/keep.safetensors").read_bytes()
    assert kept == (first.folder / "model/keep.safetensors").read_bytes()
    assert "NOT RECOVERED" not in (tmp_path / "better/report.md").read_text()
    assert "NOT RECOVERED" in (first.folder / "report.md").read_text()


def test_recover_of_any_model_learns_from_the_text_alone(
    run: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in SMALL.items()
             if n not in ("speed", "calibration_tokens")]  # fmt: skip
    done = run("recover", model_folder, "--domain", domain_folder, *flags, "--no-speed",
               "--tokens", "512", "--lr", "1e-3", "--out", tmp_path / "o", "--json")  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["recipe"]["train"]["distill"] == "none"
    assert told["rows"][1]["loss"] < told["rows"][0]["loss"]
    assert "plan" not in told


def test_lora_is_merged_and_has_learnt(narrow: Any) -> None:
    told = narrow(**RECOVER, recover_method="lora", lora_rank=4, lr=5e-3).manifest
    lora = told["recover"]["lora"]
    assert lora["loss_merged"] == pytest.approx(lora["loss_trained"], rel=1e-3)
    assert lora["loss_merged"] < lora["loss_before"]


def test_lora_that_learnt_nothing_is_refused_unless_the_first_weights_were_the_best(
    narrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {**RECOVER, "recover_method": "lora", "lora_rank": 4}
    trained = training._trained

    def idle(*args: Any, **given: Any) -> Any:
        params = dict(args[0].start.loaded.model.named_parameters())
        before = {name: p.detach().clone() for name, p in params.items()}
        done = trained(*args, **given)
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(before[name])
        return replace(done, chosen=done.steps * learnt)

    monkeypatch.setattr(training, "_trained", idle)
    learnt = True
    with pytest.raises(NarrowError, match="LoRA learnt nothing"):
        narrow(**lora)
    learnt = False
    told = narrow("again", **lora).manifest["recover"]
    assert told["chosen_step"] == 0
    assert len({*told["lora"].values()}) == 1


def test_a_cached_teacher_of_all_tokens_teaches_as_the_teacher_does(narrow: Any) -> None:
    beside = narrow("a", **RECOVER).manifest["recover"]
    cached = narrow("b", **RECOVER, distill="cached", top_k=384).manifest["recover"]
    assert cached["validation"] == pytest.approx(beside["validation"], abs=1e-3)
    assert cached["validation_first"] == beside["validation_first"]


@pytest.mark.parametrize("part", ["lasso", "remove", "recover", "teacher", "save"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    part: str, narrow: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**LASSO, **RECOVER, "distill": "cached", "save_every_minutes": 1e-6}
    whole = narrow("whole", **given).folder
    with monkeypatch.context() as stopped:
        if part in ("lasso", "recover"):
            advance, left = train._Run._advance, [6 if part == "lasso" else 13]

            def go(self: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return advance(self)

            stopped.setattr(train._Run, "_advance", go)
        else:
            place = {"remove": "removal.remove", "teacher": "distill._write",
                     "save": "checkpoint.save"}[part]  # fmt: skip

            def stop(*args: object, **given: object) -> None:
                raise KeyboardInterrupt

            stopped.setattr(f"llm_narrow.{place}", stop)
        with pytest.raises(KeyboardInterrupt) as caught:
            narrow("stopped", **given)
        assert caught.value.__notes__ == [
            f"What is done is kept; go on with: llm-narrow resume {tmp_path / 'stopped'}"
        ]
    assert left_behind(tmp_path) == ["stopped.unfinished", "whole"]
    done = run("resume", tmp_path / "stopped")
    assert done.code == 0, done.err
    assert "Going on with" in done.err
    assert same(tmp_path / "stopped", whole)
    assert left_behind(tmp_path) == ["stopped", "whole"]
    losses, commands = [], []
    for folder in (tmp_path / "stopped", whole):
        lines = (folder / "recover.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
        commands.append(json.loads((folder / "manifest.json").read_text())["command"])
    assert losses[0] == losses[1]
    assert commands[0] == commands[1]


def test_an_unfinished_run_of_something_else_is_refused_with_what_differs(
    narrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr("llm_narrow.training.recover", lambda lessons: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            narrow(**RECOVER)
    with pytest.raises(BadInput) as caught:
        narrow(**RECOVER, lr=1e-3, seed=1)
    assert "recover.lr was 0.0002 and is 0.001 now" in str(caught.value)
    assert "seed was 0 and is 1 now" in str(caught.value)
    assert "llm-narrow resume" in str(caught.value)
    # How often states are saved and where is logged to changes no weight.
    done = narrow(**RECOVER, save_every_minutes=3.0, trackers="tensorboard")
    assert done.folder == tmp_path / "run"


def test_there_has_to_be_something_to_resume(run: Any, narrow: Any, tmp_path: Path) -> None:
    refused(run("resume", tmp_path / "none"), "has not been begun")
    narrow(**RECOVER)
    refused(run("resume", tmp_path / "run"), "is finished")
    (tmp_path / "odd.unfinished").mkdir()
    (tmp_path / "odd.unfinished/job.json").write_text("{")
    refused(run("resume", tmp_path / "odd"), "cannot be read")


def test_a_damaged_part_is_named(
    narrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr("llm_narrow.training.recover", lambda lessons: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            narrow(**RECOVER)
    part = tmp_path / "run.unfinished/refitted"
    (part / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(BadInput, match=r"refitted is damaged .* Remove it"):
        narrow(**RECOVER)


def test_validation_shares_no_document_with_what_is_trained_on(
    model_folder: Path, domain_folder: Path
) -> None:
    names = {"model": model_folder, "domain": domain_folder, **SMALL}
    settled = recipe.load(None, {**names, **LASSO, **RECOVER})
    start = inputs.gather(settled)
    text = training.text(start, settled, track=silent)
    assert text.lasso is not None and text.recover is not None
    apart = set(text.validation.documents.unique().tolist())
    for blocks, tokens in ((text.lasso, 640), (text.recover, 512)):
        assert blocks.tokens.numel() == tokens
        assert not apart & set(blocks.documents.unique().tolist())
    assert not {tuple(b) for b in text.lasso.tokens.tolist()} & {
        tuple(b) for b in text.recover.tokens.tolist()
    }
    packed = pack(start.domain, "train", start.loaded.tokenizer, length=32)
    assert len(packed.tokens) > len(text.validation.tokens)


def test_no_more_text_is_set_aside_than_shares_a_document_with_the_validation(
    model_folder: Path, domain_folder: Path
) -> None:
    given = {**SMALL, "recover_tokens": 10_000_000, "validation_tokens": 320}
    settled = recipe.load(None, {"model": model_folder, "domain": domain_folder, **given})
    start = inputs.gather(settled)
    packed = pack(start.domain, "train", start.loaded.tokenizer, length=32)
    text = training.text(start, settled, track=silent)
    assert text.recover is not None
    used = {tuple(block) for block in text.recover.tokens.tolist()}
    apart = range(len(packed.tokens) - 10, len(packed.tokens))
    between = [
        n for n, block in enumerate(packed.tokens.tolist())
        if tuple(block) not in used and n not in apart
    ]  # fmt: skip
    shared = packed.documents[apart[0], 0]
    assert len(between) >= 1
    assert all(shared in packed.documents[n] for n in between)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 4, "accumulation": 10_000}, "One step takes 40000"),
        ({"recover_method": "lora", "lora_rank": 4000}, "rank of LoRA must be at most"),
        ({"top_k": 9999, "distill": "cached"}, "k must be from 1 to 384"),
    ],
)
def test_what_cannot_be_trained_is_told(given: dict[str, Any], words: str, narrow: Any) -> None:
    with pytest.raises(BadInput, match=words):
        narrow(**RECOVER, **given)


def test_a_teacher_with_another_vocabulary_is_refused(narrow: Any, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", vocab_size=400)
    with pytest.raises(BadInput, match="vocabulary has 384 tokens and the teacher's 400"):
        narrow(**RECOVER, teacher=str(other))


def test_nothing_to_recover_is_told(model_folder: Path, tmp_path: Path) -> None:
    names = {"model": str(model_folder), "domain": str(write_domain(tmp_path / "d"))}
    with pytest.raises(BadInput, match=r"recover\.tokens must be above 0"):
        recovery.recover(recipe.load(None, names), out=tmp_path / "o")


def test_a_stock_folder_called_model_is_recovered(
    domain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only run folders tell what was removed before."""
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    model = write_model(tmp_path / "of" / "model")
    given = {**SMALL, **RECOVER, "model": str(model), "domain": str(domain_folder)}
    recovery.recover(recipe.load(None, given), out=tmp_path / "o")
    assert (tmp_path / "o/model/keep.safetensors").is_file()


def test_two_processes_prune_as_one_that_sees_as_much(
    narrow: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    given = {**SMALL, **LASSO, **RECOVER, "distill": "cached"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()
             if name != "speed"]  # fmt: skip
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
            "llm_narrow", "prune", "--model", model_folder, "--domain", domain_folder, *flags,
            "--no-speed", "--device", "cpu", "--json", "--out", tmp_path / "two"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in line], env=environment, timeout=400,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one process speaks
    assert left_behind(tmp_path) == ["two"]
    one = narrow("one", **given, accumulation=2).manifest
    assert told["plan"] == one["plan"]
    for part in ("lasso", "recover"):
        assert told[part]["steps"] == one[part]["steps"]
        assert told[part]["validation"] == pytest.approx(one[part]["validation"], rel=2e-4)
    assert told["rows"][1]["loss"] == pytest.approx(one_loss(tmp_path / "one"), rel=2e-3)


def one_loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    return float(rows[1]["loss"])
