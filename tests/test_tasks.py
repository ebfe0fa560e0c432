"""Problems from rows and files, and programs from completions."""

import gzip
import itertools
import json

import pytest

from llm_narrow import tasks
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.tasks import answered, cut, load, parses, problems_of, program_of

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
        {"task_id": 9, "other": 1},
    ]
    with pytest.raises(BadInput) as error:
        problems_of(rows, "my.jsonl")
    told = str(error.value).splitlines()
    assert told[0] == "my.jsonl: 7 problems"
    for line, part in zip(
        told[1:],
        ["row 1: test missing", "row 2: test is not Python", "row 3: test_list must be a list",
         "row 4: test_list calls no function", "row 5: task_id missing",
         "row 7: task_id 'MBPP/7' is given twice", "row 8: prompt, entry_point, test missing;"],
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
    lacking = json.dumps({"task_id": 1, "test_list": ["assert f(1) == 1"]})
    (tmp_path / "bad.jsonl").write_text(f"{lines}nothing\n\n[1]\n{lacking}\n")
    with pytest.raises(BadInput) as error:
        load(str(tmp_path / "bad.jsonl"))
    told = [line.strip() for line in str(error.value).splitlines()]
    assert told[0].endswith("bad.jsonl: 3 problems")
    assert told[1].startswith("line 4: no JSON object")
    assert told[2].startswith("line 6: no JSON object")
    assert told[3].startswith("line 7: text or prompt missing; rows have")
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
        f"```sh\npip install math\n```\nthen\n```python\n{whole}\n```",
        whole,
        "```python\n    return math.floor(x) + 1\n```",
    ):
        program = program_of(problem, answer, "chat")
        assert tasks.outcome(problem, program).passed, program
    assert program_of(ALL[3], "```python\ndef sum(a, b): pass\n```", "chat").startswith("def sum")


def test_an_answer_is_there_when_the_block_with_it_is_closed():
    whole = "```python\ndef add1(x):\n    return 2\n```"
    assert answered(ALL[1], f"So:\n{whole}")
    assert answered(ALL[1], f"```sh\npip\n```\nthen\n{whole}\nAnd ```")
    for text in ("So", whole[:-3], "```sh\npip\n```", "```\ndef add2(x): pass\n```\n"):
        assert not answered(ALL[1], text)


def test_the_digest_is_of_all_that_is_asked_and_tested():
    assert tasks.digest(ALL) == tasks.digest(problems_of([*HUMANEVAL, *MBPP], "elsewhere"))
    changed = {**HUMANEVAL[0], "test": "def check(candidate):\n    assert True\n"}
    assert tasks.digest(problems_of([changed, *HUMANEVAL[1:], *MBPP], "rows")) != tasks.digest(ALL)


def test_parses():
    assert parses("x = '\\w'")
    assert not parses("x = ")
    assert not parses("x = '\0'")
    assert not parses("(" * 1000)


@pytest.mark.long
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
