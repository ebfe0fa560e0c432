"""Distillation: the divergence by hand, its gradient, and the teacher on disk."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm_narrow import distill, losses
from llm_narrow.distill import Cached, cached_distill_loss, cached_teacher, distill_loss
from llm_narrow.errors import BadInput
from llm_narrow.families import FAMILIES
from llm_narrow.losses import language_loss
from llm_narrow.settings import Settings
from llm_narrow.train import train
from tiny import VOCAB, batch, tiny
from training import small, text, weights

KINDS = sorted(set(FAMILIES) - {"mlp"})
BLOCKS = text(20)


def cached(folder: Path, teacher: Any, k: int, **given: Any) -> Cached:
    return cached_teacher(teacher, BLOCKS, folder / "teacher", k=k, **given)


def by_hand(student: Any, teacher: Any, tokens: Tensor, temperature: float) -> Tensor:
    """The sum over targets of KL(teacher || student), written out."""
    with torch.no_grad():
        p = (teacher(input_ids=tokens).logits[:, :-1].double() / temperature).softmax(-1)
    q = (student(input_ids=tokens).logits[:, :-1].double() / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum()


def gradient(model: Any, value: Tensor) -> Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_divergence_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 7: the student's gradient is not zero, and it is the right one."""
    monkeypatch.setattr(losses, "LEARNT", 5)
    student, teacher, tokens = tiny(kind, std=0.2), tiny(kind, std=0.2, seed=3), batch(kind)
    for temperature in (1.0, 2.5):
        found = distill_loss(teacher, temperature=temperature, mix=1.0)(student, tokens)
        wanted = temperature**2 * by_hand(student, teacher, tokens, temperature)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
        grad, right = gradient(student, found), gradient(student, wanted)
        assert grad.norm() > 1e-2
        assert (grad - right).norm() / right.norm() < 1e-4
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    student, teacher, tokens = small(), small(), batch("llama")
    found = distill_loss(teacher, temperature=2.0, mix=1.0)(student, tokens)
    assert found.item() == pytest.approx(0, abs=1e-4)
    other = gradient(student, distill_loss(tiny("llama"), mix=1.0)(student, tokens)).norm()
    assert gradient(student, found).norm() < 1e-4 * other


def test_mixed_with_the_language_loss() -> None:
    student, teacher, tokens = small(), tiny("llama"), batch("llama")
    alone = distill_loss(teacher, mix=1.0)(student, tokens).item()
    language = language_loss(student, tokens).item()
    for mix in (0.0, 0.3):
        found = distill_loss(teacher, mix=mix)(student, tokens).item()
        assert found == pytest.approx(mix * alone + (1 - mix) * language, rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_teacher_is_a_copy(autocast: bool) -> None:
    student, teacher, tokens = small(), tiny("llama", std=0.2), batch("llama")
    exact = distill_loss(teacher, mix=0.8)(student, tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rough = distill_loss(teacher, mix=0.8, bf16=True)(student, tokens)
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.02)
    one, two = gradient(student, rough), gradient(student, exact)
    assert torch.cosine_similarity(one, two, 0) > 0.98
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "llama"])
def test_cached_whole_it_is_the_same(kind: str, tmp_path: Path) -> None:
    student, teacher = tiny(kind, std=0.2), tiny(kind, std=0.2, seed=3)
    tokens = BLOCKS.tokens[[3, 17]].long()
    asked = {"temperature": 2.0}
    at_hand = distill_loss(teacher, mix=0.7, **asked)(student, tokens)
    on_disk = cached_distill_loss(cached(tmp_path, teacher, VOCAB, **asked), mix=0.7)
    found = on_disk(student, tokens)
    assert found.item() == pytest.approx(at_hand.item(), rel=1e-5)
    one, two = gradient(student, found), gradient(student, at_hand)
    assert (one - two).norm() / two.norm() < 1e-5


