"""rows.jsonl: what is written comes back, and an interrupted write costs one row at most."""

import json
from pathlib import Path

import pytest

from llm_narrow import rows
from llm_narrow.errors import BadInput
from llm_narrow.rows import Estimate, Row, Spread


def a_row(label: str = "after") -> Row:
    """A row with something measured, and something not."""
    return Row(
        label=label, model="tiny", sha256="ab", domain="python", part="held_out",
        tokens=38, documents=2, loss=Estimate(2.5, 2.25, 2.75), bits_per_byte=Estimate(1, 0.5, 1.5),
        accuracy=Estimate(0.5, 0.25, 0.75), parameters=100, parameters_without_embeddings=60,
        bytes=500, prefill_ratio=Spread(2, 1, 3), loss_difference=None, seconds=1.5,
    )


def test_rows_are_flat_on_disk_and_come_back_equal(tmp_path: Path):
    file, written = tmp_path / "rows.jsonl", [a_row("before"), a_row("after")]
    for row in written:
        rows.append(file, [row])
    flat = json.loads(file.read_text().splitlines()[0])
    assert flat["loss_low"] <= flat["loss"] <= flat["loss_high"]
    assert not any(isinstance(v, dict | list) for v in flat.values())
    assert rows.read(file) == (written, [])


def test_an_unfinished_last_line_is_skipped_and_then_overwritten(tmp_path: Path):
    file, row = tmp_path / "rows.jsonl", a_row()
    rows.append(file, [row, row])
    file.write_bytes(file.read_bytes()[:-40])
    found, warnings = rows.read(file)
    assert found == [row]
    assert warnings == ["rows.jsonl, line 2 was not written to its end: skipped."]
    rows.append(file, [row])
    assert rows.read(file) == ([row, row], [])


def test_a_row_that_lacks_only_its_line_end_is_kept(tmp_path: Path):
    file, row = tmp_path / "rows.jsonl", a_row()
    rows.append(file, [row])
    file.write_bytes(file.read_bytes().rstrip())
    assert rows.read(file) == ([row], [])
    rows.append(file, [row])
    assert rows.read(file) == ([row, row], [])


@pytest.mark.parametrize(
    ("line", "why"), [("{", "line 1 is not a row"), ('{"label": "a"}', "'model' is missing")]
)
def test_a_broken_line_elsewhere_is_an_error(tmp_path: Path, line: str, why: str):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{line}\n")
    rows_before = file.read_bytes()
    with pytest.raises(BadInput, match=why):
        rows.read(file)
    assert file.read_bytes() == rows_before
    with pytest.raises(BadInput, match="cannot be read"):
        rows.read(tmp_path / "none.jsonl")
