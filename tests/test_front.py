"""The picture of the README has a point for every run, and the units that one run kept."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def front() -> Any:
    file = Path(__file__).resolve().parent.parent / "examples" / "docs" / "front.py"
    spec = importlib.util.spec_from_file_location("front", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_is_a_point(front: Any, finished: Any, tmp_path: Path) -> None:
    run = finished.folder
    peers = tmp_path / "peers.json"
    whole = front.rows_of(run)[0]["parameters"]
    told = {"tool": "other", "parameters": whole / 2, "bits_per_byte_ratio": {"value": 1.5}}
    worse = told | {"bits_per_byte_ratio": {"value": 1.9}}
    ours = told | {"tool": "llm-narrow", "bits_per_byte_ratio": {"value": 1.1}}
    peers.write_text(json.dumps({"rows": [worse, told, ours]}))
    assert front.best_of_peers(peers, whole) == {"other": (0.5, 1.5)}
    share, ratio, low, high = front.point(run)
    assert 0 < share < 1 and low <= ratio <= high
    out = tmp_path / "assets" / "front.svg"
    front.main(["--runs", f"one={run},{run}", "--map", str(run), "--peers", str(peers),
                "--out", str(out)])  # fmt: skip
    text = out.read_text()
    assert text.startswith("<?xml") and re.search(r"<svg", text)
    kept, names = front.mapped(run)
    assert len(kept) == len(names) == 2 and 0 < kept.mean() < 1


def test_a_line_without_folders_is_refused(front: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        front.parse(["--runs", "one", "--map", "x"])
    assert "is not NAME=FOLDER" in capsys.readouterr().err
