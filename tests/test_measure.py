"""Measurements against references computed by hand, on tiny models."""

import copy
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from llm_narrow import measure, rows
from llm_narrow.blocks import Blocks
from llm_narrow.errors import BadInput
from llm_narrow.measure import DocumentSums, TokenResults
from tiny import CONFIGS, VOCAB, tiny

EOS = 2


def packed(
    tokens: Tensor, *, sizes: Tensor | None = None, documents: Tensor | None = None
) -> Blocks:
    """Blocks of the tokens, (n, length); a byte each but for separators; a document a block."""
    n, length = tokens.shape
    own = torch.arange(n)[:, None].expand(n, length)
    return Blocks(
        tokens=tokens.int(),
        sizes=((tokens != EOS) if sizes is None else sizes).to(torch.int16),
        documents=(own if documents is None else documents).int(),
        sha256="0" * 64,
    )


def some_blocks(n: int = 5, length: int = 20) -> Blocks:
    g = torch.Generator().manual_seed(3)
    return packed(torch.randint(3, VOCAB, (n, length), generator=g))


def reference(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropies from the whole logits, (n, length - 1)."""
    with torch.no_grad():
        logits = model(tokens.long()).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:].long(), reduction="none")


def sums(
    nats: list[float],
    tokens: list[float],
    sizes: list[float] | None = None,
    hits: list[float] | None = None,
) -> DocumentSums:
    def f(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    n = len(nats)
    return DocumentSums(torch.arange(n), f(tokens), f(sizes or tokens), f(nats), f(hits or [0] * n))


@pytest.mark.parametrize("kind", CONFIGS)
def test_chunked_results_equal_those_of_whole_logits(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "CHUNK", 7)  # does not divide 2 x 19 positions
    model, blocks = tiny(kind), some_blocks()
    found = measure.token_results(model, blocks, batch_size=2)
    want = reference(model, blocks.tokens)
    torch.testing.assert_close(found.nats, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        best = model(blocks.tokens.long()).logits[:, :-1].argmax(-1)
    assert found.hits.equal(best == blocks.tokens[:, 1:])
    assert found.nats.dtype == torch.float32


def test_the_logits_of_a_batch_never_exist_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "CHUNK", 7)
    model, blocks = tiny("llama"), some_blocks(n=4)
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, o: made.append(o.numel() // VOCAB))
    measure.token_results(model, blocks, batch_size=4)
    assert max(made) <= 8  # 8 positions of the probe, then pieces of 7
    assert sum(made) == 8 + 8 + 4 * 19


def test_a_model_that_changes_its_logits_after_the_head_is_measured_whole():
    model, blocks = tiny("llama"), some_blocks()
    plain = measure.token_results(model, blocks).nats
    forward = model.forward

    def halved(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    model.forward = halved
    found = measure.token_results(model, blocks).nats
    torch.testing.assert_close(found, reference(model, blocks.tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


def test_soft_capped_logits_are_measured_as_the_model_gives_them():
    model = tiny("gemma3_text", final_logit_softcapping=1.5)
    blocks = some_blocks()
    found = measure.token_results(model, blocks).nats
    torch.testing.assert_close(found, reference(model, blocks.tokens), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32_and_not_equal_to_it():
    model, blocks = tiny("llama"), some_blocks()
    exact = measure.quality(model, blocks).loss.value
    fast = measure.token_results(model, blocks, bf16=True)
    assert fast.nats.dtype == torch.float32
    assert fast.nats.mean().item() == pytest.approx(exact, rel=0.02)
    assert fast.nats.mean().item() != exact


def test_measuring_leaves_mode_and_gradients_alone():
    model = tiny("gpt2").train()
    measure.token_results(model, some_blocks(n=1))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_dropout_is_off_while_measuring():
    model, blocks = tiny("gpt2").train(), some_blocks(n=1)  # gpt2 drops 10 % by default
    found = measure.token_results(model, blocks).nats
    torch.testing.assert_close(found, reference(model.eval(), blocks.tokens), rtol=1e-4, atol=1e-4)


def test_uniform_logits_cost_ln_v():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = measure.quality(model, some_blocks())
    assert found.loss.value == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found.bits_per_byte.value == pytest.approx(math.log2(VOCAB), rel=1e-6)  # a byte a token
    assert found.loss.low == pytest.approx(found.loss.high, rel=1e-6)
    assert (found.tokens, found.documents) == (5 * 19, 5)


def test_sums_by_document_by_hand():
    blocks = packed(
        torch.tensor([[5, 6, EOS, 7, 8], [8, 9, EOS, 5, 5]]),
        sizes=torch.tensor([[4, 3, 0, 0, 2], [1, 1, 0, 6, 5]]),  # 7 begins a character that 8 ends
        documents=torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 4, 4]]),
    )
    results = TokenResults(
        nats=torch.tensor([[1.0, 100, 2, 4], [8, 100, 16, 32]]),
        hits=torch.tensor([[True, True, False, True], [False, True, False, True]]),
    )
    found = measure.sums_of(results, blocks)
    assert found.documents.tolist() == [0, 1, 4]
    assert found.tokens.tolist() == [1, 3, 2]  # separators and first positions are no targets
    assert found.bytes.tolist() == [3, 0 + 2 + 1, 6 + 5]
    assert found.nats.tolist() == [1, 2 + 4 + 8, 16 + 32]
    assert found.hits.tolist() == [1, 1, 1]
    q = measure.quality_of(found)
    assert q.loss.value == pytest.approx(63 / 6)
    assert q.bits_per_byte.value == pytest.approx(63 / math.log(2) / 17)
    assert q.accuracy.value == pytest.approx(3 / 6)


def test_separators_at_the_edge_of_a_block_are_known_from_those_inside():
    blocks = packed(
        torch.tensor([[5, EOS, 6, 7], [8, 6, 5, EOS], [EOS, 4, 4, 6]]),
        sizes=torch.tensor([[3, 0, 0, 3], [1, 0, 1, 0], [0, 1, 1, 0]]),  # 6 begins a character
        documents=torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2], [3, 4, 4, 4]]),
    )
    found = measure.sums_of(TokenResults(torch.ones(3, 3), torch.ones(3, 3).bool()), blocks)
    assert dict(zip(found.documents.tolist(), found.tokens.tolist(), strict=True)) == {
        1: 2, 2: 2, 4: 3,
    }


def test_without_any_boundary_only_a_last_token_without_bytes_is_a_separator():
    blocks = packed(
        torch.tensor([[5, 6, 7, 7], [8, 6, 7, EOS]]),
        sizes=torch.tensor([[1, 0, 3, 1], [1, 0, 3, 0]]),
    )
    found = measure.sums_of(TokenResults(torch.ones(2, 3), torch.ones(2, 3).bool()), blocks)
    assert found.tokens.tolist() == [3, 2]


def test_what_fills_a_block_up_is_no_target():
    blocks = packed(
        torch.tensor([[5, 6, EOS, EOS], [7, 8, 9, EOS]]),
        documents=torch.tensor([[0, 0, -1, -1], [0, 0, 0, -1]]),
    )
    found = measure.sums_of(TokenResults(torch.ones(2, 3), torch.ones(2, 3).bool()), blocks)
    assert (found.documents.tolist(), found.tokens.tolist()) == ([0], [3])


def test_blocks_of_separators_alone_are_refused():
    with pytest.raises(BadInput, match="nothing but separators"):
        measure.quality(tiny("llama"), packed(torch.tensor([[5, EOS]])))


def test_bootstrap_of_two_documents_by_hand():
    # Resamples: AA (1/4) 1.0, AB or BA (1/2) 5/4, BB (1/4) 4/3: the 2.5 % and 97.5 % points.
    found = measure.quality_of(sums([1, 4], [1, 3])).loss
    assert (found.value, found.low, found.high) == pytest.approx((5 / 4, 1.0, 4 / 3))


def test_bootstrap_of_three_documents_against_all_27_resamples():
    nats, tokens = [1.0, 4.0, 9.0], [1.0, 3.0, 2.0]
    every = sorted(
        sum(nats[i] for i in draw) / sum(tokens[i] for i in draw)
        for draw in product(range(3), repeat=3)
    )
    found = measure.bootstrap(
        torch.tensor([nats, tokens], dtype=torch.float64).T,
        lambda s: s[..., 0] / s[..., 1],
        resamples=20_000,
    )
    assert found.value == pytest.approx(14 / 6)
    assert found.low == pytest.approx(every[0])  # 1/27 of the draws > 2.5 %
    assert found.high == pytest.approx(every[-1])


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    g = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        values = torch.randn(60, generator=g, dtype=torch.float64) + 3
        e = measure.bootstrap(values[:, None], lambda s: s[..., 0] / 60, resamples=1000)
        inside += e.low <= 3 <= e.high
    assert 180 <= inside <= 198


def test_bootstrap_is_seeded_and_independent_of_how_the_matrix_is_cut(
    monkeypatch: pytest.MonkeyPatch,
):
    many = sums([float(i % 7 + 1) for i in range(50)], [float(i % 3 + 1) for i in range(50)])
    whole = measure.quality_of(many)
    assert measure.quality_of(many, seed=1).loss.low != whole.loss.low
    monkeypatch.setattr(measure, "DRAWS", 350)
    assert measure.quality_of(many) == whole


def test_paired_difference_is_tighter_than_two_intervals():
    g = torch.Generator().manual_seed(0)
    nats = 50 + 20 * torch.rand(40, generator=g)
    a = sums(nats.tolist(), [20] * 40)
    b = sums((nats + 2).tolist(), [20] * 40)
    d = measure.difference(a, b)
    assert (d.value, d.low, d.high) == pytest.approx((0.1, 0.1, 0.1))
    assert measure.quality_of(b).loss.low < measure.quality_of(a).loss.high


def test_ratio_of_bits_per_byte_by_hand():
    a = sums([2, 6], [1, 1], sizes=[4, 4])
    b = sums([3, 9], [2, 2], sizes=[4, 4])  # another tokenizer: twice the tokens
    found = measure.bits_per_byte_ratio(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    with pytest.raises(BadInput, match="Compare bits per byte instead"):
        measure.difference(a, b)


def test_different_documents_cannot_be_compared():
    with pytest.raises(BadInput, match="same documents"):
        measure.difference(sums([1], [1]), sums([1, 2], [1, 1]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_is_as_good_as_itself_and_speeds_come_out(kind: str):
    model, blocks = tiny(kind), some_blocks(n=2)
    own = measure.document_sums(model, blocks)
    same = measure.difference(own, measure.document_sums(model, blocks))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    names = {"a": model, "b": copy.deepcopy(model)}
    found = measure.speed(names, prompt_tokens=8, new_tokens=3, repeats=3)
    assert list(found) == ["a", "b"]
    assert (found["a"].prefill_ratio.low, found["a"].decode_ratio.high) == (1, 1)
    b = found["b"]
    assert b.prefill > 0 and b.decode > 0
    assert b.decode_ratio.low <= b.decode_ratio.value <= b.decode_ratio.high


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of words w3, w4, … without padding token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    made = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", CONFIGS)
def test_completion_is_that_of_generate(kind: str):
    model, tokenizer = tiny(kind), words()
    config = copy.deepcopy(model.generation_config)
    text = measure.complete(model, tokenizer, "w5 w6 w7", new_tokens=6)
    assert model.generation_config == config
    ids = torch.tensor([[5, 6, 7]])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert text == tokenizer.decode(whole[0], skip_special_tokens=True)[len("w5 w6 w7") :]
    assert text.strip()


def test_completion_stops_at_the_end_of_text_and_at_the_last_position():
    model, tokenizer = tiny("llama"), words()
    first = measure.complete(model, tokenizer, "w5 w6 w7", new_tokens=3).split()
    model.generation_config.eos_token_id = [int(first[1][1:]), 60]
    stop = first.index(first[1])
    assert measure.complete(model, tokenizer, "w5 w6 w7", new_tokens=3).split() == first[:stop]
    model.generation_config.eos_token_id = None
    gpt2 = tiny("gpt2")
    long = " ".join(["w5"] * 62)
    assert len(measure.complete(gpt2, tokenizer, long, new_tokens=9).split()) <= 2
    with pytest.raises(BadInput, match="64 tokens, and the model only 64 positions"):
        measure.complete(gpt2, tokenizer, f"{long} w5 w5")
    with pytest.raises(BadInput, match="no tokens"):
        measure.complete(model, tokenizer, "")


def a_row(label: str = "after", folder: Path | None = None) -> rows.Row:
    model, blocks = tiny("llama"), some_blocks(n=2)
    own = measure.document_sums(model, blocks)
    timed = measure.speed({"a": model}, prompt_tokens=8, new_tokens=2, repeats=1)["a"]
    return measure.row(
        label, model, own, name="tiny", sha256="ab", domain="python", part="held_out",
        first=own, folder=folder, timed=timed, prompt_tokens=8, seconds=1.5,
    )


def test_a_row_holds_what_was_measured(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    row = a_row(folder=tmp_path)
    assert (row.bytes, row.tokens, row.documents) == (5, 38, 2)
    assert row.loss_difference == rows.Estimate(0, 0, 0)
    assert row.bits_per_byte_ratio == rows.Estimate(1, 1, 1)
    assert row.prefill_ratio == rows.Spread(1, 1, 1)


def test_rows_of_other_tokens_or_documents_are_compared_as_far_as_that_is_fair():
    def compared(first: DocumentSums) -> rows.Row:
        return measure.row(
            "b", tiny("llama"), sums([3, 9], [2, 2], sizes=[4, 4]), name="b", sha256="ab",
            domain="python", part="held_out", first=first,
        )

    row = compared(sums([2, 6], [1, 1], sizes=[4, 4]))
    assert row.loss_difference is None
    assert row.bits_per_byte_ratio is not None and row.bits_per_byte_ratio.value == 1.5
    assert compared(sums([2], [1])).bits_per_byte_ratio is None
