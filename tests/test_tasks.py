"""Problems from rows, programs from completions, and pass@k from a tiny and a perfect model."""

import gzip
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import write_model
from llm_narrow import passing, sandbox, tasks
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.passing import evaluate, pass_at_k
from llm_narrow.tasks import cut, load, parses, problems_of, program_of

HUMANEVAL = [
    {
        "task_id": f"Small/{n}",
        "prompt": f'import math\n\ndef add{n}(x):\n    """Add {n}."""\n',
        "entry_point": f"add{n}",
        "canonical_solution": f"    return math.floor(x) + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(3)
]
MBPP = [
    {
        "task_id": 7,
        "text": "Write a function to take the second number from the first.",
        "code": "def sum(a, b):\r\n    return a - b",
        "test_list": ["assert sum(5, 3) == 2", "assert sum(len([1]), 1) == 0"],
        "test_setup_code": "",
    },
    {
        "task_id": 8,
        "prompt": "Write a function to count.",
        "code": "class Node:\n    next = None\n\n"
        "def count(node):\n    return 1 + count(node.next) if node else 0\n",
        "test_list": ["assert count(root) == 2"],
        "test_setup_code": "root = Node()\nroot.next = Node()",
    },
]  # fmt: skip
ALL = problems_of([*HUMANEVAL, *MBPP], "rows")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_model(tmp_path_factory.mktemp("tiny") / "model")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Perfect:
    """Stands for a model: it writes what it was given for each problem, token by token."""

    def __init__(self, tokenizer: Any, written: dict[str, str]) -> None:
        self.tokenizer, self.written, self.batches = tokenizer, written, 0
        self.config, self.device, self.training = SimpleNamespace(eos_token_id=None), "cpu", False

    def eval(self) -> None: ...

    def train(self, training: bool) -> None: ...

    def generate(
        self, input_ids: Any, attention_mask: Any, generation_config: Any, stopping_criteria: Any
    ) -> torch.Tensor:
        self.batches += 1
        end = generation_config.eos_token_id[0]
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist()), "padded on the left"
            asked = self.tokenizer.decode(ids[mask.bool()])
            (name,) = [n for n, p in self.asked.items() if asked == p]
            answers.append([*self.tokenizer(self.written[name])["input_ids"], end])
        for step in range(generation_config.max_new_tokens):
            new = [[a[step] if step < len(a) else end] for a in answers]
            input_ids = torch.cat([input_ids, torch.tensor(new)], 1)
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids

    @property
    def asked(self) -> dict[str, str]:
        return {p.name: p.prompt.rstrip() for p in ALL}


def references() -> dict[str, str]:
    return {p.name: f"\n{p.reference}" for p in ALL}


def test_rows_of_both_forms():
    add, *_, minus, count = ALL
    assert [p.name for p in ALL] == ["Small/0", "Small/1", "Small/2", "MBPP/7", "MBPP/8"]
    assert add.prompt + str(add.reference) == add.prompt + "    return math.floor(x) + 0\n"
    assert add.tests.endswith("check(add0)\n")
    assert "Add 0." in add.question
    assert (minus.entry_point, count.entry_point) == ("sum", "count")
    assert minus.prompt.startswith('"""\nWrite a function to take')
    assert minus.prompt.endswith('assert sum(5, 3) == 2\n"""\n')
    assert minus.question.count("assert") == 2
    assert "\r" not in str(minus.reference)
    assert count.tests == "root = Node()\nroot.next = Node()\nassert count(root) == 2\n"


def test_references_pass_and_wrong_ones_do_not():
    assert {o.kind for o in tasks.check_references(ALL).values()} == {"passed"}
    for problem, other in itertools.pairwise([*ALL[:3], ALL[0]]):
        assert not tasks.outcome(problem, problem.prompt + str(other.reference)).passed


def test_all_that_rows_lack_is_told_at_once():
    rows = [
        {**HUMANEVAL[0], "test": None},
        {**HUMANEVAL[1], "test": "def check(:"},
        {**MBPP[0], "test_list": []},
        {**MBPP[0], "test_list": ["assert 1 == 1"]},
        {k: v for k, v in MBPP[0].items() if k != "task_id"},
        MBPP[0],
        MBPP[0],
        {"other": 1},
    ]
    with pytest.raises(BadInput) as error:
        problems_of(rows, "my.jsonl")
    told = str(error.value).splitlines()
    assert told[0] == "my.jsonl: 7 problems"
    for line, part in zip(
        told[1:],
        ["row 1: test missing", "row 2: test is not Python", "row 3: test_list must be a list",
         "row 4: test_list calls no function", "row 5: task_id is missing",
         "row 7: task_id 'MBPP/7' is given twice", "row 8: task_id, prompt, entry_point, test"],
        strict=True,
    ):  # fmt: skip
        assert part in line
    with pytest.raises(BadInput, match=r"my\.jsonl holds no problems"):
        problems_of([], "my.jsonl")


