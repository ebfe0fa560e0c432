"""A model without a layer, or without half of one, is the model that skips it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_narrow.depth import (
    Half,
    Skipped,
    carried,
    counted,
    layers_of,
    remove_layers,
    silence,
    stack_of,
    take_out,
)
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups
from llm_narrow.units import keep_all
from tiny import CONFIGS, batch, outputs, tiny

FAMILIES = sorted(set(CONFIGS) - {"mlp"})
HALVES: tuple[Half, ...] = ("attention", "mlp")
TOLERANCE = 1e-4  # of the largest logit, in float32


def deep(kind: str, **changes: object) -> Any:
    """A tiny model of four layers, the second two like the first two."""
    for key, value in CONFIGS[kind].items():
        if isinstance(value, list) and len(value) == 2:
            changes.setdefault(key, value * 2)
    if kind == "gpt_neo":
        changes |= {"attention_types": [[["global", "local"], 2]]}
    return tiny(kind, num_hidden_layers=4, **changes)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@contextmanager
def skipping(model: Any, numbers: set[int]) -> Iterator[None]:
    """Within, the layers give what they are fed."""
    layers = layers_of(model)
    handles = []
    for number in numbers:

        def same(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
            fed = args[0] if args else kwargs["hidden_states"]
            return (fed, *out[1:]) if isinstance(out, tuple) else fed

        layer = model.get_submodule(layers[number].name)
        handles.append(layer.register_forward_hook(same, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_without_layers_is_one_that_skips_them(kind: str, tmp_path: Path) -> None:
    model = deep(kind)
    with skipping(model, {0, 2}):
        expected = outputs(model, kind)
    whole = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for n in (0, 2) for p in model.get_submodule(
        layers_of(model)[n].name).parameters())  # fmt: skip
    remove_layers(model, torch.tensor([False, True, False, True]))
    assert difference(expected, outputs(model, kind)) <= TOLERANCE
    assert sum(p.numel() for p in model.parameters()) == whole - own
    assert len(layers_of(model)) == model.config.num_hidden_layers == 2
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert difference(expected, outputs(again, kind)) <= TOLERANCE


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shorter_model_writes_from_its_cache_what_it_writes_without(kind: str) -> None:
    model = deep(kind)
    remove_layers(model, torch.tensor([False, True, True, False]))
    assert difference(outputs(model, kind), stepwise(model, batch(kind))) <= TOLERANCE


def stepwise(model: Any, tokens: Tensor) -> Tensor:
    """Logits with the last two tokens read one by one, from the cache of those before."""
    with torch.no_grad():
        out = model(tokens[:, :-2], use_cache=True)
        found = [out.logits]
        for at in (-2, -1):
            token = tokens[:, at:][:, :1]
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_silent_half_is_one_that_adds_nothing(kind: str, half: Half) -> None:
    """Where both halves are silent, the layer is skipped (but for norms of the sum itself)."""
    model, other = deep(kind), deep(kind)
    layer = layers_of(model)[1]
    if not (layer.attention and layer.mlp):
        return  # units of a kind are refused: see `families.refused_kinds`
    silence(model, layer.half(half))
    assert difference(outputs(other, kind), outputs(model, kind)) > 1e-3
    silence(model, layer.groups)
    with skipping(other, {1}):
        expected = outputs(other, kind)
    assert difference(expected, outputs(model, kind)) <= TOLERANCE


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_half_a_layer_taken_out_equals_it_silent(kind: str, half: Half) -> None:
    model, silent = deep(kind), deep(kind)
    layers = [layers_of(model)[n] for n in (0, 2)]
    gone = [g for layer in layers for g in layer.half(half)]
    if not gone:
        return  # units of this kind are refused: see `families.refused_kinds`
    silence(silent, gone)
    before = sum(p.numel() for p in model.parameters())
    take_out(model, find_groups(model), emptied(model, gone))
    expected = outputs(silent, kind)
    assert difference(expected, outputs(model, kind)) <= TOLERANCE
    assert difference(expected, stepwise(model, batch(kind))) <= TOLERANCE
    assert sum(p.numel() for p in model.parameters()) < before


def emptied(model: Any, gone: list[Any]) -> dict[str, Tensor]:
    keep = keep_all(find_groups(model))
    return keep | {g.name: torch.zeros(g.size, dtype=torch.bool) for g in counted(gone)}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama", "opt", "qwen2_moe"])
def test_weights_without_half_a_layer_are_loaded_into_a_skeleton(
    kind: str, half: Half, tmp_path: Path
) -> None:
    """As the uneven layout does it: the same removal on a model without memory, then the file."""
    model = deep(kind)
    gone = list(layers_of(model)[1].half(half))
    if not gone:
        return
    keep = emptied(model, gone)
    take_out(model, find_groups(model), keep)
    expected = outputs(model, kind)
    state = {name: t.clone() for name, t in model.state_dict().items()}  # tied ones apart
    save_file(state, tmp_path / "model.safetensors")
    with init_empty_weights(include_buffers=False):
        twin: Any = AutoModelForCausalLM.from_config(model.config)
    take_out(twin, find_groups(twin), keep)
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    twin.tie_weights()
    assert difference(expected, outputs(twin.eval(), kind)) <= 1e-6


def test_a_part_of_an_mlp_does_not_go_alone() -> None:
    model = deep("qwen2_moe")
    part = next(g for g in find_groups(model) if g.name.endswith("shared_expert"))
    with pytest.raises(BadInput, match="must keep at least one of its neurons"):
        take_out(model, find_groups(model), emptied(model, [part]))


def test_names_follow_the_layers_that_are_left() -> None:
    keep = {f"model.layers.{n}.mlp": torch.tensor([n > 0]) for n in range(4)}
    keep |= {"model.layers.3": torch.tensor([True]), "other": torch.tensor([False])}
    layers = torch.tensor([False, True, False, True])
    found = carried(keep, layers, "model.layers")
    assert sorted(found) == ["model.layers.0.mlp", "model.layers.1", "model.layers.1.mlp", "other"]
    assert found["model.layers.1.mlp"] is keep["model.layers.3.mlp"]


def test_types_of_layers_are_cut_with_them() -> None:
    model = deep("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2)
    remove_layers(model, torch.tensor([True, False, False, True]))
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_a_layer_whose_number_matters_is_refused() -> None:
    model = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(BadInput, match="scale_attn_by_inverse_layer_idx"):
        remove_layers(model, torch.tensor([True, False, True, True]))


@pytest.mark.parametrize("keep", [[True] * 3, [False] * 4])
def test_a_mask_that_does_not_fit_is_refused(keep: list[bool]) -> None:
    with pytest.raises(BadInput, match="4 bools"):
        remove_layers(deep("llama"), torch.tensor(keep))


def test_a_rule_that_counts_layers_is_refused_where_it_would_lie() -> None:
    """Every second layer of such a Qwen has experts, by a rule that a cut would shift."""
    pytest.importorskip("llm_narrow.families_experts")
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BadInput, match="a rule of its own"):
        remove_layers(model, torch.tensor([False, True, True, True]))
    remove_layers(model, torch.tensor([False, False, True, True]))
    assert len(model.model.layers) == 2


def test_a_plain_stack_has_no_layers_to_remove() -> None:
    model = tiny("mlp")
    with pytest.raises(BadInput, match="no list of layers"):
        stack_of(model, find_groups(model))


def test_skipped_attention_leaves_the_length_of_the_cache_true() -> None:
    model = deep("llama")
    group = layers_of(model)[0].attention[0]
    take_out(model, find_groups(model), emptied(model, [group]))
    assert isinstance(model.get_submodule(group.name), Skipped)
    assert all(0 in p.shape for p in model.get_submodule(group.name).parameters())
    assert next(g for g in find_groups(model) if g.name == group.name).size == 0
    with torch.no_grad():
        out = model(batch("llama"), use_cache=True)
    assert out.past_key_values.get_seq_length() == batch("llama").shape[1]
