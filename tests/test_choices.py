"""Likelihoods: encoded as lm-evaluation-harness does it, and the same in batches as alone."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import sentences, write_model
from llm_narrow import choices, harness
from llm_narrow.choices import Pair, Window, encoded, likelihoods
from llm_narrow.errors import BadInput, UnknownName
from tiny import CONFIGS, VOCAB, tiny

MANY = 1000  # more positions than any text here has tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("tokenizer") / "m"))


def windows(seed: int = 0, *, shared: int = 20, number: int = 9) -> list[Window]:
    """Windows that begin alike, of different lengths, two of which differ in the last id only."""
    chance = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=chance).tolist())

    start = ids(shared)
    found = [Window(start + ids(4 + 3 * n), 1 + n) for n in range(number)]
    last = found[-1]
    return [*found, Window((*last.ids[:-1], (last.ids[-1] + 1) % VOCAB), last.scored)]


@torch.no_grad()
def alone(model: Any, window: Window) -> tuple[float, bool]:
    """The nats of one window by itself, from plain logits, and whether all is the likeliest."""
    ids = torch.tensor([window.ids])
    scored = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    chosen = scored[-window.scored :]
    right = ids[0, -window.scored :]
    nats = -chosen.gather(1, right[:, None]).sum()
    return float(nats), bool((chosen.argmax(-1) == right).all())


@pytest.mark.parametrize("kind", CONFIGS)
def test_batches_change_nothing(kind: str) -> None:
    model = tiny(kind)
    found = windows()
    expected = [alone(model, window) for window in found]
    for size in (1, 3, len(found)):
        told = [
            one
            for at in range(0, len(found), size)
            for one in likelihoods(model, [[window] for window in found[at : at + size]])
        ]
        assert [one.nats for one in told] == pytest.approx([n for n, _ in expected], rel=2e-5)
        assert [one.greedy for one in told] == [greedy for _, greedy in expected]


def test_what_is_shared_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal inputs and common beginnings; without that it comes to the same."""
    model, found = tiny("llama"), windows()
    fed: list[int] = []

    def count(module: Any, args: Any, given: Any) -> None:
        fed.append(given["input_ids"].numel())

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    shared = likelihoods(model, [[window] for window in found])
    with_sharing = sum(fed)
    fed.clear()
    monkeypatch.setattr(choices, "WORTHWHILE", MANY)
    apart = likelihoods(model, [[window] for window in found])
    assert [one.nats for one in shared] == pytest.approx([one.nats for one in apart], rel=1e-5)
    widest, rows = len(found[-1].ids) - 1, len(found) - 1
    probes = 2 * 8  # body alone, and whole
    assert sum(fed) == rows * widest + probes
    assert with_sharing == 20 + rows * (widest - 20) + probes


def test_greedy_is_told() -> None:
    model = tiny("llama")
    ids = list(windows()[0].ids[:6])
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % VOCAB]
    told = likelihoods(model, [[Window(tuple(ids), 3)], [Window(tuple(wrong), 3)]])
    assert [one.greedy for one in told] == [True, False]
    assert [one.tokens for one in told] == [3, 3]


def test_a_body_that_is_not_all_is_not_taken_apart() -> None:
    """Cohere scales its logits after the head: they come from the whole model."""
    model = tiny("cohere", logit_scale=0.3)
    found = windows()[:3]
    told = likelihoods(model, [[window] for window in found])
    assert [one.nats for one in told] == pytest.approx(
        [alone(model, w)[0] for w in found], rel=2e-5
    )


# Encoding ------------------------------------------------------------------------------------


def test_spaces_belong_to_what_follows(tokenizer: Any) -> None:
    plain = encoded(tokenizer, Pair("the unit", " score"), MANY)
    assert encoded(tokenizer, Pair("the unit ", "score"), MANY) == plain
    (window,) = plain
    assert list(window.ids) == tokenizer.encode("the unit score")
    assert window.scored == len(window.ids) - len(tokenizer.encode("the unit"))


def test_a_text_alone_follows_what_begins_texts(tokenizer: Any) -> None:
    own = tokenizer.encode("score", add_special_tokens=False)
    for context in ("", " "):
        (window,) = encoded(tokenizer, Pair(context, "score"), MANY)
        spaced = tokenizer.encode(f"{context}score", add_special_tokens=False)
        assert window == Window((tokenizer.eos_token_id, *spaced), len(spaced))
    tokenizer.bos_token = "<s>"
    try:
        (window,) = encoded(tokenizer, Pair("", "score"), MANY)
        assert window.ids == (tokenizer.bos_token_id, *own)
        assert encoded(tokenizer, Pair("", "<s>score"), MANY) == [window]
    finally:
        tokenizer.bos_token = None


