"""Channels of the residual stream: what is left is the model with zeros in the others' place."""

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
from folders import write_model
from llm_narrow import channels, checkpoint, scores, training, units
from llm_narrow.cost import flops_per_token
from llm_narrow.errors import BadInput
from llm_narrow.families import FAMILIES, find_groups
from llm_narrow.norms import WideNorm
from tiny import batch, tiny

ABLE = ["deepseek_v2", "deepseek_v3", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2",
        "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"]  # fmt: skip
REMEMBER = ["cohere", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "nemotron",
            "olmo", "opt", "phi", "stablelm", "starcoder2"]  # their norms take the mean
UNABLE = sorted({*FAMILIES} - {*ABLE, *REMEMBER, "mlp"})


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def half(size: int, seed: int = 0) -> Tensor:
    chance = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return channels.chosen(chance, size // 2)


@pytest.mark.parametrize("kind", [*ABLE, *REMEMBER])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_left_is_the_model_with_zeros_in_the_others_place(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    model, tokens = tiny(kind, tie_word_embeddings=tied).eval(), batch(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms that are not all the same
            if parameter.dim() == 1 and "norm" in name:
                parameter.uniform_(0.5, 1.5)
    group = channels.group_of(model)
    keep = half(group.size)
    masked = copy.deepcopy(model)
    units.mask(masked, [group], {group.name: keep})
    channels.thin(model, keep)
    assert model.config.hidden_size == int(keep.sum()) < group.size
    torch.testing.assert_close(logits(model, tokens), logits(masked, tokens), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(masked, tokens), logits(tiny(kind).eval(), tokens), atol=1e-3)
    before, groups = copy.deepcopy(model.config), find_groups(model)
    decision = units.keep_all(groups)
    for g in groups:  # units beside them
        if g.kind == "neurons":
            decision[g.name][1::2] = False
    units.remove(model, groups, decision)
    wrote = checkpoint.write(
        model, None, tmp_path, original_config=before, groups=groups, keep=decision
    )
    assert kind in ABLE or wrote.layout == "uneven"
    assert kind in ABLE or json.loads((tmp_path / "config.json").read_text())["narrow"]["channels"]
    again = checkpoint.load(tmp_path).eval()
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", UNABLE)
def test_where_it_would_not_be_exact_it_is_refused_with_the_reason(kind: str) -> None:
    model = tiny(kind).eval()
    why = r"a way of its own|computes two things|size of a head|root of their number"
    with pytest.raises(BadInput, match=why):
        channels.thin(model, half(model.config.hidden_size))


def test_everything_of_the_stream_is_in_the_group() -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
                 head_dim=12)  # fmt: skip
    group = channels.group_of(model)
    width = model.config.hidden_size
    wide = {n for n, p in model.named_parameters() if width in p.shape}
    assert {s.param for s in group.slices} == wide
    read = {s.param.rpartition(".")[0].rpartition(".")[2] for s in group.reads}
    assert read == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}


@pytest.mark.parametrize("kind", ["gpt_neox"])  # test_architectures has the others
def test_a_folder_whose_norms_remember_is_the_same_in_a_fresh_process(
    kind: str, tmp_path: Path
) -> None:
    """From a cache too, and after a second narrowing of what was loaded."""
    model = tiny(kind).eval()
    channels.thin(model, half(model.config.hidden_size))
    for name in ("first", "second"):
        before, groups = copy.deepcopy(model.config), find_groups(model)
        decision = units.keep_all(groups)
        decision[groups[0].name][:8] = False
        units.remove(model, groups, decision)
        proved = checkpoint.save(model, None, tmp_path / name, original_config=before,
                                 groups=groups, keep=decision)  # fmt: skip
        assert (proved.layout, proved.difference < 1e-5) == ("uneven", True)
        model = checkpoint.load(tmp_path / name)
    with pytest.raises(BadInput, match="Start from the original model"):
        channels.thin(model, half(model.config.hidden_size))
    with pytest.raises(BadInput, match="cannot be padded"):
        checkpoint.write(
            model, None, tmp_path, original_config=model.config, pad=True,
            groups=find_groups(model), keep=units.keep_all(find_groups(model)),
        )  # fmt: skip


def test_a_norm_that_remembers_is_the_full_one_with_zeros_in_halves_too() -> None:
    full = torch.nn.LayerNorm(32).requires_grad_(False)
    full.weight.uniform_(0.5, 1.5), full.bias.uniform_(-1, 1)
    own = copy.deepcopy(full)
    own.weight, own.bias = (torch.nn.Parameter(p[:24].clone()) for p in (own.weight, own.bias))
    wide = WideNorm(own, 32)
    hidden = torch.randn(2, 5, 32) + 3
    hidden[..., 24:] = 0
    torch.testing.assert_close(wide(hidden[..., :24]), full(hidden)[..., :24])
    bf16 = wide.to(torch.bfloat16)(hidden[..., :24].bfloat16())
    assert bf16.dtype == torch.bfloat16
    torch.testing.assert_close(bf16.float(), full(hidden)[..., :24], atol=0.05, rtol=0.02)


def test_channels_that_are_read_most_stay() -> None:
    model = tiny("llama").eval()
    group = channels.group_of(model)
    with torch.no_grad():
        for s in group.reads:
            weight = model.get_parameter(s.param)
            weight.mul_(torch.where(torch.arange(group.size) % 2 == 0, 10.0, 0.1))
    found = scores.score(model, [group], [batch("llama")], criterion="wanda")[group.name]
    keep = channels.chosen(found, group.size // 2)
    assert keep.nonzero().flatten().tolist() == list(range(0, group.size, 2))


SMALL = ["--channels", "24", "--multiple", "1"]


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def test_they_go_first_with_all_else_after_them(
    prune: Any, tmp_path: Path, model_folder: Path
) -> None:
    done = prune(
        *SMALL, "--kinds", "vocabulary,neurons,heads", "--query-heads", "1",
        "--target-params", "45%", "--target-flops", "60%",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "Channels: 24 of 32 stay" in done.err
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    facts, narrow = told(tmp_path / "run"), checkpoint.load(tmp_path / "run/model")
    assert (facts["channels"]["after"], narrow.config.hidden_size) == (24, 24)
    assert facts["model"]["parameters"] == model.num_parameters()
    assert narrow.num_parameters() <= 0.45 * model.num_parameters()
    assert flops_per_token(narrow, context=256) <= 0.6 * flops_per_token(model, context=256)


def test_a_pythia_goes_all_the_way_with_norms_that_remember(
    prune: Any, run: Any, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "neox", "gpt_neox")
    done = prune(
        "--model", model, *SMALL, "--kinds", "vocabulary,neurons,heads,layers", "--target-params",
        "60%", "--recover-tokens", "128", "--validation-tokens", "64",
    )  # fmt: skip
    assert done.code == 0, done.err
    narrow = checkpoint.load(tmp_path / "run/model")
    assert (narrow.config.hidden_size, channels.wide(narrow.config)) == (24, 32)
    refused(run("export", tmp_path / "run", "--to", "gguf", "--out", tmp_path / "x.gguf"),
            "Prune without --channels")  # fmt: skip
    again = prune("--model", tmp_path / "run", "--out", tmp_path / "again", "--sparsity", "0.5")
    assert again.code == 0, again.err
    twice = checkpoint.load(tmp_path / "again/model")
    assert channels.wide(twice.config) == 32
    assert twice.num_parameters() < narrow.num_parameters()


def test_a_run_that_was_stopped_goes_on_with_the_same_channels(
    prune: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*SMALL, "--sparsity", "0", "--recover-tokens", "128", "--validation-tokens", "64"]
    assert prune(*asked, "--out", tmp_path / "whole").code == 0

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "recover", stopped)
        assert prune(*asked).code == 130
    monkeypatch.setattr(channels, "chosen", None)
    assert run("resume", tmp_path / "run").code == 0
    first, second = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("number", "rule"),
    [("32", "from 1 to 31, as the model has 32"), ("20", "a multiple of 8"), ("0", "at least 1")],
)
def test_a_number_that_no_model_has_is_refused(prune: Any, number: str, rule: str) -> None:
    refused(prune("--channels", number), rule)


def test_a_number_that_the_heads_do_not_divide_is_refused_where_no_stock_model_has_it() -> None:
    config = tiny("deepseek_v2", num_attention_heads=4, hidden_size=48).config
    config.num_attention_heads = 6
    with pytest.raises(BadInput, match="a multiple of 6, the heads of this model, got 16"):
        channels.check(config, 16)
    channels.check(tiny("llama").config, 8)
