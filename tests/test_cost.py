"""Sizes, operations and speeds against references computed by hand and by torch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_narrow import cost, measure
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups, refused_kinds
from llm_narrow.rows import Spread
from llm_narrow.units import keep_all, remove
from tiny import CONFIGS, VOCAB, tiny


def test_models_take_turns_and_the_first_turn_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    turns: list[str] = []

    def timed(model: str, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        assert prompt.shape == (2, 10) and new_tokens == 4
        turns.append(model.name)
        return {"A": (1.0, 4.0), "B": (0.5, 1.0)}[model.name] if turns[2:] else (99.0, 99.0)

    class Named:
        def __init__(self, name: str):
            self.name, self.config = name, tiny("llama").config

    monkeypatch.setattr(cost, "_timed", timed)
    models = {name: Named(name) for name in "AB"}
    found = measure.speed(models, prompt_tokens=10, new_tokens=4, repeats=2, batch=2)
    assert turns == ["A", "B"] * 3
    assert (found["A"].prefill, found["A"].decode) == (20, 2)
    assert found["B"].prefill_ratio == Spread(2, 2, 2)
    assert found["B"].decode_ratio == Spread(4, 4, 4)


def test_ratios_are_of_pairs_in_the_same_turn():
    found = cost._speeds({"a": [(1, 1), (2, 1), (9, 1)], "b": [(1, 1), (1, 1), (3, 2)]}, 10, 10)
    spread = found["b"].prefill_ratio
    assert (spread.value, spread.low, spread.high) == (2, 1, 3)
    assert found["a"].prefill == 5


def test_a_prompt_beyond_the_positions_is_refused():
    with pytest.raises(BadInput, match=r"small has 64 positions, fewer than .* = 72"):
        measure.speed({"small": tiny("gpt2")}, prompt_tokens=64, new_tokens=8)


def test_parameters_are_counted_once_when_tied():
    tied, loose = tiny("llama"), tiny("llama", tie_word_embeddings=False)
    assert measure.size(loose).parameters - measure.size(tied).parameters == VOCAB * 32
    assert measure.size(loose).without_embeddings == measure.size(tied).without_embeddings
    assert measure.size(tied).without_embeddings == measure.size(tied).parameters - VOCAB * 32
    assert measure.size(tied).parameters == sum(p.numel() for p in tied.parameters())


def test_flops_by_hand():
    # llama: 2 layers of q 32x32, k and v 16x32, o 32x32, three of 48x32; the tied head 64x32.
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    attention = 2 * 2 * 2 * 32  # query x key and weight x value, 2 layers, 32 channels, per token
    model = tiny("llama")
    assert measure.flops_per_token(model, context=10) == 2 * (matrices + 64 * 32) + 10 * attention
    seen = sum(range(1, 9))  # token i of 8 looks at i tokens
    prefill = 8 * 2 * matrices + seen * attention + 2 * 64 * 32
    assert measure.prefill_flops(model, 8) == prefill


@pytest.mark.parametrize("kind", CONFIGS)
def test_flops_are_those_that_torch_counts(kind: str):
    model = tiny(kind)
    model.set_attn_implementation("eager")  # which multiplies every token with every other
    if any(p.dim() == 3 for p in model.parameters()):
        model.set_experts_implementation("eager")
    plain = sdpa_kernel(SDPBackend.MATH)  # whose products are counted
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(16)[None] + 3, use_cache=False)
    expected = 16 * measure.flops_per_token(model, context=16)
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)  # rotary angles apart


@pytest.mark.parametrize("kind", CONFIGS)
def test_flops_follow_what_was_removed(kind: str):
    model = tiny(kind)
    if "heads" in refused_kinds(model):
        pytest.skip("its heads cannot be removed")
    groups = find_groups(model)
    keep = keep_all(groups)
    heads = [g for g in groups if g.kind == "heads"][-1]  # of the last layer alone
    keep[heads.name][0] = False
    before = [measure.flops_per_token(model, context=c) for c in (0, 10)]
    entries = {
        s.param: model.get_parameter(s.param).numel()
        for s in heads.slices
        if model.get_parameter(s.param).dim() == 2 and "norm" not in s.param
    }
    remove(model, groups, keep)
    after = [measure.flops_per_token(model, context=c) for c in (0, 10)]
    gone = sum(n - model.get_parameter(p).numel() for p, n in entries.items())
    assert before[0] - after[0] == 2 * gone
    channels = sum(s.block for s in heads.reads)
    c = model.config
    asked = channels
    if kind.startswith("deepseek"):  # queries and keys have channels of their own
        asked = channels * (c.qk_nope_head_dim + c.qk_rope_head_dim) // c.v_head_dim
    less = (before[1] - before[0]) - (after[1] - after[0])
    assert less == 2 * 10 * (channels + asked)


def test_bytes_are_of_the_weights_alone(tmp_path: Path):
    with pytest.raises(BadInput, match="no weight files"):
        measure.weight_bytes(tmp_path)
    for name, n in {
        "model-1.safetensors": 5, "model-2.safetensors": 7, "keep.safetensors": 100,
        "scores.safetensors": 1000, "pytorch_model.bin": 11, "config.json": 13,
    }.items():
        (tmp_path / name).write_bytes(b"x" * n)
    assert measure.weight_bytes(tmp_path) == 12
