"""Prices of vocabulary, query heads and channels: what `prune` at that setting really does."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from folders import write_model
from llm_narrow import channels, inputs, measure, pricing, queries, scoring, units
from llm_narrow import recipe as recipes
from llm_narrow.cost import size
from llm_narrow.pricing import Priced

SMALL = {"length": 32, "calibration_tokens": 512}
ASKED = {"blocks": 3, "fit_tokens": 512}


def priced(model: Path, domain: Path, kinds: str | None = None) -> Priced:
    return pricing.prices(model=str(model), domain=str(domain), kinds=kinds, **SMALL, **ASKED)


def test_each_setting_saves_what_prune_at_it_does(
    prune: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    found = priced(model_folder, domain_folder, "vocabulary,query_heads,channels")
    assert not found.prices.large and not found.refused
    assert {o.kind for o in found.beside} == {"vocabulary", "query_heads", "channels"}
    assert all(o.left < o.whole and o.saves.parameters > 0 for o in found.beside)
    for number, option in enumerate(found.beside):
        at = option.setting.split()
        if "--kinds" not in at:
            at += ["--sparsity", "0"]
        out = tmp_path / str(number)
        done = prune(*at, "--multiple", "1", "--out", out, "--calibration-tokens", "512")
        assert done.code == 0, done.err
        told = json.loads((out / "manifest.json").read_text())
        left = told["outcome"]["parameters"] if "outcome" in told else parameters(out)
        assert told["model"]["parameters"] - left == option.saves.parameters


def parameters(run: Path) -> int:
    from llm_narrow import checkpoint

    return size(checkpoint.load(run / "model")).parameters


def test_a_price_is_the_loss_of_the_model_that_is_left(
    model_folder: Path, domain_folder: Path
) -> None:
    found = priced(model_folder, domain_folder, "channels")
    recipe = recipes.load(None, {"model": model_folder, "domain": domain_folder, **SMALL})
    start = inputs.gather(recipe)
    ground = pricing.ground_of(start, recipe, **ASKED)
    model = start.loaded.model
    group = channels.group_of(model)
    blocks = inputs.calibration(start, recipe)
    scored = scoring.made(
        inputs.Inputs(start.loaded, start.all_groups, (group,), start.domain, start.device,
                      start.bf16), recipe, blocks
    )  # fmt: skip
    whole = measure.document_sums(model, ground.wide).nats.sum()
    for option in found.beside:
        masked = copy.deepcopy(model)
        keep = channels.chosen(scored.scores[group.name], option.left)
        units.mask(masked, [group], {group.name: keep})
        nats = measure.document_sums(masked, ground.wide).nats.sum()
        rise = float(nats - whole) / (ground.wide.tokens.numel() - len(ground.wide.tokens))
        assert option.increase == pytest.approx(rise, abs=0.02)  # in bfloat16 here, maybe
        assert abs(rise) > 1e-3 or option.increase == pytest.approx(rise, abs=1e-3)
    assert len({o.increase for o in found.beside}) == len(found.beside) > 1


def test_what_was_measured_is_not_measured_again(
    model_folder: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = priced(model_folder, domain_folder, "vocabulary,query_heads,channels")
    monkeypatch.setattr(measure, "document_sums", None)
    second = priced(model_folder, domain_folder, "vocabulary,query_heads,channels")
    assert [o.facts() for o in first.beside] == [o.facts() for o in second.beside]


def test_a_trimmed_vocabulary_is_priced_on_the_same_bytes(
    model_folder: Path, domain_folder: Path
) -> None:
    found = priced(model_folder, domain_folder, "vocabulary")
    lefts = [o.left for o in found.beside]
    assert lefts == sorted(set(lefts), reverse=True)
    assert all(torch.isfinite(torch.tensor(o.increase)) for o in found.beside)
    assert all(o.saves.kv_bytes == 0 for o in found.beside)


def test_what_cannot_go_is_told_with_the_reason_beside_what_can(
    run: Any, tmp_path: Path, domain_folder: Path
) -> None:
    model = write_model(tmp_path / "model", "gpt2")
    done = run("prices", model, "--domain", domain_folder, "--length", "32", "--blocks", "3",
               "--calibration-tokens", "512", "--fit-tokens", "512", "--kinds",
               "heads,query_heads,channels")  # fmt: skip
    assert done.code == 0, done.err
    assert "one query head for each key/value head" in " ".join(done.out.split())
    assert "Beside units" in done.out and "24 channels" in done.out
    assert "Prices of each kind" in done.out


def test_a_kind_that_there_is_not_is_refused_with_all_that_there_are(
    run: Any, model_folder: Path, domain_folder: Path
) -> None:
    done = run("prices", model_folder, "--domain", domain_folder, "--kinds", "query-heads")
    assert done.code == 2 and not done.out
    assert "query-heads" in done.err and "query_heads" in done.err and "neurons" in done.err


def test_query_heads_that_are_known_are_not_refitted_again(
    model_folder: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refitted: list[int] = []
    really = queries.thin

    def thin(model: Any, keep: Any, batches: Any, **given: Any) -> Any:
        refitted.append(len(batches))
        return really(model, keep, batches, **given)

    monkeypatch.setattr(queries, "thin", thin)
    first = priced(model_folder, domain_folder, "query_heads").beside
    assert refitted and all(refitted)
    refitted.clear()
    assert priced(model_folder, domain_folder, "query_heads").beside == first
    assert refitted and not any(refitted)