def test_files_and_folders(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in HUMANEVAL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(lines)
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = [load(str(tmp_path / name)) for name in ("data", "data/test.jsonl", "own.jsonl.gz")]
    assert found == [ALL[:3]] * 3
    (tmp_path / "bad.jsonl").write_text(lines + "nothing\n")
    with pytest.raises(BadInput, match="line 4 is no JSON object"):
        load(str(tmp_path / "bad.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-20])
    with pytest.raises(BadInput, match="cannot be unpacked"):
        load(str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(UnknownName, match="Did you mean 'humaneval'"):
        load("humanevl")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("    return 1\n\ndef other():", "    return 1\n"),
        ("\n    return 1\n# done", "\n    return 1"),
        ("\n\ndef add():\n    pass\n\ndef more():\n", "\n\ndef add():\n    pass\n"),
        ("    return 1", "    return 1"),
        ("", ""),
    ],
)
def test_completions_are_cut_at_the_first_stop(text, left):
    assert cut(text, tasks.HUMANEVAL_STOPS) == left


def test_chat_answers_become_programs():
    problem = ALL[1]
    whole = "def add1(x):\n    return math.floor(x) + 1"
    for answer in (
        f"Sure!\n```python\n{whole}\n```\nDone.",
        f"```\nprint('no')\n```\nthen\n```Python3\n{whole}\n```",
        f"```py\n{whole}",
        whole,
        "```python\n    return math.floor(x) + 1\n```",
    ):
        program = program_of(problem, answer, "chat")
        assert tasks.outcome(problem, program).passed, program
    assert program_of(ALL[3], "```python\ndef sum(a, b): pass\n```", "chat").startswith("def sum")


def test_parses():
    assert parses("x = '\\w'")
    assert not parses("x = ")
    assert not parses("x = '\0'")
    assert not parses("(" * 1000)


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


@pytest.mark.parametrize("batch_size", [1, 3])
def test_who_writes_the_reference_passes_all(tiny, batch_size):
    model = Perfect(tiny[1], references())
    found = evaluate(model, tiny[1], ALL, batch_size=batch_size)
    assert found.pass_at[1].value == 1.0
    assert (found.parsed.value, found.whole.value) == (1.0, 1.0)
    assert (found.problems, found.samples, model.batches) == (5, 1, math.ceil(5 / batch_size))
    assert found.tokens == sum(v.completion.tokens for v in found.verdicts) > 0
    assert json.loads(json.dumps(found.facts()))["pass_at"]["1"]["value"] == 1.0


def test_half_right_has_an_interval_and_why(tiny):
    written = {**references(), "Small/1": "\n    return 0", "MBPP/7": "\ndef sum(a, b:"}
    found = evaluate(Perfect(tiny[1], written), tiny[1], ALL)
    assert found.pass_at[1].value == pytest.approx(3 / 5)
    assert 0 <= found.pass_at[1].low < 3 / 5 < found.pass_at[1].high <= 1
    assert found.parsed.value == pytest.approx(4 / 5)
    why = {v.problem: (v.kind, v.detail) for v in found.verdicts}
    assert why["Small/1"] == ("failed", "AssertionError")
    assert why["MBPP/7"][1].startswith("SyntaxError")


def test_writing_on_after_the_answer_is_stopped(tiny):
    written = {k: v + "\nprint('and so on for long')\n" * 20 for k, v in references().items()}
    found = evaluate(Perfect(tiny[1], written), tiny[1], ALL[:4])
    assert found.pass_at[1].value == 1.0
    assert all(v.completion.whole for v in found.verdicts)
    assert max(v.completion.tokens for v in found.verdicts) < 150
    short = evaluate(Perfect(tiny[1], written), tiny[1], ALL[:4], max_new_tokens=3)
    assert (short.whole.value, short.pass_at[1].value) == (0.0, 0.0)


def test_samples_of_a_random_model(tiny):
    sampled = {"samples": 10, "temperature": 1.0, "max_new_tokens": 8, "batch_size": 8}
    found, again, other = (
        evaluate(*tiny, ALL[:2], seed=seed, **sampled, workers=2) for seed in (1, 1, 2)
    )
    texts = [[v.completion.text for v in one.verdicts] for one in (found, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 10
    assert set(found.pass_at) == {1, 10}
    assert found.pass_at[10].value == 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_is_completed_as_each_alone(tmp_path, kind):
    folder = write_model(tmp_path / kind, kind)
    model, tokenizer = (
        stock.from_pretrained(folder) for stock in (AutoModelForCausalLM, AutoTokenizer)
    )
    batch, alone = (
        evaluate(model, tokenizer, ALL, max_new_tokens=12, batch_size=size) for size in (5, 1)
    )
    assert [v.completion for v in batch.verdicts] == [v.completion for v in alone.verdicts]


def test_a_run_that_was_stopped_goes_on(tiny, tmp_path, monkeypatch):
    rows = tmp_path / "runs" / "rows.jsonl"
    settings: dict[str, Any] = {"rows": rows, "batch_size": 2, "identity": "abc"}
    stopping = Perfect(tiny[1], references())
    generate = stopping.generate

    def interrupted(**given: Any) -> torch.Tensor:
        if stopping.batches == 1:
            raise KeyboardInterrupt
        return generate(**given)

    monkeypatch.setattr(stopping, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopping, tiny[1], ALL, **settings)
    assert len(rows.read_text().splitlines()) == 3
    with rows.open("a") as file:
        file.write('{"problem": "Small/0", "sam')  # as a machine that lost power leaves it
    judged: list[str] = []
    run = passing.outcome

    def counted(problem: Any, *rest: Any, **given: Any) -> Any:
        judged.append(problem.name)
        return run(problem, *rest, **given)

    monkeypatch.setattr(passing, "outcome", counted)
    going_on = Perfect(tiny[1], references())
    found = evaluate(going_on, tiny[1], ALL, **settings)
    assert (going_on.batches, sorted(judged)) == (2, sorted(p.name for p in ALL))
    again = evaluate(Perfect(tiny[1], {}), tiny[1], ALL, **settings)
    assert len(judged) == 5
    assert again.verdicts == found.verdicts
    assert (again.tokens, again.pass_at) == (0, found.pass_at)
    with pytest.raises(BadInput, match=r"other settings[\s\S]*identity was abc, now def"):
        evaluate(going_on, tiny[1], ALL, **{**settings, "identity": "def"})
    other = tmp_path / "other.jsonl"
    other.write_text('{"loss": 1}\n')
    with pytest.raises(BadInput, match="holds no rows of programming problems"):
        evaluate(going_on, tiny[1], ALL, rows=other)


def test_chat(tiny):
    model, tokenizer = Perfect(tiny[1], {}), tiny[1]
    with pytest.raises(BadInput, match="no chat template; give the prompt 'completion'"):
        evaluate(model, tokenizer, ALL, prompt="chat")
    talking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    talking.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    written = {
        p.name: f" So:\n```python\n{p.prompt if p.prelude else ''}{p.reference}\n```\nGood luck!"
        for p in ALL
    }

    class Talking(Perfect):
        @property
        def asked(self) -> dict[str, str]:
            return {p.name: f"Q: {p.question}\nA:" for p in ALL}

    found = evaluate(Talking(talking, written), talking, ALL, prompt="chat")
    assert found.pass_at[1].value == 1.0
    assert all(v.completion.text.rstrip().endswith("```") for v in found.verdicts)


def test_a_prompt_that_fills_the_context(tmp_path):
    folder = write_model(tmp_path / "model", max_position_embeddings=40)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = {p.name: len(tokenizer(p.prompt.rstrip())["input_ids"]) for p in ALL}
    assert min(lengths.values()) < 40 < max(lengths.values())
    found = evaluate(model, tokenizer, ALL, batch_size=5)
    for verdict in found.verdicts:
        most = max(0, 40 - lengths[verdict.problem])
        assert verdict.completion.tokens <= most
        assert (verdict.completion.tokens > 0) == (most > 0)


def test_bad_settings_are_told_at_once(tiny):
    with pytest.raises(BadInput, match=r"samples must be at least 1, got 0[\s\S]*top_p must be"):
        evaluate(*tiny, ALL, samples=0, top_p=0)
    with pytest.raises(BadInput, match="5 samples at temperature 0 would all be the same"):
        evaluate(*tiny, ALL, samples=5)
    with pytest.raises(BadInput, match=r"batch_size must be at least 1[\s\S]*workers must be"):
        evaluate(*tiny, ALL, batch_size=0, workers=0)
    with pytest.raises(BadInput, match="no problems"):
        evaluate(*tiny, [])


def test_no_sandbox_is_told_before_anything_is_generated(tiny, monkeypatch):
    monkeypatch.setattr(sandbox, "_map_users", lambda process: b"refused\n")
    model = Perfect(tiny[1], references())
    with pytest.raises(BadInput, match=r"lacks user .*--allow-unsandboxed"):
        evaluate(model, tiny[1], ALL)
    assert model.batches == 0


@pytest.mark.real
@pytest.mark.parametrize(("name", "number"), [("humaneval", 164), ("mbpp", 500)])
def test_every_reference_solution_passes(name, number):
    found = load(name)
    outcomes = tasks.check_references(found, workers=2)
    assert len(outcomes) == len(found) == number
    assert [n for n, o in outcomes.items() if not o.passed] == []
    # The stops of the field, which a completion is cut at, cost one reference its second half.
    hurt = [p.name for p in found if cut(f"\n{p.reference}", p.stops) != f"\n{p.reference}"]
    assert hurt == (["MBPP/342"] if name == "mbpp" else [])
