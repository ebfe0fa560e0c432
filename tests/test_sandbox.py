"""The sandbox against hostile programs: none escapes, none wins; and what is honest passes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_narrow import sandbox
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.sandbox import ESSENTIAL, FURTHER, Limits, protections, run

HOSTILE = Path(__file__).with_name("hostile")
SMALL = Limits(
    cpu_seconds=2, wall_seconds=15, memory=256 << 20, file_size=12 << 20, folder=24 << 20
)
SHORT = Limits(cpu_seconds=1, wall_seconds=4)
FAILED, TIMED, MEMORY = {"failed"}, {"timed out"}, {"out of memory"}
ANSWER = "assert solve(3) == 123456"


@dataclass(frozen=True)
class Case:
    """A hostile program, and what is to come of it."""

    name: str
    kinds: set[str]
    tests: str = "assert False"
    limits: Limits = SMALL
    opened: tuple[str, ...] = ()  # with these protections off it does what it is after
    wins: bool = False  # in a process together with its tests it passes


CASES = [
    Case("fork_bomb", FAILED, opened=("limits",)),
    Case("thread_bomb", {"failed", "out of memory"}, opened=("limits", "memory")),
    Case("memory_bomb", MEMORY, opened=("limits", "memory")),
    Case("memory_of_many", MEMORY, opened=("memory",)),
    Case("memory_hidden", FAILED, opened=("calls", "ipc")),
    Case("zip_bomb", MEMORY, opened=("limits", "memory")),
    Case("endless_output", {"too much output"}),
    Case("endless_loop", TIMED, limits=SHORT),
    Case("endless_sleep", TIMED, limits=SHORT),
    Case("delete_files", FAILED, opened=("files",)),
    Case("write_files", FAILED, opened=("files",)),
    Case("write_library", FAILED),
    Case("read_secret", FAILED, opened=("files",)),
    Case("symlinks", FAILED, opened=("files",)),
    Case("huge_file", FAILED, opened=("limits",), limits=Limits(file_size=12 << 20)),
    Case("many_files", FAILED, opened=("files",)),
    Case("read_environment", FAILED, opened=("environment",)),
    Case("read_parent", FAILED, opened=("processes", "user")),
    Case("read_first", FAILED),
    Case("signal_process", FAILED, opened=("processes",)),
    Case("signal_all", FAILED),
    Case("network", FAILED, opened=("network",)),
    Case("local_socket", FAILED, opened=("network",)),
    Case("trace", FAILED, opened=("calls",)),
    Case("new_namespace", FAILED, opened=("calls",)),
    Case("clone_namespace", FAILED, opened=("calls",)),
    Case("mount", FAILED, opened=("capabilities",)),
    Case("privileges", FAILED, opened=("privileges",)),
    Case("print_passed", FAILED, ANSWER),
    Case("exit_zero", FAILED, ANSWER, wins=True),
    Case("exit_politely", FAILED, ANSWER, wins=True),
    Case("exit_at_once", FAILED, ANSWER, wins=True),
    Case("stop_iteration", FAILED, "assert all(map(solve, [1, 2]))", wins=True),
    Case("own_equality", FAILED, ANSWER, wins=True),
    Case("own_number", FAILED, ANSWER, wins=True),
    Case("own_method", FAILED, "assert solve(3).startswith('abc')", wins=True),
    Case("no_assertions", FAILED, ANSWER, wins=True),
    Case("patched_library", FAILED, "import math\nassert math.isclose(solve(3), 9)", wins=True),
    Case("read_frames", FAILED, ANSWER, wins=True),
    Case("write_pipes", FAILED, ANSWER, wins=True),
    Case("close_pipes", FAILED, ANSWER),
    Case("answer_ahead", FAILED, ANSWER),
    Case("answer_nonsense", FAILED, ANSWER),
    Case("answer_deep", FAILED, ANSWER),
    Case("answer_long", FAILED, ANSWER),
    Case("answer_memory", MEMORY, "assert sorted(solve(3)) == 5"),
    Case("unpickled", FAILED, "import copy\nassert copy.deepcopy(solve(3)) == 5", wins=True),
    Case("raise_own", FAILED, "try:\n    assert solve(3) == 5\nexcept Exception:\n    pass"),
]


@pytest.fixture(scope="module", autouse=True)
def boxed() -> None:
    """These tests need a machine that allows what the sandbox is made of."""
    if lacking := [f"{p.name}: {p.why_not}" for p in protections() if not p.active]:
        pytest.skip(f"this machine does not allow it: {', '.join(lacking)}")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What hostile programs are after, all of it made for them: nothing else is in reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    file = folder / "file"
    file.write_text("precious")
    file.chmod(0o666)
    secret = f"secret-{secrets.token_hex(8)}"
    monkeypatch.setenv("NARROW_TEST_TOKEN", secret)
    as_nobody = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as local,
        subprocess.Popen(["/bin/sleep", "60"], env={"TOKEN": secret}, **as_nobody) as process,
    ):
        local.bind(f"\0{secret}")
        local.listen()
        yield {
            "file": str(file), "secret": secret, "port": listener.getsockname()[1],
            "socket": secret, "process": process.pid, "name": secret[-8:],
        }  # fmt: skip
        process.kill()
    shutil.rmtree(folder)


def program(name: str, given: dict[str, Any]) -> str:
    return f"GIVEN = {given!r}\n{(HOSTILE / name).with_suffix('.py').read_text()}"


def as_was(given: dict[str, Any]) -> bool:
    """Whether nothing outside was touched."""
    file = Path(given["file"])
    alive = psutil.Process(given["process"]).status() != psutil.STATUS_ZOMBIE
    return alive and os.listdir(file.parent) == ["file"] and file.read_text() == "precious"


def test_every_hostile_program_has_a_case():
    named = [*(case.name for case in CASES), "outlive"]
    assert sorted(named) == sorted(file.stem for file in HOSTILE.glob("*.py"))
    assert len(named) >= 20


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_none_escapes_and_none_wins(case, given):
    outcome = run(
        program(case.name, given), case.tests, entry_point=_entry(case), limits=case.limits
    )
    assert outcome.kind in case.kinds, outcome
    assert "ESCAPED" not in outcome.output, outcome
    assert len(outcome.output) <= case.limits.output
    assert outcome.seconds < case.limits.wall_seconds + 5
    assert as_was(given)


def _entry(case: Case) -> str:
    return "solve" if "solve" in case.tests else ""


@pytest.mark.parametrize("case", [c for c in CASES if c.opened], ids=lambda c: c.name)
def test_it_is_the_protection_that_holds(case, given):
    """Without the protection the same program does what it is after, to the decoys above."""
    outcome = run(
        program(case.name, given), limits=case.limits, without=case.opened, allow_unsandboxed=True
    )
    assert "ESCAPED" in outcome.output, outcome


@pytest.mark.parametrize("case", [c for c in CASES if c.wins], ids=lambda c: c.name)
def test_a_program_beside_its_tests_would_win(case, given):
    """The naive way: program and tests in one process, which passed if it ended with zero."""
    whole = f"{program(case.name, given)}\n{case.tests}\n"
    naive = subprocess.run([sys.executable, "-c", whole], capture_output=True, timeout=60)
    assert naive.returncode == 0, naive.stderr


@pytest.mark.parametrize("open_box", [False, True], ids=["boxed", "open"])
def test_nothing_outlives_its_box(given, open_box):
    def left() -> list[int]:
        return [p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == given["name"]]

    run(
        program("outlive", given),
        without=("processes",) if open_box else (),
        allow_unsandboxed=open_box,
    )
    found = left()
    for process in found:
        os.kill(process, 9)  # ours, by the name that only it bears
    assert bool(found) == open_box


def test_the_caller_may_have_what_the_program_has_not():
    """A bomb of threads within the limits of a box leaves the others room: they run together."""
    honest = "def solve(x):\n    return x + 1"
    with ThreadPoolExecutor(4) as pool:
        bombs = [pool.submit(run, (HOSTILE / "fork_bomb.py").read_text()) for _ in range(2)]
        good = [
            pool.submit(run, honest, "assert solve(1) == 2", entry_point="solve") for _ in range(6)
        ]
        assert all(f.result().passed for f in good)
        assert all("ESCAPED" not in f.result().output for f in bombs)


PLAIN = [
    "None", "True", "-7", "2**90", "-(2**63)", "1.5", "float('inf')", "'é\\n\\ud800'", "b'\\x00a'",
    "1j", "[1, [2, (3,)]]", "{1: 'a', (2, 3): [4]}", "{1, 2}", "frozenset({'a'})", "range(2, 9, 3)",
    "[None, True, 1.0, '']", "{}", "()", "set()",
]  # fmt: skip


def test_plain_data_arrives_as_it_left():
    tests = "\n".join(f"assert solve({v}) == {v} and type(solve({v})) is type({v})" for v in PLAIN)
    outcome = run("def solve(x):\n    return x", tests, entry_point="solve")
    assert outcome.passed, outcome


def test_exact_types_come_of_subclasses_and_order_is_kept():
    code = (
        "import collections, enum\n"
        "class E(enum.IntEnum):\n    A = 3\n"
        "P = collections.namedtuple('P', 'x y')\n"
        "def solve(n):\n"
        "    return [collections.Counter('abca'), E.A, P(1, 2), {3: 0, 1: 0}][n]\n"
    )
    tests = (
        "assert solve(0) == {'a': 2, 'b': 1, 'c': 1} and type(solve(0)) is dict\n"
        "assert type(solve(1)) is int and solve(1) == 3\n"
        "assert solve(2) == (1, 2)\n"
        "assert list(solve(3)) == [3, 1]"
    )
    outcome = run(code, tests, entry_point="solve")
    assert outcome.passed, outcome


def test_things_of_the_program_can_be_used():
    code = (
        "class Node:\n"
        "    def __init__(self, value):\n        self.value, self.next = value, None\n"
        "    def twice(self):\n        return 2 * self.value\n"
        "def total(node):\n"
        "    return node.value + total(node.next) if node else 0\n"
        "def count():\n    yield from range(3)\n"
        "def total_of(values):\n    return sum(values)\n"
    )
    tests = (
        "first = Node(1)\nfirst.next = Node(2)\nfirst.next.next = Node(3)\n"
        "assert total(first) == 6 and first.next.value == 2 and first.next.twice() == 4\n"
        "assert list(count()) == [0, 1, 2]\n"
        "assert total_of([1, 2]) == 3 and math.isclose(total_of([0.1, 0.2]), 0.3)\n"
        "assert Node(1) != Node(1)"
    )
    outcome = run(code, tests)
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("code", "tests", "kind", "detail"),
    [
        ("def solve(x):\n    return 1 / x", "solve(0)", "failed", "ZeroDivisionError: division by"),
        ("def solve(x:", "solve(0)", "failed", "SyntaxError"),
        ("other = 1", "solve(0)", "failed", "AttributeError: module 'program' has no"),
        ("def solve(x):\n    return x", "assert solve(1) == 2, 'no two'", "failed", "no two"),
        ("def solve(x):\n    return x", "while True: pass", "timed out", "1 s of CPU time"),
        ("def solve(x):\n    return x", "solve(lambda: 1)", "failed", "TypeError: the tests pass"),
        ("import os\nos.abort()", "", "killed", "SIGABRT"),
        ("import sys\nsys.exit(3)", "", "failed", "Gone: SystemExit"),
        ("x = 'y' * (1 << 40)", "", "out of memory", "more than 268435456 bytes"),
    ],
)
def test_why_a_program_fails(code, tests, kind, detail):
    limits = Limits(cpu_seconds=1, wall_seconds=60, memory=256 << 20)
    outcome = run(code, tests, entry_point="solve", limits=limits)
    assert outcome.kind == kind, outcome
    assert detail in outcome.detail, outcome
    assert "\n" not in outcome.detail


def test_an_exception_that_a_test_waits_for():
    tests = (
        "try:\n    solve(0)\nexcept ValueError as e:\n    assert 'none' in str(e)\nelse:\n    1/0"
    )
    assert run("def solve(x):\n    raise ValueError('none')", tests, entry_point="solve").passed


def test_the_program_beside_the_entry_point_of_a_built_in_name():
    assert run(
        "def sum(a, b):\n    return a - b", "assert sum(5, 3) == 2", entry_point="sum"
    ).passed


def test_the_prelude_is_the_judges_own():
    """What the tests use of the prompt cannot be redefined by the program."""
    prelude = "def double(x):\n    return 2 * x\ndef solve(x):\n    pass\n"
    tests = "assert double(solve(2)) == 4"
    assert run("def solve(x):\n    return x", tests, prelude=prelude, entry_point="solve").passed
    cheat = "def double(x):\n    return 4\ndef solve(x):\n    return 9"
    assert not run(cheat, tests, prelude=prelude, entry_point="solve").passed


def test_what_is_printed_is_kept_and_cut():
    outcome = run("print('a' * 10, flush=True)\nprint('é')", limits=Limits(output=1000))
    assert outcome.passed
    assert outcome.output == "a" * 10 + "\né\n"
    outcome = run("print('a' * 5000)", "", limits=Limits(output=1000))
    assert outcome.kind == "too much output"
    assert outcome.output == "a" * 1000


def test_without_an_essential_protection_nothing_runs(given):
    code = program("delete_files", given)
    for name in ESSENTIAL:
        with pytest.raises(BadInput, match=rf"lacks.* {name} \(.*--allow-unsandboxed"):
            run(code, without=(name,))
    assert as_was(given)
    for name in FURTHER:
        assert "ESCAPED" not in run(code, without=(name,)).output


def test_protections_are_told_one_by_one():
    assert [p.name for p in protections()] == [*ESSENTIAL, *FURTHER]
    told = {p.name: p for p in protections(without=("network", "calls"))}
    assert not told["network"].active
    assert told["network"].essential
    assert told["network"].why_not == "switched off"
    assert not told["calls"].active
    assert told["files"].active


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    before = children()
    run("def solve(x):\n    return x", "assert solve(1) == 1", entry_point="solve")
    with pytest.raises(BadInput):
        run("", without=("files",))
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads
    assert children() == before


def children() -> set[psutil.Process]:
    """All processes below this one; other tests may have left some of their libraries."""
    return set(psutil.Process().children(recursive=True))


def test_ctrl_c_ends_the_boxes(monkeypatch):
    before = children()

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import time\ntime.sleep(60)")
    deadline = time.monotonic() + 5
    while children() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() == before


def test_bad_limits_and_names():
    with pytest.raises(BadInput, match="memory must be above 0, got -1"):
        Limits(memory=-1)
    with pytest.raises(UnknownName, match="Did you mean 'network'"):
        run("", without=("netwrk",))


def test_another_system_is_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BadInput, match="on Linux only, this is darwin"):
        run("")
