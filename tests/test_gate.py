"""The gate: each limit by its measured value, and the exit codes that CI goes by."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import refused
from llm_narrow.certificate import certify
from llm_narrow.errors import BadInput
from llm_narrow.gate import gate
from proof import audit_of, bench_of, matrix_of, write_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run. Do not write to it."""
    folder = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
        patch.setattr("llm_narrow.outcome.draw", lambda *args: None)
        patch.setenv("LLM_NARROW_CACHE", str(folder / "cache"))
        yield write_runs(folder, "score")["score"]


@pytest.fixture
def run_folder(made: Path, tmp_path: Path) -> Path:
    """A run whose loss rose by 1 % of its bits per byte."""
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ratio = {"bits_per_byte_ratio": 1.01, "bits_per_byte_ratio_low": 1.0,
             "bits_per_byte_ratio_high": 1.02}  # fmt: skip
    lines[1] |= ratio
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def outcome(run: Path, **limits: Any) -> list[tuple[str, bool]]:
    return [(x.name, x.passed) for x in gate(run, **limits).limits]


def test_on_domain_loss_and_size_need_no_certificate(run_folder: Path) -> None:
    own = (run_folder / "model/model.safetensors").stat().st_size
    assert outcome(run_folder, max_on_domain_loss="2%", max_size="200MB") == [
        ("max-on-domain-loss", True), ("max-size", True)
    ]  # fmt: skip
    assert outcome(run_folder, max_on_domain_loss="0.9%") == [("max-on-domain-loss", False)]
    assert outcome(run_folder, max_size=f"{own}B", max_on_domain_loss="1.1 %") == [
        ("max-on-domain-loss", True), ("max-size", True)
    ]  # fmt: skip
    assert not gate(run_folder, max_size=str(own - 1)).passed
    (limit,) = gate(run_folder, max_on_domain_loss="2%").limits
    assert limit.measured == pytest.approx(0.01)
    assert limit.told == "+1.00%"


def test_speed_is_the_slower_of_two(run_folder: Path, tmp_path: Path) -> None:
    certify(run_folder, bench=bench_of(run_folder, tmp_path / "bench.json"))  # 1.5 and 1.3
    assert outcome(run_folder, min_speedup=1.3) == [("min-speedup", True)]
    assert outcome(run_folder, min_speedup=1.31) == [("min-speedup", False)]


@pytest.mark.parametrize(
    ("value", "on", "wanted", "passes"),
    [(6.0, 0.05, 5, True), (6.0, 0.05, 6.5, False), (None, -0.1, 5, True)],
)
def test_selectivity(
    run_folder: Path, tmp_path: Path, value: float | None, on: float, wanted: float, passes: bool
) -> None:
    certify(run_folder, matrix=matrix_of(run_folder, tmp_path / "m.json", value=value, on=on))
    assert outcome(run_folder, min_selectivity=wanted) == [("min-selectivity", passes)]


@pytest.mark.parametrize(
    ("tokens", "scratch", "passes"),
    [
        (150.0, 200.0, True), (50.0, 200.0, False), (100.0, 200.0, True),
        (None, 200.0, True),  # above 2
        (None, 400.0, True),  # above 1
        (100.0, None, False),  # below 0.25
        (None, None, False),  # unknown
        (0.0, None, False),  # never lost
    ],
)  # fmt: skip
def test_relearning(
    run_folder: Path, tmp_path: Path, tokens: float | None, scratch: float | None, passes: bool
) -> None:
    audit = audit_of(run_folder, tmp_path / "audit", tokens=tokens, scratch=scratch)
    certify(run_folder, relearn=[audit])
    assert outcome(run_folder, min_relearning=0.5) == [("min-relearning", passes)]


def test_every_audited_domain_has_to_hold(run_folder: Path, tmp_path: Path) -> None:
    good = audit_of(run_folder, tmp_path / "good", tokens=150.0, scratch=200.0)
    bad = audit_of(run_folder, tmp_path / "bad", tokens=20.0, scratch=200.0, domain="prose")
    certify(run_folder, relearn=[good, bad])
    found = gate(run_folder, min_relearning=0.5)
    assert [(x.passed, x.told) for x in found.limits] == [
        (True, "0.75 (english)"), (False, "0.1 (prose)")
    ]  # fmt: skip
    assert not found.passed


def test_exit_codes(run: Any, run_folder: Path, tmp_path: Path) -> None:
    kept = run("gate", run_folder, "--max-on-domain-loss", "2%", "--max-size", "200MB")
    assert (kept.code, kept.err) == (0, "")
    assert "all limits kept" in kept.out
    missed = run("gate", run_folder, "--max-on-domain-loss", "0.5%", "--max-size", "200MB")
    assert missed.code == 1
    assert "FAIL" in missed.out
    assert "1 of 2 limits missed" in " ".join(missed.out.split())
    told = run("gate", run_folder, "--max-on-domain-loss", "0.5%", "--json")
    assert told.code == 1
    facts = json.loads(told.out)
    assert (facts["passed"], facts["limits"][0]["passed"]) == (False, False)
    assert facts["limits"][0]["measured"] == pytest.approx(0.01)
    refused(run("gate", run_folder), "Give at least one limit")
    for flag, command in (
        ("--min-speedup", "llm-narrow bench"), ("--min-selectivity", "--matrix"),
        ("--min-relearning", "llm-narrow relearn"),
    ):  # fmt: skip
        refused(run("gate", run_folder, flag, "1"), f"{flag}: ", "was not measured", command)
    both = run("gate", run_folder, "--min-speedup", "1", "--min-relearning", "1")
    assert both.code == 2
    assert "2 problems" in both.err
    refused(run("gate", tmp_path, "--max-size", "1MB"), "is not a finished run folder")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_on_domain_loss": "0.02"}, "must be a percentage"),
        ({"max_on_domain_loss": "two%"}, "must be a percentage"),
        ({"max_size": "200 apples"}, "must be a size such as 200MB"),
        ({"min_speedup": -1.0}, "--min-speedup must be at least 0"),
        ({"min_relearning": float("nan")}, "--min-relearning must be at least 0"),
    ],
)
def test_limits_that_are_none(run_folder: Path, limits: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as error:
        gate(run_folder, **limits)
    assert words in str(error.value)


def test_a_certificate_of_other_weights_is_no_proof(run_folder: Path) -> None:
    certify(run_folder)
    file = run_folder / "certificate.json"
    told = json.loads(file.read_text())
    told["model"]["sha256"] = "0" * 64
    file.write_text(json.dumps(told))
    with pytest.raises(BadInput, match="certify it again"):
        gate(run_folder, max_on_domain_loss="2%")
    file.write_text("{}")
    with pytest.raises(BadInput, match="no certificate of this version"):
        gate(run_folder, max_on_domain_loss="2%")
