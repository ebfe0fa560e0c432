"""Long loops tell that they are alive, on a terminal and in a log file."""

import io
from typing import Any

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


def test_a_notebook_gets_one_bar_that_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    drawn: list[str] = []

    class Place:
        def update(self, table: Any) -> None:
            drawn.append(table._repr_mimebundle_([], [])["text/plain"])

    def shown(table: Any, *, display_id: bool) -> Place:
        assert display_id
        place = Place()
        place.update(table)
        return place

    monkeypatch.setattr(display, "display", shown)
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    console = Console(force_jupyter=True)
    assert list(progress.shown(console)(iter("abc"), "scoring", total=3)) == ["a", "b", "c"]
    assert [line.split("/")[0][-1] for line in drawn] == ["0", "1", "2", "3", "3"]
    assert all("scoring" in line for line in drawn)
    failing = progress.shown(console)(iter("abc"), "refit", total=3)
    next(failing)
    failing.close()  # as a loop that ends early lets go of it
    assert "refit" in drawn[-1] and "0/3" in drawn[-1] and len(drawn) == 7