def test_cached_in_part_the_others_are_one_outcome(tmp_path: Path) -> None:
    student, teacher, tokens = small(), tiny("llama", std=0.1, seed=3), BLOCKS.tokens[4:6].long()
    with torch.no_grad():
        p = teacher(input_ids=tokens).logits[:, :-1].softmax(-1)
        q = student(input_ids=tokens).logits[:, :-1].softmax(-1)
    top = p.topk(5)
    known = q.gather(-1, top.indices)
    rest, left = 1 - top.values.sum(-1), 1 - known.sum(-1)
    wanted = (top.values * (top.values / known).log()).sum() + (rest * (rest / left).log()).sum()
    cut = cached_distill_loss(cached(tmp_path, teacher, 5), mix=1.0)
    found = cut(student, tokens)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert gradient(student, found).norm() > 1e-2
    assert 0 < found.item() < distill_loss(teacher, mix=1.0)(student, tokens).item()
    like = cut(teacher, tokens)
    assert like.item() == pytest.approx(0, abs=1e-4)


def test_the_cache_holds_every_target_once_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny("llama")
    cached(tmp_path, teacher, 3)
    shards = sorted((tmp_path / "teacher").glob("*.safetensors"))
    held = [load_file(s) for s in shards]
    assert [len(h["tokens"]) for h in held] == [16, 4]
    assert sum(h["rest"].numel() for h in held) == 20 * 8
    assert held[0]["tokens"].shape == (16, 8, 3)
    before = [s.read_bytes() for s in shards]
    shards[1].write_bytes(before[1][:-10])  # half-written
    asked = []
    real = distill._predictions
    monkeypatch.setattr(
        distill, "_predictions", lambda *given: asked.append(len(given[1])) or real(*given)
    )
    cached(tmp_path, teacher, 3)
    assert asked == [4]
    assert [s.read_bytes() for s in shards] == before
    cached(tmp_path, teacher, 3)
    assert asked == [4]


def test_training_on_it_brings_the_student_nearer(tmp_path: Path) -> None:
    teacher = tiny("llama", std=0.2, seed=3)
    settings = Settings(
        tokens=40 * 4 * 9, lr=1e-2, batch_size=4, choose="last", schedule="constant"
    )
    near = []
    held = cached(tmp_path, teacher, 32)
    for loss in (distill_loss(teacher, mix=1.0), cached_distill_loss(held, mix=1.0)):
        student = small()
        apart = by_hand(student, teacher, BLOCKS.tokens.long(), 1.0).item()
        train(student, BLOCKS, loss=loss, settings=settings)
        near.append(by_hand(student, teacher, BLOCKS.tokens.long(), 1.0).item())
        assert near[-1] < 0.8 * apart
    assert weights(teacher).keys() == weights(small()).keys()


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = tiny("llama", vocab_size=80), small()
    tokens = BLOCKS.tokens[:2].long()
    for loss in (distill_loss(teacher), cached_distill_loss(cached(tmp_path, teacher, 4))):
        with pytest.raises(BadInput, match="vocabulary has 64 tokens and the teacher's 80"):
            loss(student, tokens)
    with pytest.raises(BadInput, match="2 problems"):
        distill_loss(teacher, temperature=0.0, mix=1.5)
    with pytest.raises(BadInput, match="k must be from 1 to 80, the vocabulary, got 81"):
        cached(tmp_path / "b", teacher, 81)
    with pytest.raises(BadInput, match=r"something else.*\n.*k was 4 and is 5 now"):
        cached(tmp_path, teacher, 5)
    held = cached(tmp_path / "c", small(), 4)
    with pytest.raises(BadInput, match="no predictions for a block"):
        cached_distill_loss(held)(student, text(2, seed=8).tokens.long())

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distill, "save_file", full)
    with pytest.raises(BadInput, match="No space left on the disk"):
        cached(tmp_path / "d", small(), 4)
    assert [p.name for p in (tmp_path / "d" / "teacher").iterdir()] == ["about.json"]
