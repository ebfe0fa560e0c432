"""Query heads that go one by one: the model left is the one with the others' columns at zero."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from commands import refused
from llm_narrow import checkpoint, queries, training, units
from llm_narrow.cost import flops_per_token
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups
from tiny import batch, tiny

GROUPED = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8
}  # fmt: skip
ABLE = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere",
        "mixtral", "qwen2_moe", "qwen3_moe", "smollm3", "olmo", "starcoder2", "nemotron",
        "phi3"]  # fmt: skip


def grouped(kind: str) -> Any:
    return tiny(kind, **GROUPED).eval()


def some(model: Any, stay: int, seed: int = 0) -> units.Keep:
    """A random choice of the same number with each key/value head."""
    chance = torch.Generator().manual_seed(seed)
    groups = queries.groups_of(model)
    scores = {g.name: torch.rand(g.size, generator=chance) for g in groups}
    return queries.chosen(scores, groups, stay, queries.per_head(model.config))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("kind", ABLE)
def test_what_is_left_is_the_model_with_the_others_at_zero(kind: str, tmp_path: Path) -> None:
    model, tokens = grouped(kind), batch(kind)
    keep = some(model, 2)
    masked = copy.deepcopy(model)
    units.mask(masked, queries.groups_of(model), keep)
    before = {g.name: g.size for g in find_groups(model)}
    assert queries.thin(model, keep) is None
    torch.testing.assert_close(logits(model, tokens), logits(masked, tokens), atol=1e-5, rtol=1e-4)
    assert model.config.num_attention_heads == 4
    groups = find_groups(model)
    assert {g.name: g.size for g in groups} == before  # no key/value head is gone
    whole = units.keep_all(groups)
    checkpoint.write(model, None, tmp_path, original_config=model.config, groups=groups, keep=whole)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3"])
def test_key_value_heads_go_after_query_heads(kind: str) -> None:
    model, tokens = grouped(kind), batch(kind)
    queries.thin(model, some(model, 1))
    groups = [g for g in find_groups(model) if g.kind == "heads"]
    keep = {g.name: torch.tensor([n % 2 == 0, n % 2 == 1]) for n, g in enumerate(groups)}
    masked = copy.deepcopy(model)
    units.mask(masked, groups, keep)
    units.remove(model, groups, keep)
    torch.testing.assert_close(logits(model, tokens), logits(masked, tokens), atol=1e-5, rtol=1e-4)


def test_the_best_of_each_run_stay() -> None:
    model = grouped("llama")
    groups = queries.groups_of(model)
    scores = {g.name: torch.tensor([3.0, 1.0, 2.0, 10.0, 30.0, 20.0]) for g in groups}
    for keep in queries.chosen(scores, groups, 2, 3).values():
        assert keep.tolist() == [True, False, True, False, True, True]


def test_the_refit_brings_back_some_of_what_went() -> None:
    model, tokens = grouped("llama"), torch.randint(0, 64, (64, 16))
    keep, plain, refitted = some(model, 1), copy.deepcopy(model), copy.deepcopy(model)
    queries.thin(plain, keep)
    facts = queries.thin(refitted, keep, tokens.split(4))
    assert facts is not None and len(facts.errors) == model.config.num_hidden_layers
    there = logits(model, tokens)
    off = [float((logits(m, tokens) - there).square().mean()) for m in (plain, refitted)]
    assert off[1] < 0.9 * off[0]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, "one query head for each"),
        ("gpt2", {}, "one query head for each"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
         "one by one"),
    ],
)  # fmt: skip
def test_what_has_none_to_spare_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        queries.groups_of(tiny(kind, **changes))


def test_a_choice_of_more_here_and_fewer_there_is_refused() -> None:
    model = grouped("llama")
    keep = some(model, 2)
    next(iter(keep.values()))[:] = True
    with pytest.raises(BadInput, match="equally many query heads, and one at least; got 2, 3"):
        queries.thin(model, keep)


SMALL = ["--query-heads", "1", "--multiple", "1"]


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def test_they_go_before_all_else_and_count_in_a_budget(
    prune: Any, tmp_path: Path, model_folder: Path
) -> None:
    done = prune(
        *SMALL, "--kinds", "vocabulary,neurons,heads", "--target-params", "60%",
        "--target-flops", "70%",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "Query heads: 1 of 2 stay" in done.err
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    facts, narrow = told(tmp_path / "run"), checkpoint.load(tmp_path / "run/model")
    assert facts["model"]["parameters"] == model.num_parameters()
    assert narrow.num_parameters() <= 0.6 * model.num_parameters()
    assert flops_per_token(narrow, context=256) <= 0.7 * flops_per_token(model, context=256)
    assert narrow.config.num_attention_heads == 2
    kept = facts["query_heads"]["kept"]
    assert all(len(stay) == 2 and stay[0] < 2 <= stay[1] for stay in kept.values())


def test_scores_of_another_choice_are_not_taken(prune: Any, run: Any, tmp_path: Path) -> None:
    assert prune(*SMALL, "--sparsity", "0.5").code == 0
    scores = tmp_path / "run/scores.safetensors"
    assert prune(*SMALL, "--sparsity", "0.4", "--scores", scores, "--out", tmp_path / "b").code == 0
    refused(prune("--sparsity", "0.4", "--scores", scores, "--out", tmp_path / "c"), "thinned")


def test_a_run_that_was_stopped_goes_on_with_the_same_choice(
    prune: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*SMALL, "--sparsity", "0.5", "--recover-tokens", "128", "--validation-tokens", "64"]
    assert prune(*asked, "--out", tmp_path / "whole").code == 0

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "recover", stopped)
        assert prune(*asked).code == 130
    monkeypatch.setattr(queries, "chosen", None)
    assert run("resume", tmp_path / "run").code == 0
    first, second = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_number_that_leaves_nothing_out_is_refused(prune: Any) -> None:
    refused(prune("--query-heads", "2"), "must be from 1 to 1, as each key/value head has 2")
    refused(prune("--query-heads", "0"), "--query-heads must be a whole number of at least 1")
