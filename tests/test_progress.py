"""Long loops tell that they are alive, on a terminal and in a log file."""

import io

import pytest
from rich.console import Console

from llm_narrow import progress


def test_a_log_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    track = progress.shown(Console(file=out, width=100))
    assert list(track(range(4), "scoring")) == [0, 1, 2, 3]
    told = out.getvalue().splitlines()
    assert told[0] == "scoring: 2 of 4 in 20 s, about 20 s left"
    assert told[-1].startswith("scoring: 4 of 4")


def test_a_short_loop_leaves_no_line() -> None:
    out = io.StringIO()
    assert list(progress.shown(Console(file=out))(iter("ab"), "reading")) == ["a", "b"]
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    track = progress.shown(Console(file=out, force_terminal=True, width=100))
    assert list(track([1, 2], "scoring")) == [1, 2]
    assert "scoring" in out.getvalue() and "2/2" in out.getvalue()


def test_a_silent_loop_only_yields() -> None:
    assert list(progress.silent([1], "x")) == [1]