def test_what_is_too_long_is_cut_from_the_left(tokenizer: Any) -> None:
    (whole,) = encoded(tokenizer, Pair("the unit group score keep", " narrow"), MANY)
    (cut,) = encoded(tokenizer, Pair("the unit group score keep", " narrow"), 3)
    assert cut == Window(whole.ids[-4:], whole.scored, len(whole.ids) - 4)
    assert whole.cut == 0 < cut.cut


@pytest.mark.parametrize("most", [1, 3, 7])
def test_windows_of_a_long_text_score_each_token_once(tokenizer: Any, most: int) -> None:
    text = sentences(5, 1)
    ids = (tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False))
    found = encoded(tokenizer, Pair("", text), most)
    assert sum(window.scored for window in found) == len(ids) - 1
    assert all(len(window.ids) <= most + 1 for window in found)
    scored = [token for window in found for token in window.ids[len(window.ids) - window.scored :]]
    assert tuple(scored) == ids[1:]
    assert all(len(w.ids) == most + 1 for w in found[:-1])
    assert len(found) == math.ceil((len(ids) - 1) / most) > 1


def test_texts_without_tokens_are_refused(tokenizer: Any) -> None:
    with pytest.raises(BadInput, match=r"has no token of its own\. Give texts of at least one"):
        encoded(tokenizer, Pair("the unit", ""), MANY)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token=None)
    with pytest.raises(BadInput, match="neither a beginning-of-text nor an end-of-text token"):
        encoded(bare, Pair("", "score"), MANY)


def test_a_long_text_is_the_sum_of_its_windows(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", max_position_embeddings=16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = encoded(tokenizer, Pair("", sentences(3, 4)), choices.positions(model))
    (told,) = likelihoods(model, [found])
    assert len(found) > 3
    assert told.nats == pytest.approx(sum(alone(model, window)[0] for window in found), rel=1e-5)
    assert told.tokens == sum(window.scored for window in found)


# lm-evaluation-harness itself ------------------------------------------------------------------

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


def write_task(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> None:
    """A multiple-choice task of lm-evaluation-harness on a file of its own."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own_choices", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], **changes,
    }  # fmt: skip
    (folder / "own.yaml").write_text(json.dumps(task))  # JSON is YAML


def questions(number: int) -> list[dict[str, Any]]:
    """Questions whose contexts are of different lengths, some with a space at the end."""
    lines = sentences(11, 5 * number).splitlines()
    return [
        {"context": "\n".join(lines[5 * n : 5 * n + n % 4 + 1]) + " " * (n % 3 == 0),
         "choices": [f"{w} {'é' * n}" for w in ("unit", "score keep", "code def return")],
         "answer": n % 3}
        for n in range(number)
    ]  # fmt: skip


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_runs_and_finds_the_same(model_folder: Path, tmp_path: Path) -> None:
    from llm_narrow import matrix

    rows = questions(20)
    write_task(tmp_path / "tasks", rows)
    given: dict[str, Any] = {"include_path": tmp_path / "tasks", "out": tmp_path / "out"}
    found = harness.bench(None, [str(model_folder)], tasks="own_choices", **given)
    theirs = found.results[str(model_folder)]["own_choices"]
    ours = matrix.bench(
        None, [str(model_folder)], sets=str(tmp_path / "tasks" / "rows.jsonl"), out=tmp_path / "m"
    )
    (row,) = ours.choices
    assert (row.acc.value, row.items) == (theirs["acc,none"], 20)
    assert row.acc_norm is not None and row.acc_norm.value == theirs["acc_norm,none"]
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text())["results"]
    with pytest.raises(UnknownName, match=r"'own_choice' is unknown\. Did you mean 'own_choices'"):
        harness.bench(None, [str(model_folder)], tasks="own_choice", **given)


@needs_lm_eval
@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_the_script_that_compares(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lm-eval's own task files, on the rows of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples" / "bench"))
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("against_lm_eval")
    names = ["boolq", "piqa", "lambada_text"]
    script.main(["--model", str(model_folder), "--items", "3", "--tasks", ",".join(names),
                 "--out", "out/lm_eval"])  # fmt: skip
    found = json.loads(Path("out/lm_eval.json").read_text())
    assert [row["task"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert row["ours"] == pytest.approx(row["theirs"], abs=1e-5)
        assert row["largest_difference"] < 1e-2 and row["chosen_alike"] == 3
    assert "| piqa | 3 | 6 | acc_norm |" in Path("out/lm_eval.md").read_text()


def test_lm_eval_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BadInput, match=r"which is not installed \(No module named 'lm_eval'.\) In"):
        harness.bench(None, ["m"], tasks="arc_easy")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tasks": ""}, "no task of --lm-eval is given"),
        ({"names": []}, "no model is given"),
        ({"names": ["m", "m"]}, "a model is named twice"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"include_path": Path("nowhere")}, "--include-path nowhere is no folder"),
    ],
)
def test_bad_settings_of_lm_eval(changed: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"names": ["m"], "tasks": "arc_easy", **changed}
    with pytest.raises(BadInput, match=told):
        harness.bench(None, given.pop("names"), **given)
