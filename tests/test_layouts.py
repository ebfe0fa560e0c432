"""Uneven models in a stock layout and back: the same logits, the same units."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import refused
from folders import write_model
from llm_narrow import checkpoint
from llm_narrow.families import find_groups
from llm_narrow.padding import padded_config, padded_state
from llm_narrow.units import remove
from tiny import CONFIGS, batch, tiny, uneven

# Experts of a layer are one tensor, and fast kernels ask for even widths: they are cut evenly.
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"}


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - EXPERTS))
def test_a_padded_model_is_a_stock_one_with_the_same_logits(kind: str) -> None:
    model = tiny(kind)
    config: Any = model.config
    groups = find_groups(model)
    keep = uneven(groups)
    remove(model, groups, keep)
    wide = padded_config(config, groups, keep, keep)
    assert wide is not None
    twin = checkpoint.STOCK.from_config(wide)
    twin.load_state_dict(padded_state(model, twin), strict=True)
    twin.tie_weights()
    tokens = batch(kind)
    with torch.no_grad():
        ours, theirs = model.eval()(tokens).logits, twin.eval()(tokens).logits
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    for g in find_groups(twin):
        widest = max(int(keep[o.name].sum()) for o in groups if o.kind == g.kind)
        own = next(o for o in groups if o.name == g.name)
        assert g.size == (widest if own.config is not None else own.size)


def test_prune_writes_uneven_layers_padded_and_convert_undoes_it(
    prune: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--allocation", "global", "--multiple", "1", "--sparsity", "0.4"]
    padded, tight = tmp_path / "padded", tmp_path / "tight"
    assert prune(*flags, "--layout", "padded", "--out", padded).code == 0
    assert prune(*flags, "--out", tight).code == 0
    told = json.loads((padded / "manifest.json").read_text())["checkpoint"]
    assert (told["layout"], told["model_type"]) == ("padded", "llama")
    stock = AutoModelForCausalLM.from_pretrained(padded / "model").eval()
    ours = checkpoint.load(tight / "model")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(stock(tokens).logits, ours(tokens).logits, atol=1e-4)
    back, forth = tmp_path / "back", tmp_path / "forth"
    for source, layout, out in ((padded, "uneven", back), (tight, "padded", forth)):
        done = run("convert", source, "--layout", layout, "--out", out, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["layout"] == layout
    again, keep = checkpoint.load(back), checkpoint.read_keep(back / checkpoint.KEEP)
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: tuple(p.shape) for n, p in ours.named_parameters()
    }
    assert all(torch.equal(v, checkpoint.read_keep(tight / "model" / checkpoint.KEEP)[n])
               for n, v in keep.items())  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, ours(tokens).logits, atol=1e-5)
    refused(run("convert", forth, "--layout", "padded", "--out", tmp_path / "x"), "already")
    refused(run("convert", back, "--layout", "even", "--out", tmp_path / "x"), "'even'")


def test_an_even_model_is_not_converted(run: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "even")
    refused(run("convert", folder, "--layout", "padded", "--out", tmp_path / "x"), "same width")
