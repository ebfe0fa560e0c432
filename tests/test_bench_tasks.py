"""`bench --tasks`: models that were taught answers, side by side; stopped, gone on, refused."""

import io
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import write_model
from llm_narrow import passing, sandbox, tasks
from llm_narrow.bench_tasks import Benched, bench
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.task_rows import difference, mcnemar, pass_at_k, share
from test_passing import TALK
from test_tasks import HUMANEVAL

ROWS = [
    *HUMANEVAL,
    {**HUMANEVAL[0], "task_id": "Small/text", "prompt": 'def say():\n    """Say hello."""\n',
     "entry_point": "say", "canonical_solution": "    return 'hello'\n",
     "test": "def check(candidate):\n    assert candidate() == 'hello'\n"},
]  # fmt: skip
WRONG = "    return 'no'\n"


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sets") / "small.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def taught(folder: Path, answers: dict[str, str], template: str | None = None) -> Path:
    """A tiny model that completes each prompt with its answer."""
    write_model(folder, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    texts = [tokenizer(p.rstrip() + "\n" + a)["input_ids"] + [end] for p, a in answers.items()]
    width = max(map(len, texts))
    ids = torch.tensor([text + [end] * (width - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (width - len(text)) for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    with torch.random.fork_rng():
        for _ in range(200):
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.02:
                break
    model.save_pretrained(folder)
    if template:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template that knows all answers, when it is asked in raw form."""
    answers = {row["prompt"]: row["canonical_solution"] for row in ROWS}
    return taught(tmp_path_factory.mktemp("models") / "whole", answers, TALK)


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model knows half of the answers and has no chat template."""
    answers = {row["prompt"]: row["canonical_solution"] for row in ROWS[:2]}
    answers |= {row["prompt"]: WRONG for row in ROWS[2:]}
    run = tmp_path_factory.mktemp("models") / "run"
    taught(run / "model", answers)
    return run


@pytest.fixture
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is run: those with an even number of characters pass."""

    def judge(problem: Any, program: str, **given: Any) -> sandbox.Outcome:
        return sandbox.Outcome("failed" if len(program) % 2 else "passed")

    monkeypatch.setattr(passing, "outcome", judge)


def printed(found: Benched) -> str:
    console = Console(width=500)
    with console.capture() as caught:
        console.print(found.shown())
    return caught.get()


def same(found: Benched) -> list[dict[str, Any]]:
    """All that has to be the same when it is done again: not the speed."""
    return [
        {key: value for key, value in row.to_dict().items() if key != "tokens_per_second"}
        for row in found.rows
    ]


def test_whole_and_narrowed_side_by_side(whole, narrowed, problems, tmp_path, monkeypatch):
    names = [str(whole), str(narrowed)]
    how: dict[str, Any] = {"sets": str(problems), "max_new_tokens": 40, "out": tmp_path / "out"}
    found = bench(None, names, **how)
    raw, chat, narrow = sorted(found.rows, key=lambda r: (r.model != names[0], r.prompt == "chat"))
    assert [(r.model, r.prompt) for r in (raw, chat, narrow)] == [
        (names[0], "raw"), (names[0], "chat"), (names[1], "raw")
    ]  # fmt: skip
    assert [r.pass_at[1].value for r in (raw, chat, narrow)] == [1.0, 0.0, 0.5]
    assert (round(raw.pass_at[1].low, 3), raw.pass_at[1].high) == (0.510, 1.0)  # Wilson, 4 of 4
    assert (raw.difference, chat.difference) == (None, None)
    compared = narrow.difference
    assert compared is not None
    assert compared.pass_at[1].value == -0.5
    assert -1 <= compared.pass_at[1].low < -0.5 < compared.pass_at[1].high <= 0
    assert (compared.won, compared.lost, compared.p) == (0, 2, 0.5)
    assert (raw.kinds, narrow.kinds) == ({"passed": 4}, {"passed": 2, "failed": 2})
    assert (raw.parsed.value, raw.whole.value, raw.problems) == (1.0, 1.0, 4)
    assert raw.tokens_per_second and raw.tokens_per_second > 0
    assert found.notes == (f"{names[1]} has no chat template: asked in raw form only.",)

    facts = json.loads(json.dumps(found.facts()))
    assert facts == json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert facts["sandboxed"] is True and facts["protections"]["network"] is True
    assert facts["problems_sha256"] == {str(problems): tasks.digest(tasks.load(str(problems)))}
    by = {(r["model"], r["prompt"]): r for r in facts["rows"]}
    assert by[names[1], "raw"]["pass_at_1_difference"] == -0.5
    assert {r["sha256"] for r in facts["rows"]} == {raw.sha256, narrow.sha256}
    text = printed(found)
    for part in ("4 problems, greedy", "100.0 [51.0, 100.0]", "-50.0 [-100.0, +0.0]", "0/2, 0.5",
                 "Sandbox: all protections are active: user, files", *found.notes):  # fmt: skip
        assert part in text, part

    monkeypatch.setattr(passing, "_generated", None)  # all is there already
    assert bench(None, names, **how) == found


def test_samples_and_pass_at_k(whole, narrowed, problems, tmp_path, unjudged):
    names = [str(whole), str(narrowed)]
    how: dict[str, Any] = {"sets": str(problems), "max_new_tokens": 12, "prompt": "raw"}
    sampled = {"samples_per_task": 4, "temperature": 1.5}
    found = bench(None, names, **how, **sampled, k="1,4", limit=3, out=tmp_path / "out")
    assert [(r.temperature, r.samples) for r in found.rows] == [(0, 1), (0, 1), (1.5, 4), (1.5, 4)]
    for row in found.rows[2:]:
        lines = (tmp_path / "out" / row.answers).read_text().splitlines()
        rows = [json.loads(line) for line in lines[1:]]
        judged = [r for r in rows if "kind" in r]
        right = {r["problem"]: 0 for r in judged}
        for r in judged:
            right[r["problem"]] += r["kind"] == "passed"
        assert (len(judged), len(right)) == (12, 3)
        assert row.pass_at[1].value == pytest.approx(sum(right.values()) / 12)
        assert row.pass_at[4].value == pytest.approx(sum(map(bool, right.values())) / 3)
        assert row.to_dict()["pass_at_4_low"] == row.pass_at[4].low
    assert 0 < sum(r.pass_at[1].value for r in found.rows[2:]) < 2
    compared = found.rows[3].difference
    assert compared is not None and set(compared.pass_at) == {1, 4} and compared.p is None
    assert "4 samples at temperature 1.5" in printed(found)
    usual = bench(None, names[:1], **how, samples_per_task=5)
    assert [set(r.pass_at) for r in usual.rows] == [{1}, {1, 5}]
    assert usual.rows[1].temperature == 0.8
    assert usual.folder.name == "answers" and list(usual.folder.iterdir())


def test_a_benchmark_that_is_killed_goes_on_to_the_same_result(model_folder, problems, tmp_path):
    """Killed among the completions, then among the verdicts, of the sampled answers."""
    arguments: dict[str, Any] = {
        "sets": str(problems), "prompt": "raw", "samples_per_task": 4, "temperature": 1.0,
        "max_new_tokens": 32, "batch_size": 1, "limit": 2,
    }  # fmt: skip
    out = tmp_path / "out"
    code = (
        "import json, sys; from pathlib import Path; from llm_narrow.bench_tasks import bench\n"
        "bench(None, [sys.argv[1]], out=Path(sys.argv[2]), **json.loads(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(model_folder), str(out), json.dumps(arguments)]
    left = b""
    for moment, other in (('"text"', '"kind"'), ('"kind"', None)):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            file = _wait(lambda: next(out.glob("*-t1-*"), None), process)
            _wait(lambda f=file, m=moment: f.read_bytes().count(m.encode()) > 1, process)
            process.send_signal(signal.SIGKILL)
        held = file.read_bytes()
        assert held.startswith(left)
        left = held[: held.rfind(b"\n") + 1]
        assert left.count(moment.encode()) < 8, "not in the middle"
        assert other is None or other.encode() not in left
    assert not (out / "tasks.json").exists()

    goes_on = bench(None, [str(model_folder)], out=out, **arguments)
    at_once = bench(None, [str(model_folder)], out=tmp_path / "at_once", **arguments)
    assert same(goes_on) == same(at_once)
    assert file.read_bytes().startswith(left)
    for row in goes_on.rows:
        first, second = (
            [json.loads(line) for line in (folder / row.answers).read_text().splitlines()]
            for folder in (out, tmp_path / "at_once")
        )
        assert _untimed(first) == _untimed(second)


def _wait(seen: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    ends = time.monotonic() + 240
    while not (found := seen()):
        assert process.poll() is None and time.monotonic() < ends, "ended before it was killed"
        time.sleep(0.003)
    return found


def _untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_progress_is_told(model_folder, problems, unjudged, monkeypatch):
    ticks = iter(range(0, 100_000, 20))
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr("llm_narrow.progress.time", clock)
    console = Console(width=200, record=True, force_terminal=False, file=io.StringIO())
    bench(
        None,
        [str(model_folder)],
        sets=str(problems),
        max_new_tokens=4,
        batch_size=3,
        console=console,
    )
    told = console.export_text()
    assert f"small.jsonl: {model_folder}, raw, greedy (1 of 1)" in told
    assert "completing in batches: 1 of 2 in 20 s, about 20 s left" in told
    assert "running programs: 4 of 4 in" in told
    assert "NOT PROTECTED" not in told


def test_prompts_over_the_context_are_told(tmp_path, problems, unjudged):
    folder = str(write_model(tmp_path / "model", max_position_embeddings=39))
    found = bench(None, [folder], sets=str(problems), max_new_tokens=4)
    (row,) = found.rows
    assert row.too_long == ("Small/0", "Small/1", "Small/2")
    assert row.kinds["too long"] == 3
    told = f"3 prompts (raw) fill the context of {folder} and count as failed: Small/0, Small/1, S"
    assert told in found.notes[1]
    assert told in printed(found)
    with pytest.raises(BadInput, match=r"All 3 prompts fill the 39 positions of .*/model: the sho"):
        bench(None, [folder], sets=str(problems), limit=3)


def test_a_chat_prompt_needs_a_template(narrowed, problems):
    with pytest.raises(BadInput, match="run has no chat template: give --prompt raw"):
        bench(None, [str(narrowed)], sets=str(problems), prompt="chat")


def test_without_protections(model_folder, problems, tmp_path, unjudged, monkeypatch):
    how: dict[str, Any] = {"sets": str(problems), "max_new_tokens": 4, "out": tmp_path / "out"}
    protected = bench(None, [str(model_folder)], **how)
    monkeypatch.setattr(sandbox, "_map_users", lambda process: b"refused\n")
    with pytest.raises(BadInput, match=r"lacks user .*--allow-unsandboxed"):
        bench(None, [str(model_folder)], **{**how, "out": tmp_path / "none"})
    assert not (tmp_path / "none").exists()
    console = Console(width=200, record=True, file=io.StringIO())
    bare = bench(None, [str(model_folder)], **how, allow_unsandboxed=True, console=console)
    assert "NOT PROTECTED by user, files" in console.export_text()
    assert bare.facts()["sandboxed"] is False
    assert "Sandbox: NOT active: user (" in printed(bare)
    assert bare.rows[0].answers != protected.rows[0].answers  # kept apart


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"names": []}, "no model is given; give at least one"),
        ({"names": ["m", "m"]}, "the model m is named twice"),
        ({"sets": ""}, "no set of --tasks is given"),
        ({"sets": "mbpp,mbpp"}, "the set of --tasks mbpp is named twice"),
        ({"prompt": "told"}, "--prompt must be chat, raw or both, got 'told'"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"samples_per_task": 0}, "--samples-per-task must be at least 1, got 0"),
        ({"samples_per_task": 2, "temperature": 0.0}, "--temperature must be above 0, got 0;"),
        ({"temperature": 0.5}, "--temperature is about samples: give --samples-per-task too"),
        ({"k": [5]}, "--k is about samples: give --samples-per-task too"),
        ({"k": "1,9", "samples_per_task": 5}, "--k must be from 1 to --samples-per-task, which is"),
        ({"k": "1;9", "samples_per_task": 5}, "--k must be whole numbers with commas"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
    ],
)
def test_bad_settings(changed, told, tmp_path):
    given = {"names": ["m"], "sets": "humaneval", "out": tmp_path / "out", **changed}
    with pytest.raises((BadInput, UnknownName)) as error:
        bench(None, given.pop("names"), **given)
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_sets_models_and_folders(model_folder, problems, tmp_path):
    with pytest.raises(UnknownName, match="Did you mean 'mbpp'"):
        bench(None, [str(model_folder)], sets="mbp")
    with pytest.raises(UnknownName, match="Did you mean 'smollm2-135m'"):
        bench(None, ["smollm2-135n"], sets=str(problems))
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text(json.dumps({"task_id": "a", "prompt": "def f():\n"}))
    with pytest.raises(BadInput, match="line 1: entry_point, test missing; rows have task_id"):
        bench(None, [str(model_folder)], sets=str(lacking))
    for out, told in ((lacking, "is a file"), (tmp_path, "holds lacking.jsonl and no answers")):
        with pytest.raises(BadInput, match=told):
            bench(None, [str(model_folder)], sets=str(problems), out=out)
    with pytest.raises(BadInput, match="cannot be made: Not a directory"):
        bench(None, [str(model_folder)], sets=str(problems), out=lacking / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["lacking.jsonl"]


# Estimates -----------------------------------------------------------------------------------


def test_pass_at_k_by_hand_and_by_drawing():
    assert pass_at_k(1, 1, 1) == 1.0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # 3 of the 10 pairs have none
    assert pass_at_k(5, 4, 2) == 1.0
    for n, c, k in itertools.product([6], range(7), range(1, 7)):
        groups = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, groups)) / len(groups))
    with pytest.raises(BadInput, match="k must be from 1"):
        pass_at_k(3, 1, 4)


def test_intervals():
    nine = share([1.0] * 9 + [0.0] * 51)
    assert (round(nine.low, 4), round(nine.high, 4)) == (0.0810, 0.2611)  # Wilson, by hand
    none = share([0.0] * 10)
    assert (none.low, round(none.high, 4)) == (0.0, 0.2775)  # z² / (n + z²)
    parts = share([0.5, 0.25, 1.0, 0.0])
    assert 0 <= parts.low < parts.value == 0.4375 < parts.high <= 1


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 2) == mcnemar(2, 0) == 0.5
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    assert mcnemar(5, 5) == 1.0
    assert 0 < mcnemar(900, 1100) < 1e-4


def test_a_difference_is_paired():
    def verdicts(*passed: bool) -> list[passing.Verdict]:
        wrote = passing.Completion("", 0, whole=True)
        return [
            passing.Verdict(str(n), 0, "passed" if yes else "failed", "", True, wrote)
            for n, yes in enumerate(passed)
        ]

    first, second = verdicts(*[True, False] * 10), verdicts(*[True, False] * 9, False, False)
    alike = difference(first, first)
    assert (alike.pass_at[1].low, alike.pass_at[1].high, alike.p) == (0.0, 0.0, 1.0)
    less = difference(first, second)
    assert (less.won, less.lost, less.pass_at[1].value) == (0, 1, pytest.approx(-0.05))
    assert -0.2 < less.pass_at[1].low < 0 == less.pass_at[1].high  # unpaired it would be far wider
