"""What a dry run forecasts: operations by hand, and those of the narrowed model as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_narrow import cost, forecast, inputs, recipe, stages
from llm_narrow.plan import by_sparsity
from llm_narrow.progress import silent
from llm_narrow.units import remove

SMALL = {"length": 32, "batch_size": 2, "calibration_tokens": 512, "held_out_tokens": 256,
         "validation_tokens": 128, "evaluate_every": 4}  # fmt: skip


@pytest.fixture
def told(
    model_folder: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The forecast of a recipe by part, the FLOPs of the whole and the narrowed model, the plan."""
    monkeypatch.setattr(forecast, "rate", lambda *args: 1e6)

    def go(**given: object) -> tuple[dict[str, forecast.Part], float, float, Any]:
        settled = recipe.load(
            None, {"model": model_folder, "domain": domain_folder, **SMALL, **given}
        )
        start = inputs.gather(settled, track=silent)
        blocks = inputs.calibration(start, settled, track=silent)
        model, groups = start.loaded.model, start.all_groups
        scores = {g.name: g.size - 1.0 * torch.arange(g.size) for g in groups}
        shares = settled.prune.sparsity_by_kind
        assert shares is not None
        plan = by_sparsity(model, groups, scores, sparsity=shares, multiple=1)
        parts = {p.name: p for p in forecast.forecast(settled, start, plan, blocks)}
        whole = cost.flops_per_token(model, context=16)
        remove(model, plan.groups, plan.keep)
        return parts, whole, cost.flops_per_token(model, context=16), plan

    return go


def test_operations_by_hand(told: Any) -> None:
    parts, whole, narrow, _ = told(
        sparsity={"neurons": 0.5, "heads": 0.5}, recover_tokens=640, method="lasso",
        lasso_tokens=1280,
    )  # fmt: skip
    assert list(parts) == ["lasso", "refit", "recovery", "measurement, before and after"]
    assert narrow < 0.8 * whole
    assert parts["refit"].flops == pytest.approx(2 * 512 * (whole + narrow))
    # A step is 64 tokens, every fourth is followed by a validation, and one before and one after.
    assert parts["recovery"].flops == pytest.approx(
        640 * (3 * narrow + whole) + (10 / 4 + 2) * 128 * narrow
    )
    assert parts["lasso"].flops == pytest.approx(
        1280 * (3 * whole + whole) + (20 / 4 + 2) * 128 * whole
    )
    assert parts["measurement, before and after"].flops == pytest.approx(256 * (whole + narrow))
    assert all(p.seconds == pytest.approx(p.flops / 1e6) for p in parts.values())


def test_settings_change_what_is_told(told: Any) -> None:
    given = {"sparsity": {"neurons": 0.5}, "recover_tokens": 640}
    plain, _, narrow, plan = told(**given, distill="none")
    taught, whole, _, _ = told(**given)
    again, *_ = told(**given, distill="none", checkpointing=True)
    assert taught["recovery"].flops - plain["recovery"].flops == pytest.approx(640 * whole)
    assert again["recovery"].flops - plain["recovery"].flops == pytest.approx(640 * narrow)
    assert again["recovery"].bytes < plain["recovery"].bytes < taught["recovery"].bytes
    assert plain["recovery"].bytes > 20 * plan.parameters_after
    # LoRA of rank 4 on q, k, v, o (32 x 32, 32 x 16 twice, 32 x 32) and three matrices of 48 x 32.
    little, *_ = told(**given, distill="none", recover_method="lora", lora_rank=4)
    added = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (48 + 32))
    assert plain["recovery"].bytes - little["recovery"].bytes == (
        16 * plan.parameters_after - 20 * added
    )
    assert "refit" not in told(sparsity={"neurons": 0.5}, refit=False)[0]
    assert "recovery" not in told(sparsity={"neurons": 0.5})[0]


def test_a_dry_run_tells_it_and_times_this_machine(
    model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    settled = recipe.load(
        None,
        {"model": model_folder, "domain": domain_folder, **SMALL, "recover_tokens": 640},
    )
    done = stages.prune(settled, dry_run=True, out=tmp_path / "run")
    parts = done.facts()["forecast"]
    assert [p["name"] for p in parts][-2:] == ["recovery", "measurement, before and after"]
    assert all(p["seconds"] > 0 and p["bytes"] > 0 for p in parts)
    assert not (tmp_path / "run").exists()
