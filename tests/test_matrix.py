"""`bench --matrix`: sets, scores on disk, what they come to, and the command line."""

import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_narrow
from commands import refused
from folders import sentences, write_model
from llm_narrow import matrix, matrix_rows, matrix_sets
from llm_narrow.choices import Likelihood, Pair
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.matrix_rows import OFF, selectivities
from llm_narrow.matrix_scores import Score
from llm_narrow.matrix_sets import Item
from llm_narrow.rows import Estimate
from test_matrix_sets import ASKED, files, jsonl

__all__ = ["files"]  # a fixture


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The model of `model_folder` with weights that are a little off."""
    folder = tmp_path_factory.mktemp("models") / "narrowed"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=chance)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


# What they come to ---------------------------------------------------------------------------


def score(name: str, nats: float, size: int = 10) -> Score:
    return Score(name, size, 0, (Likelihood(nats, 3, False),))


def risen(by: float, spread: float = 0.0, items: int = 30) -> tuple[list[Score], list[Score]]:
    """Scores before and after a rise of so many nats per byte; every other item has more of it."""
    names = [str(n) for n in range(items)]
    before = [score(n, 20.0) for n in names]
    return before, [score(n, 20 + 10 * (by + spread * (-1) ** int(n))) for n in names]


def ratios(**sets: tuple[list[Score], list[Score]]) -> dict[tuple[str, str], Any]:
    groups: dict[str, Any] = {"domain": "domain", "go": "languages", "rust": "languages",
                              "lambada": "prose"}  # fmt: skip
    found = selectivities(
        "m", {name: groups[name] for name in sets}, ["domain"],
        {name: pair[0] for name, pair in sets.items()},
        {name: pair[1] for name, pair in sets.items()},
    )  # fmt: skip
    return {(r.on, r.off): r for r in found}


def test_selectivity_by_hand() -> None:
    found = ratios(domain=risen(0.1), go=risen(0.2), rust=risen(0.4), lambada=risen(0.9))
    told = {off: r.value for (_, off), r in found.items()}
    assert told == {
        "go": pytest.approx(2), "rust": pytest.approx(4), "lambada": pytest.approx(9),
        "all languages": pytest.approx(3), "all prose": pytest.approx(9),
        OFF: pytest.approx((0.3 + 0.9) / 2 / 0.1),
    }  # fmt: skip
    whole = found["domain", OFF]
    assert whole.low == pytest.approx(whole.value) and whole.high == pytest.approx(whole.value)
    assert (whole.on_increase.value, whole.off_increase.value) == pytest.approx((0.1, 0.6))
    assert whole.to_dict()["selectivity"] == whole.value


def test_selectivity_where_the_domain_did_not_lose() -> None:
    for by in (0.0, -0.1):
        whole = ratios(domain=risen(by), go=risen(0.2))["domain", OFF]
        assert (whole.value, whole.low, whole.high) == (None, None, None)
    unsure = ratios(domain=risen(0.01, 0.2), go=risen(0.2))["domain", OFF]
    assert unsure.value == pytest.approx(20)
    assert unsure.low is not None and 0 < unsure.low < 20 and unsure.high is None
    neither = ratios(domain=risen(0.01, 0.2), go=risen(-0.01, 0.2))["domain", OFF]
    assert neither.value is not None and neither.low is None and neither.high is None
    sure = ratios(domain=risen(0.1, 0.1), go=risen(0.2, 0.1))["domain", OFF]
    assert sure.low is not None and sure.high is not None and sure.low < 2 < sure.high


def test_the_same_problems_are_drawn_of_every_language() -> None:
    """What rises alike in two languages has a ratio without spread; in two sets it has one."""
    shared = selectivities(
        "m", {"go": "languages", "rust": "languages"}, ["go"],
        {"go": risen(0.2, 0.2)[0], "rust": risen(0.4, 0.4)[0]},
        {"go": risen(0.2, 0.2)[1], "rust": risen(0.4, 0.4)[1]},
    )[0]  # fmt: skip
    assert (shared.value, shared.low, shared.high) == pytest.approx((2, 2, 2))
    apart = ratios(domain=risen(0.2, 0.1), lambada=risen(0.4, 0.2))["domain", "lambada"]
    assert apart.low is not None and apart.high is not None and apart.low < 1.9 < 2.1 < apart.high


def test_accuracy_by_hand() -> None:
    def told(*nats: float) -> Score:
        return Score("q", 0, 0, tuple(Likelihood(n, 1, False) for n in nats))

    items = [Item(str(n), (Pair("", " a"), Pair("", " bbbb")), 1, (1, 4)) for n in range(4)]
    first = [told(1, 2), told(1, 2), told(2, 1), told(1, 1)]
    second = [told(2, 1), told(1, 5), told(2, 1), told(1, 1)]
    assert matrix_rows.right(items, first) == [0, 0, 1, 0]  # of equal ones the first is taken
    assert matrix_rows.right(items, first, normed=True) == [1, 1, 1, 1]
    assert matrix_rows.right(items, second, normed=True) == [1, 0, 1, 1]
    row = matrix_rows.choice_row("s", items, True, "m", "x", second, first, "f")
    assert (row.acc.value, row.chance, row.won, row.lost, row.p) == (0.5, 0.5, 1, 0, 1.0)
    assert row.acc_difference is not None and row.acc_difference.value == 0.25
    assert row.acc_norm is not None and row.acc_norm.value == 0.75
    assert row.acc_norm_difference is not None and row.acc_norm_difference.value == -0.25
    assert row.to_dict()["acc_norm_difference_low"] <= -0.25
    plain = matrix_rows.choice_row("s", items, False, "m", "x", second, None, "f")
    assert (plain.acc_norm, plain.p, plain.acc_difference) == (None, None, None)


# The benchmark -------------------------------------------------------------------------------


def printed(found: matrix.Matrix) -> str:
    console = Console(width=300)
    with console.capture() as caught:
        console.print(found.shown())
    return caught.get()


def test_models_side_by_side(
    model_folder: Path, narrowed: Path, domain_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    names, out = [str(model_folder), str(narrowed)], tmp_path / "out"
    how: dict[str, Any] = {
        "sets": ["domain", files["texts"], files["asked"]], "domain": str(domain_folder),
        "limit": 8, "out": out,
    }  # fmt: skip
    found = matrix.bench(None, names, **how)
    facts = json.loads(json.dumps(found.facts()))
    assert facts == json.loads((out / "matrix.json").read_text())
    assert facts["form"] == 1 and [m["name"] for m in facts["models"]] == names
    assert [(r["set"], r["model"]) for r in facts["losses"]] == [
        (key, name) for key in how["sets"][:2] for name in names
    ]
    assert {key: one["own"] for key, one in facts["sets"].items()} == {
        "domain": True, files["texts"]: False, files["asked"]: False
    }  # fmt: skip
    for row in found.losses:
        lines = [json.loads(line) for line in (out / row.scores).read_text().splitlines()][1:]
        assert len(lines) == row.items <= 8
        nats, size = sum(r["nats"][0] for r in lines), sum(r["bytes"] for r in lines)
        assert row.bits_per_byte.value == pytest.approx(nats / size / math.log(2))
        assert row.bytes == size
    first, second = found.losses[2:]
    assert first.increase is None and second.increase is not None
    rise = (second.bits_per_byte.value - first.bits_per_byte.value) * math.log(2)
    assert second.increase.value == pytest.approx(rise)
    assert {(r.on, r.off) for r in found.selectivities} == {
        ("domain", files["texts"]), ("domain", "all texts"), ("domain", OFF)
    }  # fmt: skip
    whole, narrow = found.choices
    assert whole.p is None and narrow.p is not None and narrow.items == 8
    text = printed(found)
    for part in ("Texts", "domain *", "Selectivity", "off the domain", "Questions", str(out)):
        assert part in text, part
    assert matrix.bench(None, names, **how) == found


def test_what_belongs_to_the_domain(
    model_folder: Path, narrowed: Path, domain_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    names = [str(model_folder), str(narrowed)]
    how: dict[str, Any] = {"sets": ["domain", files["texts"]], "domain": str(domain_folder)}
    found = matrix.bench(None, names, **how, on=files["texts"])
    assert all(row.own for row in found.losses)
    assert found.selectivities == ()
    with pytest.raises(BadInput, match=r"--on must name texts, and .*asked\.jsonl are questions"):
        matrix.bench(None, names, sets=[files["asked"]], on=files["asked"], domain="python")


def test_a_benchmark_that_is_killed_goes_on(
    model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": sentences(n, 20)} for n in range(120)]
    file, out = jsonl(tmp_path / "many.jsonl", rows), tmp_path / "out"
    given: dict[str, Any] = {"sets": [str(file)], "batch_size": 1, "domain": str(domain_folder)}
    code = (
        "import json, sys; from pathlib import Path; from llm_narrow.matrix import bench\n"
        "bench(None, [sys.argv[1]], out=Path(sys.argv[2]), **json.loads(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(model_folder), str(out), json.dumps(given)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 240
        while not (held := [p for p in out.glob("*.jsonl") if p.read_bytes().count(b"\n") > 3]):
            assert process.poll() is None and time.monotonic() < ends, "ended before it was killed"
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
    left = held[0].read_bytes()
    left = left[: left.rfind(b"\n") + 1]
    assert left.count(b"\n") < 121 and not (out / "matrix.json").exists()
    on = matrix.bench(None, [str(model_folder)], out=out, **given)
    at_once = matrix.bench(None, [str(model_folder)], out=tmp_path / "whole", **given)
    assert on.losses == at_once.losses
    assert held[0].read_bytes().startswith(left)
    assert (out / "matrix.json").exists()


def test_contexts_that_are_cut_are_told(tmp_path: Path, domain_folder: Path) -> None:
    folder = str(write_model(tmp_path / "model", max_position_embeddings=16))
    file = jsonl(tmp_path / "asked.jsonl", [{**ASKED[0], "context": "a"}, *ASKED[1:3]])
    found = matrix.bench(None, [folder], sets=[str(file)], domain=str(domain_folder))
    (note,) = found.notes
    assert note == f"{file}: 2 of 3 items are longer than {folder} can read: cut from the left."
    assert note in printed(found)


def test_progress_is_told(model_folder: Path, domain_folder: Path, files: dict[str, str]) -> None:
    console = Console(width=200, record=True, force_terminal=False, file=io.StringIO())
    matrix.bench(
        None, [str(model_folder)], sets=[files["asked"]], domain=str(domain_folder),
        console=console,
    )  # fmt: skip
    assert f"{files['asked']}: {model_folder} (set 1 of 1)" in console.export_text()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"names": []}, "no model is given; give at least one"),
        ({"names": ["m", "m"]}, "the model m is named twice"),
        ({"sets": ""}, "no set of --matrix is given"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"on": "lambada"}, "--on lambada is none of the sets of --matrix; add it there too"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"sets": "domian"}, "Set 'domian' is unknown. Did you mean 'domain'"),
    ],
)
def test_bad_settings(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"names": ["m"], "sets": "code", "out": tmp_path / "out", **changed}
    with pytest.raises((BadInput, UnknownName)) as error:
        matrix.bench(None, given.pop("names"), **given)
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders(files: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other.jsonl", [])
    for out, told in (
        (other, "is a file. Give --out a folder"),
        (tmp_path, "holds other.jsonl and no scores of a benchmark"),
        (other / "out", "cannot be made: Not a directory"),
    ):
        with pytest.raises(BadInput, match=told):
            matrix.bench(None, [str(model_folder)], sets=[files["asked"]], out=out)


# The command line ----------------------------------------------------------------------------


def test_every_flag_arrives(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: dict[str, Any] = {}

    def stop(recipe: Any, names: list[str], console: object, **given: object) -> None:
        caught.update(given, names=names, recipe=recipe)
        raise llm_narrow.BadInput("far enough")

    monkeypatch.setattr("llm_narrow.matrix.bench", stop)
    line = "bench m n --matrix all --on mbpp-go --limit 3 --out o --domain d --batch-size 8 --length 64 --seed 1 --device cpu --dtype bfloat16"  # noqa: E501
    assert "far enough" in run(*line.split()).err
    recipe = caught.pop("recipe")
    assert caught == {
        "names": ["m", "n"], "sets": "all", "on": "mbpp-go", "limit": 3, "out": Path("o")
    }  # fmt: skip
    assert (recipe.domain.name, recipe.seed, recipe.device, recipe.dtype) == (
        "d", 1, "cpu", "bfloat16"
    )  # fmt: skip
    assert (recipe.blocks.batch_size, recipe.blocks.length) == (8, 64)
    assert "far enough" in run("bench", "m", "--matrix", "code").err
    assert caught["recipe"].domain.name == "python" and "limit" in caught

    monkeypatch.setattr("llm_narrow.harness.bench", stop)
    caught.clear()
    line = "bench m --lm-eval arc_easy --include-path i --limit 3 --out o --batch-size 8 --seed 1 --device cpu --dtype bfloat16 --trust-remote-code"  # noqa: E501
    assert "far enough" in run(*line.split()).err
    assert caught == {
        "recipe": None, "names": ["m"], "tasks": "arc_easy", "include_path": Path("i"), "limit": 3,
        "out": Path("o"), "batch_size": 8, "seed": 1, "device": "cpu", "dtype": "bfloat16",
        "trust_remote_code": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bench m --matrix all --tasks mbpp", "--tasks and --matrix are benchmarks of their own"),
        ("bench m --on mbpp-go", "--on does nothing alone. Give --matrix all too."),
        ("bench m --include-path x", "--include-path does nothing alone. Give --lm-eval"),
        ("bench m --matrix all --speed", "--speed does nothing with --matrix"),
        ("bench m --matrix all --no-speed", "--speed does nothing with --matrix"),
        ("bench m --matrix all --allow-unsandboxed", "--allow-unsandboxed does nothing with"),
        ("bench m --matrix all --k 1 --prompt raw", "--prompt and --k does nothing with --matrix"),
        ("bench m --lm-eval x --domain d", "--domain does nothing with --lm-eval"),
        ("bench m --lm-eval x --on d", "--on does nothing with --lm-eval"),
        ("bench m --tasks mbpp --on d", "--on is about held-out text"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(run: Any, line: str, told: str) -> None:
    refused(run(*line.split()), told)


def test_the_command_prints_tables_and_facts(
    run: Any, model_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    names = ["bench", model_folder, "--matrix", files["asked"], "--limit", "3", "-q"]
    done = run(*names)
    assert done.code == 0 and "Questions" in done.out and done.err == ""
    told = json.loads(run(*names, "--json", "--out", tmp_path / "o").out)
    assert told["choices"][0]["items"] == 3 and told["losses"] == []


def test_the_document_is_true(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands parse, its rows are sets, and it names all that matrix.json holds."""

    def stop(*args: object, **given: object) -> None:
        raise llm_narrow.BadInput("far enough")

    monkeypatch.setattr("llm_narrow.matrix.bench", stop)
    monkeypatch.setattr("llm_narrow.harness.bench", stop)
    text = (Path(__file__).parent.parent / "docs" / "matrix.md").read_text()
    lines = text.splitlines()
    commands = [line for line in lines if line.startswith("llm-narrow ")]
    assert len(commands) == 3
    for line in commands:
        assert "far enough" in run(*line.split()[1:]).err, line
    shown = [json.loads(line) for line in lines if line.startswith('{"')]
    assert Score.of(shown[0]).row() == shown[0]
    for row in shown[1:]:
        assert len(matrix_sets.load(str(jsonl(tmp_path / "rows.jsonl", [row]))).items) == 1
    one = Estimate(1.0, 0.5, 2.0)
    rows = [
        matrix_rows.LossRow("s", "prose", False, "m", "x", 1, 2, 3, one, one, "f"),
        matrix_rows.ChoiceRow("s", "m", "x", 1, 0.5, one, one, "f", one, one, 1, 2, 0.5),
        matrix_rows.Selectivity("m", "domain", OFF, one, one, 1.0, None, None),
    ]
    keys = {key for row in rows for key in row.to_dict() if not key.endswith(("_low", "_high"))}
    facts = matrix.Matrix({}, (), (), (), {}, tmp_path).facts()
    for key in (*keys, *facts, *matrix_sets.GROUPS, *matrix_sets.GROUPS["knowledge"], OFF):
        assert f"`{key}`" in text, key
