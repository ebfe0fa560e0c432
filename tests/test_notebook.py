"""The notebook: it runs from top to bottom, and the outputs that it comes with are real."""

import base64
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

import llm_narrow

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SCRIPT = ROOT / "examples/docs/executed.py"


@pytest.fixture(scope="module")
def written() -> Any:
    """The notebook as it is in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def ran(
    model_folder: Path, domain_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """The notebook after a run on a tiny model, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    values = {"model": model_folder, "domain": domain_folder, "calibration_tokens": 512,
              "held_out_tokens": 256, "length": 32}  # fmt: skip
    given = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(NOTEBOOK), "--out", str(folder / "ran.ipynb"),
         "--folder", str(folder), "--timeout", "300", *given],
        env={**os.environ, "LLM_NARROW_CACHE": str(folder / "cache")},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return nbformat.read(folder / "ran.ipynb", as_version=4), folder


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any, kind: str) -> list[str]:
    return [o.data[kind] for c in code(notebook) for o in c.outputs if kind in o.get("data", {})]


def printed(notebook: Any) -> str:
    return "".join(o.text for c in code(notebook) for o in c.outputs if o.output_type == "stream")


def test_it_runs_from_top_to_bottom(ran: tuple[Any, Path], written: Any) -> None:
    notebook, folder = ran
    assert [c.source for c in notebook.cells] == [c.source for c in written.cells]
    assert [c.execution_count for c in code(notebook)] == [*range(1, len(code(written)) + 1)]
    rows = (folder / "runs/quickstart/rows.jsonl").read_text().splitlines()
    told = [json.loads(row) for row in rows]
    text = printed(notebook)
    for row in told:
        assert f"{row['parameters']:,} parameters, {row['bits_per_byte']:.3f} bits per byte" in text
    assert text.count("def read_lines(path):") == 2
    assert (folder / "runs/quickstart-scores.safetensors").is_file()
    assert shown(notebook, "text/markdown") == [(folder / "runs/quickstart/report.md").read_text()]


def test_figures_are_inline(ran: tuple[Any, Path]) -> None:
    pictures = [base64.b64decode(text) for text in shown(ran[0], "image/png")]
    assert len(pictures) == 4 and all(p.startswith(b"\x89PNG") for p in pictures)


def test_every_loop_is_one_bar_that_came_to_its_end(ran: tuple[Any, Path]) -> None:
    lines = [text for text in shown(ran[0], "text/plain") if "━" in text]
    bars = [re.search(r"^(\w+).*?(\d+)/(\d+) ", line) for line in lines]
    assert all(bar and bar[2] == bar[3] for bar in bars), lines
    names = [bar[1] for bar in bars if bar]
    assert {"loading", "scoring", "refitting", "measuring"} <= {*names}
    assert names.count("refitting") == 1
    assert len([t for t in shown(ran[0], "text/html") if "━" in t]) == len(bars)
    assert "\x1b" not in json.dumps(ran[0])


def test_it_is_short_and_says_what_it_does(written: Any) -> None:
    cells = written.cells
    for before, cell in pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert len(cell.source.splitlines()) <= 16
    for cell in cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"`[^`]*`|^#.*$", "x", cell.source, flags=re.MULTILINE).strip("x\n ")
            assert 1 <= len(re.findall(r"[.!?:](?= |$)", text)) <= 3, cell.source


def test_it_uses_public_names_only(written: Any) -> None:
    text = "\n".join(c.source for c in code(written))
    assert {*re.findall(r"llm_narrow\.(\w+)", text)} <= {*llm_narrow.__all__}
    assert "from llm_narrow" not in text


def test_what_is_in_the_repository_is_of_a_real_run(written: Any) -> None:
    nbformat.validate(written)
    assert NOTEBOOK.stat().st_size < 300_000
    how = "python examples/docs/executed.py examples/quickstart.ipynb"
    assert len(shown(written, "image/png")) == 4, how
    text = printed(written)
    assert "smollm2-135m: 134,515,008 parameters" in text, how
    assert re.search(r"before +134,515,008 parameters.*\nafter +94,701,888 parameters", text), how
    everything = NOTEBOOK.read_text("utf-8")
    assert not re.search(r"[\"' (](/home|/root|/tmp|/work|/Users|C:\\\\)", everything)
    assert not [o for c in code(written) for o in c.outputs if o.get("name") == "stderr"]
    assert {*written.metadata} == {"kernelspec", "language_info"}


def test_a_parameter_that_is_none_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(NOTEBOOK), "--out", str(tmp_path / "n.ipynb"),
         "--set", "modle=x"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "The notebook has no parameter modle." in done.stderr
    assert not (tmp_path / "n.ipynb").exists()
