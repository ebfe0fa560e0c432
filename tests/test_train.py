"""The loop: what it computes, what it refuses, and what it tells."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from llm_narrow import live, losses
from llm_narrow.errors import BadInput, NarrowError, UnknownName
from llm_narrow.families import FAMILIES, find_groups
from llm_narrow.live import curve, histogram
from llm_narrow.lora import layers, merged, with_lora
from llm_narrow.losses import language_loss
from llm_narrow.settings import Settings
from llm_narrow.train import Step, train
from tiny import CONFIGS, batch, outputs, tiny
from training import ROOT, Fading, small, text, weights

LENGTH = 9
SHORT = Settings(tokens=4 * 4 * LENGTH, lr=1e-2, batch_size=4, evaluate_every=2)


def go(model: nn.Module, settings: Settings = SHORT, **given: Any) -> Any:
    given = {"loss": language_loss, "validation": text(6, seed=9), **given}
    return train(model, given.pop("blocks", text()), settings=settings, **given)


def plain_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name, p in first.items():
        torch.testing.assert_close(p, second[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_chunks_give_the_gradients_of_the_plain_loss(
    kind: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LEARNT", 5)
    found = []
    for loss in (language_loss, plain_loss):
        model = tiny(kind, std=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, batch(kind))
        (3 * value).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(g.dtype == torch.float32 for g in grads.values())
        found.append((value.item(), grads))
    (value, grads), (wanted, wanted_grads) = found
    assert value == pytest.approx(wanted, rel=1e-3 if bf16 else 1e-6)
    assert grads.keys() == wanted_grads.keys()
    largest = max(g.norm() for g in wanted_grads.values())  # some are zero but for rounding
    for name, g in grads.items():
        error = (g - wanted_grads[name]).norm() / (wanted_grads[name].norm() + 0.01 * largest)
        assert error < (0.03 if bf16 else 1e-5), name


def test_the_output_weight_is_cast_once_not_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = small(tie_word_embeddings=False)
    shape = model.lm_head.weight.shape
    casts = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_to_copy" in str(f) and args[0].shape == shape and args[0].dtype == torch.float32:
                casts.append(f)
            return f(*args, **(kwargs or {}))

    monkeypatch.setattr(losses, "LEARNT", 2)
    with Counting(), torch.autocast("cpu", torch.bfloat16):
        language_loss(model, batch("llama"))
    assert len(casts) == 1


def test_micro_batches_are_one_batch() -> None:
    found = []
    for size, micro in ((4, 1), (1, 4), (2, 2)):
        model = small()
        done = go(model, replace(SHORT, batch_size=size, accumulation=micro, choose="last"))
        assert (done.steps, done.tokens) == (4, 4 * 4 * LENGTH)
        found.append((weights(model), done.validation))
    for other, validation in found[1:]:
        close(other, found[0][0])
        assert validation == pytest.approx(found[0][1], rel=1e-5)


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Losses to 1e-6 and weights to 1e-5, relative: sums in float32 in another order."""
    script = [str(ROOT / "training.py"), "two", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + script, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = small()
    alone = go(model, replace(SHORT, choose="last"), rows=tmp_path / "alone.jsonl")
    close(load_file(tmp_path / "final.safetensors"), weights(model))
    both = json.loads((tmp_path / "done.json").read_text())
    assert both["validation"] == pytest.approx(alone.validation, rel=1e-6)
    rows = [read(tmp_path / name) for name in ("train.jsonl", "alone.jsonl")]
    for two, one in zip(*rows, strict=True):
        assert (two["step"], two["tokens"]) == (one["step"], one["tokens"])
        for name, tolerance in (("loss", 1e-6), ("validation", 1e-6), ("gradient_norm", 1e-4)):
            if one.get(name) is not None:
                assert two[name] == pytest.approx(one[name], rel=tolerance)


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.parametrize("world, expected", [("2", None), ("1", 2)])
def test_missing_processes_are_refused(
    world: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(small())  # the first run of a process would wait for the others
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(NarrowError, match=r"2 processes .* of 1\..*torchrun --nproc_per_node 2"):
        go(small(), expected_processes=expected)


def test_the_loss_falls_and_the_best_weights_are_chosen() -> None:
    model = small()
    done = go(model, replace(SHORT, tokens=30 * 4 * LENGTH))
    assert done.steps == 30 and done.validation < done.first - 0.2
    # With a wild rate at the end of it all, the best weights are those of the start.
    model, before = small(), weights(small())
    wild = go(model, replace(SHORT, lr=30.0, clip=None))
    assert (wild.chosen, wild.validation) == (0, wild.first)
    close(weights(model), before, 0.0)
    last = go(small(), replace(SHORT, lr=30.0, clip=None, choose="last"))
    assert last.chosen == 4 and last.validation > last.first


def test_every_epoch_sees_every_block_once_in_another_order() -> None:
    seen = []

    def watched(model: Any, tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return language_loss(model, tokens)

    blocks = text(8)
    go(small(), loss=watched, blocks=blocks)
    assert [len(s) for s in seen] == [4] * 4
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert not first.equal(second) and not first.equal(blocks.tokens.long())
    for epoch in (first, second):
        assert epoch.unique(dim=0).equal(blocks.tokens.long().unique(dim=0))


def test_rates() -> None:
    s = Settings(tokens=1, lr=1.0, warmup=0.2)
    rates = [s.rate(n, 10) for n in range(1, 11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == pytest.approx([(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])
    constant = replace(s, schedule="constant")
    assert [constant.rate(n, 10) for n in (3, 10)] == [1.0, 1.0]
    left = []

    def told(model: Any, step: Step) -> dict[str, float]:
        left.append((step.lr, step.lr_left))
        return {}

    go(small(), after_step=told)
    assert [lr for lr, _ in left] == pytest.approx([SHORT.rate(n, 4) for n in range(1, 5)])
    assert [rest for _, rest in left] == pytest.approx(
        [sum(lr for lr, _ in left[n:]) for n in range(1, 5)]
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    calls = []

    def breaking(model: Any, tokens: Tensor) -> Tensor:
        calls.append(weights(model))
        return language_loss(model, tokens) * (math.nan if len(calls) == 4 else 1)

    model = small()
    with pytest.raises(NarrowError, match=r"Step 4 of 8: the loss is nan.*state of step 2 is kept"):
        go(model, replace(SHORT, tokens=8 * 4 * LENGTH), loss=breaking, state=tmp_path / "state")
    close(weights(model), calls[-1], 0.0)
    assert not model.training


def test_before_step_sees_the_gradients_before_they_are_clipped(tmp_path: Path) -> None:
    def larger(model: Any, step: Step) -> None:
        for p in model.parameters():
            p.grad.mul_(1000)

    go(small(), before_step=larger, rows=tmp_path / "train.jsonl")
    assert all(row["gradient_norm"] > 100 for row in read(tmp_path / "train.jsonl")[1:])


def test_rows(tmp_path: Path) -> None:
    rows = tmp_path / "new" / "train.jsonl"
    done = go(small(), after_step=Fading(), rows=rows)
    found = read(rows)
    assert [r["step"] for r in found] == [0, 1, 2, 3, 4]
    assert [r["tokens"] for r in found] == [n * 4 * LENGTH for n in range(5)]
    assert [r["validation"] is not None for r in found] == [True, False, True, False, True]
    assert found[0]["validation"] == done.first
    assert all(r["strength"] > 0 and "norms" not in r for r in found[1:])
    go(small(), rows=rows)
    assert len(read(rows)) == 5  # not ten: without a state a run begins anew


def test_bfloat16_learns_with_float32_weights() -> None:
    model = small()
    done = go(model, replace(SHORT, tokens=30 * 4 * LENGTH, bf16=True))
    assert done.validation < done.first - 0.2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_activation_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        model = small()
        go(model, replace(SHORT, checkpointing=checkpointing))
        found.append(weights(model))
        assert not model.is_activation_checkpointing
    close(*found)
    model.__class__ = type("Old", (type(model),), {"supports_gradient_checkpointing": False})
    with pytest.raises(BadInput, match="Old has no activation checkpointing"):
        go(model, replace(SHORT, checkpointing=True))


def test_bad_input(tmp_path: Path) -> None:
    wrong = {
        "tokens": 0, "lr": math.nan, "warmup": 1.0, "batch_size": 0, "clip": 0.0,
        "betas": (0.9, 1.0), "weight_decay": -1.0, "save_every_minutes": 0.0,
    }  # fmt: skip
    with pytest.raises(BadInput, match="8 problems") as told:
        Settings(**wrong)  # type: ignore[arg-type]
    assert all(name in str(told.value) for name in wrong)
    with pytest.raises(UnknownName, match=r"'cosin' is unknown. Did you mean 'cosine'"):
        Settings(tokens=1, schedule="cosin")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="takes 32 blocks of 9 tokens, and there are 16"):
        go(small(), replace(SHORT, accumulation=8))
    with pytest.raises(BadInput, match=r"float32 weights, .* is bfloat16"):
        go(small().to(torch.bfloat16))
    with pytest.raises(BadInput, match="nothing can be trained"):
        go(small().requires_grad_(False))
    with pytest.raises(UnknownName, match=r"'tensorbord' is unknown. Did you mean 'tensorboard'"):
        go(small(), trackers=["tensorbord"])
    with pytest.raises(BadInput, match="'tensorboard' writes files"):
        go(small(), trackers=["tensorboard"])


def test_trackers_are_told(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = tmp_path / "train.jsonl"
    go(small(), logs=tmp_path / "logs", rows=rows)
    seen = EventAccumulator(str(tmp_path / "logs" / "llm-narrow")).Reload()
    told = {e.step: e.value for e in seen.Scalars("loss")}
    assert told == pytest.approx({r["step"]: r["loss"] for r in read(rows)[1:]})


def test_lines_in_a_pipe_and_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    go(small(), console=Console(file=out, width=200), what="Recovering", after_step=Fading())
    assert "Recovering: 4 of 4 steps, training loss" in out.getvalue()
    assert "validation loss" in out.getvalue() and "strength" in out.getvalue()
    out = io.StringIO()
    console = Console(file=out, width=100, height=40, force_terminal=True)
    go(small(), console=console, what="Recovering", after_step=Fading())
    for word in ("Recovering: step 4 of 4", "validation loss", "tokens/s", "left", "group norms"):
        assert word in out.getvalue()
    seen = live._Seen("x", 10, 0)
    seen.add({"step": 0, "tokens": 0, "validation": 3.0}, ())
    assert seen.line() == "x: 0 of 10 steps, validation loss 3.0000 (best 3.0000)"


def test_drawings() -> None:
    assert histogram([0.0] * 8 + [1.0], columns=4) == "0 █  ▁ 1"
    assert histogram([2.0, 2.0], columns=3) == "2 █   2"
    assert curve([1.0, 2.0, 3.0]) == "▁▄█"


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"mlp"}))
def test_lora(kind: str) -> None:
    model: Any = tiny(kind)
    before, given = weights(model), outputs(model, kind)
    model = with_lora(model, rank=2)
    assert outputs(model, kind).equal(given)
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 2 * len(layers(small(kind))) and all("lora" in n for n in learned)
    longer = replace(SHORT, lr=0.01, tokens=20 * 4 * LENGTH, choose="last")
    done = go(model, longer, validation=text())
    slow = kind in ("bloom", "granite")  # small steps by their norms and multipliers
    assert done.validation < done.first - (0.05 if slow else 0.1)
    adapted = outputs(model, kind)
    model = merged(model)
    torch.testing.assert_close(outputs(model, kind), adapted, rtol=1e-4, atol=1e-4)
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {n.rpartition(".")[0] for n in after if not after[n].equal(before[n])}
    assert changed == set(layers(model))
    assert all(p.requires_grad for p in model.parameters())
    assert len(find_groups(model)) == len(find_groups(small(kind)))


def test_lora_refuses_ranks() -> None:
    with pytest.raises(BadInput, match=r"at most 16, the width of .*k_proj, got 17"):
        with_lora(small(), rank=17)
    with pytest.raises(BadInput, match="at least 1, got 0"):
        with_lora(small(), rank=0)


MEMORY = """
import sys, torch
from torch.nn import functional as F
from llm_narrow.losses import language_loss
from tiny import tiny
from test_train import plain_loss
torch.set_num_threads(1)
model = tiny("llama", std=0.02, vocab_size=49152, hidden_size=576, num_attention_heads=9,
             num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=512).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
tokens = torch.randint(3, 49152, (4, 512))
for _ in range(2):
    with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[2] == "bf16"):
        loss = {"plain": plain_loss, "chunked": language_loss}[sys.argv[1]](model, tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_memory_of_a_step_at_a_large_vocabulary(precision: str) -> None:
    """4 x 512 tokens, vocabulary 49,152, 2 layers: peak of the whole process."""

    def peak(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, how, precision],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )
        return int(done.stdout.split()[-1])

    chunked, plain = peak("chunked"), peak("plain")
    print(f"{precision}: {chunked / 1024:.0f} MB against {plain / 1024:.0f} MB")
    assert chunked / plain <= 0.75
