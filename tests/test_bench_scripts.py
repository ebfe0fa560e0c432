"""The benchmark scripts: every row they promise, kept as made, taken up again, and a true table."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llm_narrow
from llm_narrow import checkpoint
from llm_narrow.errors import UnknownName

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "bench"


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path, domain_folder: Path
) -> Any:
    """Opens a script, with the options that make it tiny, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.syspath_prepend(SCRIPTS / "peers")
    options = ["--model", str(model_folder), "--domain", str(domain_folder), "--length", "32",
               "--calibration-tokens", "128",
               "--out", str(tmp_path / "docs" / "result")]  # fmt: skip

    def opened(name: str, **changes: Any) -> tuple[ModuleType, list[str]]:
        module = importlib.import_module(name)
        for attribute, value in changes.items():
            monkeypatch.setattr(module, attribute, value)
        return module, options

    return opened


def written(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "docs" / "result.json").read_text("utf-8"))


HALF = 2 * 24 * 3 * 32  # two layers, 24 of 48 neurons in each, three rows of 32 a neuron
CRITERIA = ["--held-out-tokens", "128", "--check-tokens", "64", "--sparsities", "0.5,0.8"]


def test_criteria_makes_every_row_and_a_line_for_each_choice(script: Any, tmp_path: Path) -> None:
    criteria, options = script("criteria")
    criteria.main([*options, *CRITERIA, "--criteria", "magnitude,wanda", "--sequential", "wanda"])
    rows = written(tmp_path)["rows"]
    assert [r["refit"] for r in rows].count("sequential") == 1 * 2 * 2
    assert len(rows) == 2 * 2 * 2 * 2 + 1 * 2 * 2
    gone = {r["parameters_before"] - r["parameters"] for r in rows if r["sparsity"] == 0.5}
    assert gone == {HALF}
    table = (tmp_path / "docs" / "result.md").read_text("utf-8").split("\n\n")[0].splitlines()
    assert len(table) == 2 + 10
    best = min(r["above"]["value"] for r in rows if r["sparsity"] == 0.8)  # the order is by this
    assert f"**{best:+.3f} (" in table[2]


