"""The report and the model card: one golden report, and whatever a run folder may lack."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from llm_narrow import report, rows
from llm_narrow.card import model_card
from llm_narrow.errors import BadInput
from llm_narrow.rows import Estimate, Row, Spread

GOLDEN = Path(__file__).parent / "golden" / "report.md"
BEFORE = Row(
    label="before", model="smollm2-135m", sha256="a" * 64, domain="python", part="held_out",
    tokens=65536, documents=214,
    loss=Estimate(2.4042, 2.3511, 2.4602), bits_per_byte=Estimate(0.9961, 0.9702, 1.0213),
    accuracy=Estimate(0.5312, 0.5204, 0.5421),
    parameters=134515008, parameters_without_embeddings=106203456, bytes=538090408,
    prompt_tokens=512, flops=280_000_000.0, prefill_flops=120e9,
    prefill=812.4, decode=21.34,
    prefill_ratio=Spread(1, 1, 1), decode_ratio=Spread(1, 1, 1), seconds=41.0,
)
AFTER = replace(
    BEFORE, label="after", model="runs/x/model", sha256="b" * 64,
    loss=Estimate(2.8012, 2.7411, 2.8602), bits_per_byte=Estimate(1.1606, 1.1302, 1.1913),
    accuracy=Estimate(0.4712, 0.4604, 0.4821),
    loss_difference=Estimate(0.397, 0.381, 0.414),
    bits_per_byte_ratio=Estimate(1.1651, 1.1577, 1.1723),
    parameters=94698048, parameters_without_embeddings=66386496, bytes=378822568,
    flops=200_000_000.0, prefill_flops=80e9, prefill=1180.2, decode=29.91,
    prefill_ratio=Spread(1.4527, 1.4011, 1.4893), decode_ratio=Spread(1.4015, 1.3702, 1.4403),
)
MANIFEST: dict[str, Any] = {
    "command": "llm-narrow prune --model smollm2-135m --domain python --out runs/x",
    "created": None,
    "versions": {"llm-narrow": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "seed": 1234,
    "model": {
        "name": "smollm2-135m", "sha256": "a" * 64, "parameters": 134515008,
        "license": "Apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    },
    "domain": {
        "name": "python",
        "sha256": {"calibration": "c" * 64, "held_out": "d" * 64},
        "dropped": {"tests": 812, "duplicate": 31},
        "tokens": {"calibration": 131072, "held_out": 65536},
    },
    "recipe": {"prune": {"sparsity": {"neurons": 0.5}, "refit": "sequential"},
               "recover": {"tokens": 0}},
    "plan": [
        {"group": f"model.layers.{i}.mlp", "kind": "neurons", "before": 1536, "after": 768}
        for i in range(30)
    ],
    "scores": {"criterion": "attribution", "tokens": 131072, "sha256": "e" * 64, "seconds": 121.4},
    "stability": {"neurons": 0.913},
    "refit": {"mode": "sequential", "damping": 0.01, "tokens": 131072},
    "checkpoint": {
        "layout": "uniform", "max_difference": 0.0, "files": {"model.safetensors": "f" * 64},
    },
    "samples": [
        {"prompt": "def add(a, b):", "before": "\n    return a + b", "after": "\n    ```\n    x"},
    ],
    "seconds": {"load": 3.2, "score": 121.4, "refit": 60.0},
}


def run_folder(path: Path, manifest: Any = MANIFEST, measured: tuple[Row, ...] = (BEFORE, AFTER)):
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(json.dumps(manifest))
    rows.append(path / "rows.jsonl", measured)
    return path


def test_golden_report(tmp_path: Path):
    assert report.markdown(run_folder(tmp_path)) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("key", MANIFEST)
@pytest.mark.parametrize("value", ["missing", None, {}, "surprise", 7])
def test_no_key_of_the_manifest_is_needed(tmp_path: Path, key: str, value: Any):
    manifest = {k: v for k, v in MANIFEST.items() if k != key}
    if value != "missing":
        manifest[key] = value
    text = report.markdown(run_folder(tmp_path, manifest))
    assert "## Before and after" in text and "134,515,008" in text
    assert model_card(manifest, [BEFORE, AFTER]).startswith("---\n")


def test_an_empty_run_folder_says_that_nothing_was_measured(tmp_path: Path):
    text = report.markdown(tmp_path)
    for section in ("Before and after", "What was removed", "A sample"):
        assert re.search(rf"## {section}\n\n[^\n]*not measured", text)
    with pytest.raises(BadInput, match="No run folder"):
        report.markdown(tmp_path / "none")


@pytest.mark.parametrize(("text", "why"), [("{", "not readable JSON"), ("[]", "got list")])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str, why: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=rf"manifest\.json .*{why}"):
        report.markdown(tmp_path)


def test_an_unfinished_row_is_told(tmp_path: Path):
    run_folder(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"label": "aft')
    assert "> Warning: rows.jsonl, line 3 was not written" in report.markdown(tmp_path)


def test_what_was_not_measured_of_a_row_is_said():
    bare = replace(
        AFTER, bytes=None, prefill=None, decode=None, prefill_ratio=None, decode_ratio=None,
        loss_difference=None, flops=None, prefill_flops=None,
    )
    lines = {line[0].strip(): line for line in report.comparison([BEFORE, bare])}
    for name in ("bytes of weights", "Δ loss, paired", "prefill, tokens/s", "decode, tokens/s",
                 "MFLOP per token", "prefill speed-up ÷ FLOP saving"):
        assert lines[name][2] == "not measured", name
    assert lines["bits per byte"][2] == "1.161 [1.130, 1.191]"


def test_figures_derived_from_two_rows_by_hand():
    lines = {line[0].strip(): line[1:] for line in report.comparison([BEFORE, AFTER])}
    assert lines["parameters"] == ["134,515,008", "94,698,048 (70.4 %)"]
    assert lines["bytes of weights"] == ["538.1 MB", "378.8 MB (70.4 %)"]
    # 1.4527 times as fast at 80/120 of the operations
    assert lines["prefill speed-up ÷ FLOP saving"] == ["-", "0.97"]


def test_models_of_several_domains_get_a_table_each(tmp_path: Path):
    other = [replace(r, domain="rust") for r in (BEFORE, AFTER)]
    text = report.benchmark([BEFORE, AFTER, *other])
    assert text.count("| parameters |") == 2
    assert "`rust`" in text and "`python`" in text


def test_one_document_has_no_interval():
    assert report.ranged(Estimate(2.5, 2.5, 2.5)) == "2.500"


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999 B"), (1000, "1.0 kB"), (538090408, "538.1 MB"), (6e9, "6.00 GB")]
)
def test_sizes_are_decimal(value: float, text: str):
    assert report.size(value) == text


def test_equal_neighbouring_layers_share_a_line():
    after = [768, 768, 512, 768]
    plan = [
        {"group": f"model.layers.{i}.mlp", "kind": "neurons", "before": 1536, "after": n}
        for i, n in enumerate(after)
    ]
    plan += [{"group": "model.layers.2.self_attn", "kind": "heads", "before": 3, "after": 3}]
    assert report.widths(plan).splitlines()[2:] == [
        "| 0-1 | 1,536 → 768 | - |",
        "| 2 | 1,536 → 512 | 3 |",
        "| 3 | 1,536 → 768 | - |",
        "| all | 6,144 → 2,816 | 3 |",
    ]


@pytest.mark.parametrize(
    "plan",
    [None, {}, [None], [{"group": "a", "kind": "heads"}], 
     [{"group": "a.0", "kind": "heads", "before": 3, "after": "few"}]],
)
def test_a_plan_that_is_none_is_told_like_none(plan: object) -> None:
    assert report.widths(plan) == ""


def test_widths_come_from_the_kept_units_where_the_manifest_has_no_plan(tmp_path: Path):
    run_folder(tmp_path, {k: v for k, v in MANIFEST.items() if k != "plan"})
    (tmp_path / "model").mkdir()
    keep = {f"model.layers.{i}.mlp": np.arange(8) < 5 for i in (0, 10, 2)}
    keep["model.layers.0.self_attn"] = np.ones(3, bool)
    save_file(keep, tmp_path / "model" / "keep.safetensors")
    text = report.markdown(tmp_path)
    assert "| 0 | 8 → 5 | 3 |" in text and "| 2-10 | 8 → 5 | - |" in text
    (tmp_path / "model" / "keep.safetensors").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"keep\.safetensors is not a readable"):
        report.markdown(tmp_path)


@pytest.mark.parametrize(
    ("recover", "refit", "mark"),
    [
        ({"tokens": 0}, "sequential", "only refitted"),
        ({"tokens": 0}, "none", "nothing mended it"),
        ({"tokens": 5_000_000}, "sequential", "Recovery training: 5,000,000 tokens."),
        ({}, "sequential", "Recovery training: not measured."),
    ],
)
def test_what_was_not_recovered_is_marked(recover: dict[str, int], refit: str, mark: str):
    manifest = {**MANIFEST, "recipe": {"prune": {"refit": refit}, "recover": recover}}
    loud = recover.get("tokens") == 0
    card = model_card(manifest, [BEFORE, AFTER])
    for text in (report.recovery_mark(manifest), card):
        assert mark in text
        assert ("**NOT RECOVERED:" in text) is loud
    assert ("not-recovered" in ModelCard(card).data.tags) is loud


def test_a_run_without_refit_says_so(tmp_path: Path):
    manifest = {**MANIFEST, "refit": {}, "recipe": {"prune": {"refit": "none"}}}
    assert "- refit: none\n" in report.markdown(run_folder(tmp_path, manifest))


def test_fences_are_longer_than_those_inside():
    assert report.fenced("a\n````\nb").splitlines()[0] == "`````"


def test_the_hub_understands_the_card():
    card = ModelCard(model_card(MANIFEST, [BEFORE, AFTER]))
    data = card.data
    assert data.license == "apache-2.0"
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"llm-narrow", "pruned"} <= set(data.tags)
    assert card.text.lstrip().startswith("# smollm2-135m narrowed to python")
    for told in ("94,698,048 parameters", "2.801 [2.741, 2.860]", MANIFEST["command"],
                 "| 0-29 | 1,536 → 768 |", "AutoModelForCausalLM.from_pretrained"):
        assert told in card.text
    assert "import checkpoint" not in card.text


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("EleutherAI/pythia-410m", "EleutherAI/pythia-410m"),
        ("pythia-410m@step1000", "EleutherAI/pythia-410m"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("./models/x", None), ("models/x.gguf", None), ("here/model", None),
    ],
)
def test_the_origin_is_named_only_if_it_is_a_hub_id(
    name: str, origin: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert ModelCard(model_card({"model": {"name": name}}, [])).data.base_model == origin


def test_uneven_checkpoints_say_what_they_need():
    uneven = {**MANIFEST, "checkpoint": {"layout": "uneven"}}
    text = model_card(uneven, [BEFORE, AFTER])
    assert "from llm_narrow import checkpoint" in text
    assert "AutoModelForCausalLM" not in text
