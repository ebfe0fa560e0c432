"""One budget over all kinds, as `prune --allocation joint` spends it."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import refused
from llm_narrow import checkpoint

JOINT = ["--allocation", "joint", "--multiple", "1", "--length", "32"]


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


@pytest.mark.parametrize("kinds", ["neurons,heads", "vocabulary,neurons,heads"])
def test_a_budget_is_spent_and_told(prune: Any, tmp_path: Path, kinds: str) -> None:
    done = prune(*JOINT, "--kinds", kinds, "--target-params", "70%")
    assert done.code == 0, done.err
    facts = told(tmp_path / "run")
    after = json.loads((tmp_path / "run/rows.jsonl").read_text().splitlines()[-1])
    whole = facts["model"]["parameters"]
    assert 0.6 * whole < after["parameters"] <= 0.7 * whole
    bought = facts["joint"]
    assert bought["measured"] > 0 and bought["left"]["parameters"] == after["parameters"]
    kept = {row["group"]: row["after"] for row in facts["plan"]}
    assert bought["kept"] == kept
    assert "measured" in done.err and "by the list" in done.err
    narrow = checkpoint.load(tmp_path / "run/model")
    assert sum(p.numel() for p in narrow.parameters()) == after["parameters"]


def test_nothing_is_priced_where_the_vocabulary_suffices(prune: Any, tmp_path: Path) -> None:
    done = prune(*JOINT, "--kinds", "vocabulary,neurons", "--target-params", "99.9%")
    assert done.code == 0, done.err
    assert "joint" not in told(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sparsity", "0.5"), "give prune.target_params"),
        (("--target-params", "60%", "--method", "lasso"), "--method oneshot"),
        (("--target-params", "5%"), "is below"),
    ],
)
def test_what_a_budget_cannot_be_is_told(prune: Any, flags: tuple[str, ...], said: str) -> None:
    refused(prune("--allocation", "joint", *flags), said)