def test_criteria_goes_on_where_it_was_stopped(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criteria, options = script("criteria")
    some = [*options, *CRITERIA, "--criteria", "magnitude", "--refits", "none"]
    criteria.main(some)
    before = written(tmp_path)["rows"]
    kept = tmp_path / "runs" / "bench" / "result.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # killed in the last write
    made: list[str] = []
    true_add = criteria.Rows.add
    monkeypatch.setattr(
        criteria.Rows, "add", lambda self, key, row: (made.append(key), true_add(self, key, row))
    )
    criteria.main(some)
    assert made == ["magnitude global none 0.8"]
    again = written(tmp_path)["rows"]
    timings = ("cut_seconds", "score_seconds")
    assert [{k: v for k, v in r.items() if k not in timings} for r in again] == [
        {k: v for k, v in r.items() if k not in timings} for r in before
    ]
    criteria.main([*some, "--seed", "1"])
    assert len(made) == 1 + 4 + ("precision" in made)  # other blocks: none of it counts


def test_criteria_scores_heads_by_ablation_too(script: Any, tmp_path: Path) -> None:
    criteria, options = script("criteria")
    criteria.main([*options, "--held-out-tokens", "128", "--kind", "heads", "--sparsities", "0.5",
                   "--criteria", "ablation", "--refits", "oneshot",
                   "--ablation-tokens", "32", "--allocations", "uniform"])  # fmt: skip
    (row,) = written(tmp_path)["rows"]
    assert (row["criterion"], row["refit"]) == ("ablation", "oneshot")
    assert "ablation" not in {
        cell.criterion for cell in criteria.wanted(criteria.parse(options))
    }  # a pass for every neuron is asked for by name only


def test_criteria_refuses_an_unknown_name(script: Any) -> None:
    criteria, options = script("criteria")
    with pytest.raises(UnknownName, match="Did you mean 'attribution'"):
        criteria.main([*options, "--criteria", "atribution"])


def test_costs_compares_the_three_ways(script: Any, tmp_path: Path) -> None:
    costs, options = script("costs", precisions_of=lambda start: ("float32",))
    small = ["--turns", "1", "--prompt-tokens", "32", "--sparsities", "0.5"]
    args = costs.parse([*options, *small])
    fresh = costs.in_fresh_process(args, "float32", "scoring")
    assert fresh["peak_bytes"] >= fresh["loaded_bytes"] > 0
    peaks = {"scoring": 3_000_000, "full": 4_000_000, "chunked": 4_000_000}
    script("costs", in_fresh_process=lambda args, precision, way: {
        "peak_bytes": peaks[way], "above_model_bytes": None})  # fmt: skip
    costs.main([*options, *small])
    rows = {row["what"]: row for row in written(tmp_path)["rows"]}
    assert set(rows) == {"memory", "time", "prefill"}
    assert all(s > 0 for way in costs.WAYS for s in rows["time"]["seconds"][way])
    speed = rows["prefill"]
    assert speed["flop_ratio"] > 1
    ratio = speed["prefill_ratio"]["value"] / speed["flop_ratio"]
    assert speed["of_flop_ratio"]["value"] == pytest.approx(ratio)
    table = (tmp_path / "docs" / "result.md").read_text("utf-8")
    assert "| peak memory of the process, MB, float32 | 3 | 4 | 4 | 0.75 | 0.75 |" in table


def test_peers_measures_what_a_tool_saved_and_shows_a_failure(
    script: Any, tmp_path: Path, model_folder: Path
) -> None:
    peers, options = script("peers", environment=lambda python, console: sys.executable)
    ours = peers.Setting("llm-narrow", "attribution", "no refit")
    absent = peers.Setting("optipfair", "ppm", "not installed here")
    script("peers", SETTINGS=[ours, absent])
    peers.main([*options, "--held-out-tokens", "128", "--sparsities", "0.5"])
    parameters = sum(p.numel() for p in checkpoint.load(model_folder).parameters())
    good, bad = written(tmp_path)["rows"]
    assert good["keep"] == 24 and good["parameters"] == parameters - HALF
    assert good["peak_bytes"] > 0 and good["seconds"]["gradients"] >= 0
    assert good["above"]["low"] <= good["above"]["value"] <= good["above"]["high"]
    assert "optipfair" in bad["error"]
    text = (tmp_path / "docs" / "result.md").read_text("utf-8")
    assert "| optipfair, ppm | failed: ModuleNotFoundError: No module named 'optipfair'" in text
    args = peers.parse([*options, "--held-out-tokens", "128"])
    rows = peers.Rows(args.out, {})
    rows.done = {peers.key(s, 0.5): r for s, r in ((ours, good), (absent, bad))}
    assert not peers.unfinished(rows, ours, 0.5) and peers.unfinished(rows, absent, 0.5)


def test_peers_scripts_know_every_setting(script: Any) -> None:
    peers, _ = script("peers")
    for setting in [*peers.SETTINGS, *peers.SLOW]:
        assert f'"{setting.name}":' in setting.script.read_text("utf-8")
    pinned = (SCRIPTS / "peers" / "constraints.txt").read_text("utf-8")
    for package in ("optipfair==0.4.2", "torch-pruning==1.6.1", "torch==2.13.0"):
        assert f"\n{package}\n" in pinned


def test_recovery_makes_a_run_for_each_method_and_takes_them_up_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    recovery, options = script("recovery")
    line = [*options, "--held-out-tokens", "128", "--validation-tokens", "64", "--sparsities",
            "0.5", "--budgets", "512", "--methods", "refit,plain,distill,lora,lasso"]  # fmt: skip
    recovery.main(line)
    rows = written(tmp_path)["rows"]
    assert [r["method"] for r in rows] == ["refit", "plain", "distill", "lora", "lasso"]
    assert [r["tokens"] for r in rows] == [0, 512, 512, 512, 512]
    assert len({r["parameters"] for r in rows}) == 1
    assert len({r["loss"] for r in rows}) == 5
    assert rows[4]["lasso_removed_by_score"] == 0
    best = min(rows[1:], key=lambda r: r["above"]["value"])
    table = (tmp_path / "docs" / "result.md").read_text("utf-8")
    assert table.count("**") == 2
    assert f"| {best['method']}: " in next(t for t in table.splitlines() if "**" in t)
    monkeypatch.setattr(recovery, "shared", None)  # nothing is made anew
    with pytest.raises(TypeError):
        recovery.main(line)
    runs = tmp_path / "runs/bench/recovery"
    assert sorted(p.name for p in runs.iterdir()) == [
        "distill-0.5-512", "lasso-0.5-512", "lora-0.5-512", "plain-0.5-512", "refit-0.5"
    ]  # fmt: skip


@pytest.mark.long
def test_survival_kills_a_run_and_compares(
    script: Any, tmp_path: Path, model_folder: Path, domain_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    survival, _ = script("survival")
    moments = iter([0.5, 9.0])  # before anything has begun, and on the way or never
    monkeypatch.setattr(survival.random.Random, "uniform", lambda *_: next(moments, 12.0))
    survival.main([
        "--model", str(model_folder), "--domain", str(domain_folder), "--kills", "2",
        "--lasso-tokens", "4k", "--recover-tokens", "4k", "--out", str(tmp_path / "docs/result"),
        "--", "--length", "32", "--calibration-tokens", "128", "--held-out-tokens", "64",
        "--validation-tokens", "64", "--samples", "0",
    ])  # fmt: skip
    (row,) = written(tmp_path)["rows"]
    assert row["equal"] == [True] * len(row["equal"]) and len(row["kills"]) == 2
    assert row["kills"][0]["part"] == "text and scores"
    assert row["left"] == ["killed", "whole"]


def test_vocabulary_makes_a_row_for_each_threshold(script: Any, tmp_path: Path) -> None:
    vocabulary, options = script("vocabulary")
    vocabulary.main([*options, "--thresholds", "1,40", "--multiple", "8",
                     "--held-out-tokens", "128"])  # fmt: skip
    found = written(tmp_path)
    every, frequent = found["rows"]
    assert frequent["used"] < every["used"] <= every["closed"] <= every["kept"]
    assert frequent["kept"] <= every["kept"] < found["about"]["rows"]
    assert frequent["tokens"] >= every["tokens"] >= every["tokens_before"] > 0
    for row in (every, frequent):
        assert row["words_of_kept_alike"] and row["bytes_of_blocks_equal"]
        assert row["documents_decoded_alike"] == row["documents"] > 0
    table = (tmp_path / "docs" / "result.md").read_text("utf-8").splitlines()
    assert table[2].startswith("| 1 | ") and table[3].startswith("| 40 | ")


def test_steps_times_every_kind_in_turns(script: Any, tmp_path: Path) -> None:
    steps, options = script("steps")
    steps.main([*options, "--turns", "2", "--steps", "2"])
    found = written(tmp_path)
    assert [r["kind"] for r in found["rows"]] == list(steps.KINDS)
    assert all(len(r["seconds"]) == 4 and min(r["seconds"]) > 0 for r in found["rows"])
    assert min(found["about"]["peaks"].values()) > 1e8
    table = (tmp_path / "docs" / "result.md").read_text("utf-8").splitlines()
    assert table[2].endswith("| 1.000 |")


def test_decode_times_what_llama_cpp_runs(
    script: Any, tmp_path: Path, model_folder: Path, domain_folder: Path
) -> None:
    """Half of the neurons gone: fewer bytes, a speed in every turn, ratios that fit both."""
    given = {"model": str(model_folder), "domain": str(domain_folder), "length": 32,
             "calibration_tokens": 128, "held_out_tokens": 128, "speed": False, "samples": 0,
             "report": False}  # fmt: skip
    llm_narrow.prune(**given, sparsity=0.5, out=tmp_path / "half")
    decode, options = script("decode")
    decode.main([*options, "--runs", str(tmp_path / "half"), "--tokens", "8", "--turns", "3",
                 "--quantize", "f32,f16"])  # fmt: skip
    found = written(tmp_path)["rows"]
    for kind, whole, half in (("f32", *found[:2]), ("f16", *found[2:])):
        assert half["bytes"] < whole["bytes"] and half["name"] == "half"
        for row in (whole, half):
            assert row["quantize"] == kind
            assert len(row["speeds"]) == 3 and min(row["speeds"]) > 0
            share = row["bytes"] / whole["bytes"]
            pairs = zip(row["speeds"], whole["speeds"], strict=True)
            assert row["of_limit"] == pytest.approx(sorted(a / b * share for a, b in pairs))
    table = (tmp_path / "docs" / "result.md").read_text("utf-8").splitlines()
    assert table[3].startswith(f"| half | f32 | llama | {found[1]['bytes']:,} |")
    assert table[5].startswith(f"| half | f16 | llama | {found[3]['bytes']:,} |")


def test_performance_is_told_in_ratios(
    script: Any, tmp_path: Path, model_folder: Path, domain_folder: Path
) -> None:
    run = tmp_path / "half"
    given = {"model": str(model_folder), "domain": str(domain_folder), "length": 32,
             "calibration_tokens": 128, "held_out_tokens": 128, "samples": 0, "report": False,
             "speed": False}  # fmt: skip
    llm_narrow.prune(**given, sparsity=0.5, out=run)
    performance, options = script("performance", SQUARE=64)
    performance.main([*options, "--run", str(run), "--turns", "2"])
    found = written(tmp_path)
    rows = {row["stage"]: row for row in found["rows"]}
    for name in performance.LEAST:
        assert len(rows[name]["seconds"]) == 2 and min(rows[name]["seconds"]) > 0
    assert min(rows["save and prove"]["open"]) > 0
    stages = json.loads((run / "manifest.json").read_text())["seconds"]
    assert rows["profile"]["seconds"] == stages
    text = (tmp_path / "docs" / "result.md").read_text("utf-8")
    assert "| forward |" in text and f"| {max(stages, key=lambda s: stages[s])} |" in text
