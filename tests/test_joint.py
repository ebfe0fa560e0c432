"""One budget over all kinds, as `prune --allocation joint` spends it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from commands import refused
from llm_narrow import beside, checkpoint, lora, training
from llm_narrow.cost import flops_per_token
from llm_narrow.families import find_groups

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
    even, uneven = bought["divergence_of_even"], bought["divergence_of_uneven"]
    assert bought["even"] == (even is not None and even <= uneven)
    assert bought["divergence"] == (even if bought["even"] else uneven)
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


def test_layers_and_halves_go_and_the_folder_loads(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = prune(*JOINT, "--kinds", "attention,mlp,layers", "--target-params", "60%")
    assert done.code == 0, done.err
    facts = told(tmp_path / "run")
    after = json.loads((tmp_path / "run/rows.jsonl").read_text().splitlines()[-1])
    assert after["parameters"] <= 0.6 * facts["model"]["parameters"]
    narrow = checkpoint.load(tmp_path / "run/model")
    assert sum(p.numel() for p in narrow.parameters()) == after["parameters"]
    gone = facts.get("layers_gone", [])
    empty = {row["group"] for row in facts["plan"] if not row["after"]}
    assert gone or empty
    assert narrow.config.num_hidden_layers == len(facts["joint"]["layers"]) - len(gone)
    assert {g for g in facts["joint"]["kept"] if any(f"layers.{n}." in g for n in gone)} <= empty


def test_what_was_cut_short_goes_on_to_the_same_weights(
    prune: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        *JOINT, "--kinds", "attention,layers", "--target-params", "70%", "--recover-tokens", "128",
        "--validation-tokens", "64",
    ]  # fmt: skip
    assert prune(*asked, "--out", tmp_path / "whole").code == 0

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "recover", stopped)
        assert prune(*asked).code == 130
    # The refit is not done again.
    monkeypatch.setattr("llm_narrow.decision.refit_and_remove", None)
    done = run("resume", tmp_path / "run")
    assert done.code == 0, done.err
    first, second = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "run")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_a_half_is_padded_for_stock_and_pruned_again(
    prune: Any, tmp_path: Path
) -> None:
    asked = [*JOINT, "--kinds", "mlp,attention", "--target-params", "88%"]
    assert prune(*asked).code == 0
    assert prune(*asked, "--layout", "padded", "--out", tmp_path / "padded").code == 0
    uneven = checkpoint.load(tmp_path / "run/model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded/model")
    tokens = torch.arange(3, 35)[None]
    close = torch.isclose(stock(tokens).logits, uneven(tokens).logits, rtol=1e-4, atol=1e-5)
    assert close.all()
    empty = {g.name for g in find_groups(uneven) if not g.size}
    assert empty
    again = prune(
        "--model", tmp_path / "run", "--sparsity", "neurons=0.5", "--multiple", "1",
        "--out", tmp_path / "again",
    )  # fmt: skip
    assert again.code == 0, again.err
    smaller = checkpoint.load(tmp_path / "again/model")
    assert empty <= {g.name for g in find_groups(smaller) if not g.size}
    keep = checkpoint.read_keep(tmp_path / "again/model" / checkpoint.KEEP)
    assert {name for name, stay in keep.items() if not stay.any()} >= empty


@pytest.mark.parametrize("kinds", ["neurons,heads", "vocabulary,neurons,heads"])
def test_operations_and_cache_are_limited_in_terms_of_the_model_that_was_loaded(
    prune: Any, tmp_path: Path, model_folder: Path, kinds: str
) -> None:
    done = prune(
        *JOINT, "--kinds", kinds, "--target-flops", "80%", "--target-kv-cache", "50%"
    )  # fmt: skip
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    wanted = told(tmp_path / "run")["joint"]["wanted"]
    assert wanted["kv_bytes"] == 0.5 * 2 * 2 * 2 * 8 * 4  # layers, key and value, heads, size
    # The trimmed vocabulary may save enough operations by itself.
    limit = round(0.8 * flops_per_token(model, context=256))
    assert wanted.get("flops", limit) == limit
    narrow = checkpoint.load(tmp_path / "run/model")
    assert flops_per_token(narrow, context=256) <= limit
    left = told(tmp_path / "run")["joint"]["left"]
    assert left["kv_bytes"] <= wanted["kv_bytes"]


def test_lora_passes_over_halves_that_are_gone(prune: Any, tmp_path: Path) -> None:
    assert prune(*JOINT, "--kinds", "mlp,attention", "--target-params", "80%").code == 0
    model = checkpoint.load(tmp_path / "run/model")
    gone = {s.module for g in find_groups(model) if not g.size for s in g.slices}
    assert gone and not gone & {*lora.layers(model)}
    lora.merged(lora.with_lora(model, rank=1))


def test_layers_stay_as_told(prune: Any) -> None:
    refused(
        prune(*JOINT, "--kinds", "layers", "--keep-layers", "2", "--target-params", "80%"),
        "the floor is 2 layers",
    )
    refused(prune(*JOINT, "--kinds", "layers", "--target-kv-cache", "9MB"), "above the")


AUTO = ["--kinds", "vocabulary,neurons", "--vocabulary-threshold", "auto"]


def test_the_budget_buys_its_share_of_the_vocabulary(prune: Any, tmp_path: Path) -> None:
    """The threshold is that which saves nearest to what was bought, and is the one trimmed by."""
    done = prune(*JOINT, *AUTO, "--target-params", "66%")
    assert done.code == 0, done.err
    facts = told(tmp_path / "run")
    priced = facts["vocabulary_priced"]
    assert priced["bought"] > 0
    settings = {o["setting"].rpartition(" ")[2]: o["parameters"] for o in priced["options"]}
    nearest = min(settings, key=lambda name: abs(settings[name] - priced["bought"]))
    assert abs(settings[nearest] - priced["bought"]) < priced["bought"]
    assert str(facts["vocabulary"]["threshold"]) == nearest
    narrow = checkpoint.load(tmp_path / "run/model")
    assert sum(p.numel() for p in narrow.parameters()) <= 0.66 * facts["model"]["parameters"]
    again = json.loads(json.dumps(facts["recipe"]))
    assert again["prune"]["vocabulary_threshold"] == "auto"


@pytest.mark.parametrize(("price", "goes"), [(50.0, False), (0.0, True)])
def test_what_tokens_cost_beside_neurons_decides(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, price: float, goes: bool
) -> None:
    real = beside.options

    def options(*args: Any, **given: Any) -> Any:
        found, refused_ = real(*args, **given)
        return tuple(replace(option, increase=price) for option in found), refused_

    monkeypatch.setattr(beside, "options", options)
    done = prune(*JOINT, *AUTO, "--target-params", "85%")
    assert done.code == 0, done.err
    facts = told(tmp_path / "run")
    assert ("vocabulary" in facts) == goes
    assert ("it stays whole" in done.err) != goes
    if goes:  # nearly all that can be bought, since it is for nothing
        most = max(o["parameters"] for o in facts["vocabulary_priced"]["options"])
        assert facts["vocabulary_priced"]["bought"] > 0.9 * most


@pytest.mark.parametrize(
    "flags",
    [
        ("--kinds", "vocabulary,neurons", "--target-params", "60%"),
        ("--kinds", "neurons", "--allocation", "joint", "--target-params", "60%"),
        ("--kinds", "vocabulary", "--allocation", "joint", "--target-params", "60%"),
    ],
)
def test_auto_needs_something_to_weigh_the_vocabulary_against(
    prune: Any, flags: tuple[str, ...]
) -> None:
    refused(prune(*flags, "--vocabulary-threshold", "auto"), "weighs tokens against units")


def test_a_threshold_that_is_no_number_is_refused(prune: Any) -> None:
    for given in ("0", "some"):
        refused(
            prune("--kinds", "vocabulary", "--target-params", "60%", "--vocabulary-threshold",
                  given), "must be a whole number of at least 1, or auto, got",
        )  # fmt: skip
