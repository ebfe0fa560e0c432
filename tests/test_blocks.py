"""Packed blocks: token ids, bytes and documents agree with the text, and with themselves."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llm_narrow import blocks
from llm_narrow.blocks import Blocks, pack
from llm_narrow.domains import PARTS, Document, Domain
from llm_narrow.errors import BadInput

TEXTS = [
    "def greet(name):\n    return f'hello {name}'\n",
    "# 中文注释 😀👩‍👩‍👧 naïve\nvalue = '中文'\n",
    "x = '<|end|>'  # spelled out\n",
    "\n\n    indented = 1\t\n   ",
    *(f"def f{i}(a, b):\n    return a + b * {i}\n" for i in range(40)),
]
EOS = "<|end|>"


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {"eos_token": EOS}))


def byte_level() -> Tokenizer:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False
    )
    own.train_from_iterator(TEXTS, trainer)
    return own


def lower_case() -> Tokenizer:
    """Byte-level, but its tokens are not of the text's own bytes (ß becomes ss, ﬁ becomes fi)."""
    own = byte_level()
    own.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return own


def added_space() -> Tokenizer:
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", EOS], unk_token="<unk>", show_progress=False
    )
    own.train_from_iterator(TEXTS, trainer)
    return own


def domain(texts: list[str] = TEXTS) -> Domain:
    documents = tuple(Document("p", f"{i}.py", text) for i, text in enumerate(texts))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Domain("made", {part: documents for part in PARTS}, {}, dict.fromkeys(PARTS, digest))


def bytes_by_document(found: Blocks) -> dict[int, int]:
    totals: dict[int, int] = {}
    for owner, size in zip(found.documents.flatten(), found.sizes.flatten(), strict=True):
        totals[int(owner)] = totals.get(int(owner), 0) + int(size)
    return totals


@pytest.mark.parametrize("make", [byte_level, lower_case, added_space])
def test_sizes_sum_to_the_bytes_of_every_document(make: Any) -> None:
    # Blocks of one token drop no tail, so that nothing may be missing.
    texts = [*TEXTS, "ﬁne Straße ½ Ⅳ İ"]
    found = pack(domain(texts), "train", wrapped(make()), length=1)
    assert bytes_by_document(found) == {i: len(text.encode()) for i, text in enumerate(texts)}
    assert (found.sizes >= 0).all()
    assert found.sizes.dtype == torch.int16
    assert found.tokens.dtype == found.documents.dtype == torch.int32


def test_byte_level_tokens_have_their_own_bytes() -> None:
    tokenizer = wrapped(byte_level())
    found = pack(domain(["a😀中 b"]), "train", tokenizer, length=1)
    tokens = tokenizer.convert_ids_to_tokens(found.tokens.flatten().tolist())
    assert found.sizes.flatten().tolist() == [*map(len, tokens[:-1]), 0]
    assert len(tokens) > len("a😀中 b") + 1, "no character is made of several tokens"


def test_offsets_give_each_token_what_it_adds() -> None:
    # By hand: "é" is 2 bytes, of two tokens; the space and the emoji's 4 bytes are claimed by none.
    offsets = [(0, 1), (1, 2), (1, 2), (3, 4)]
    assert blocks._by_offsets("aéxb😀", offsets).tolist() == [1, 2, 0, 6]
    assert blocks._by_offsets("é 中", [(0, 1), (2, 3)]).tolist() == [2, 4]
    assert blocks._by_offsets("   ", []).tolist() == []


def test_blocks_are_the_documents_end_to_end_with_separators() -> None:
    tokenizer = wrapped(byte_level())
    found = pack(domain(), "train", tokenizer, length=16)
    flat, owners = found.tokens.flatten().tolist(), found.documents.flatten().tolist()
    order = list(dict.fromkeys(owners))
    expected = []
    for index in order:
        expected += tokenizer(
            TEXTS[index], add_special_tokens=False, split_special_tokens=True
        ).input_ids
        expected.append(tokenizer.eos_token_id)
    everything = pack(domain(), "train", tokenizer, length=1).tokens.numel()
    assert flat == expected[: len(flat)]
    assert len(flat) == everything // 16 * 16 != everything
    assert order != sorted(order), "the documents are not shuffled"
    assert found.sha256 == hashlib.sha256(found.tokens.numpy().astype("<i4").tobytes()).hexdigest()


def test_a_special_token_spelled_out_is_text() -> None:
    tokenizer = wrapped(byte_level())
    found = pack(domain([TEXTS[2]]), "train", tokenizer, length=1)
    assert (found.tokens == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(found.tokens.flatten()[:-1]) == TEXTS[2]
    assert tokenizer(EOS).input_ids == [tokenizer.eos_token_id], "the user's tokenizer was changed"


def test_tokens_longer_than_int16_keep_their_bytes() -> None:
    own = Tokenizer(models.WordLevel({"<unk>": 0, EOS: 1}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    found = pack(domain(["y" * 40_000]), "train", wrapped(own), length=1)
    assert found.sizes.flatten().tolist() == [40_000, 0]


def test_the_second_time_nothing_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wrapped(byte_level())
    first = pack(domain(), "train", tokenizer, length=16)

    def refuse(*args: Any) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "tokenised", refuse)
        again = pack(domain(), "calibration", tokenizer, length=16)
        for other in ({"length": 8}, {"tokenizer": wrapped(lower_case())}):
            with pytest.raises(AssertionError, match="tokenised again"):
                pack(domain(), "train", **{"tokenizer": tokenizer, "length": 16, **other})
    assert again.sha256 == first.sha256
    for column in ("tokens", "sizes", "documents"):
        assert torch.equal(getattr(again, column), getattr(first, column))


def test_damaged_blocks_are_made_again(cache: Path) -> None:
    tokenizer = wrapped(byte_level())
    first = pack(domain(), "train", tokenizer, length=16)
    (file,) = (cache / "blocks").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert pack(domain(), "train", tokenizer, length=16).sha256 == first.sha256


def test_progress_is_told_for_every_document() -> None:
    told = []

    def track(items: Any, what: str, total: int | None = None) -> Any:
        for item in items:
            told.append(what)
            yield item

    pack(domain(), "held_out", wrapped(byte_level()), length=16, track=track)
    assert len(told) == len(TEXTS)


def numbered(count: int, length: int = 4) -> Blocks:
    tokens = torch.arange(count * length, dtype=torch.int32).reshape(count, length)
    return Blocks(tokens, tokens.short(), tokens + 1, "")


def test_take_chooses_whole_blocks_without_replacement() -> None:
    found = numbered(10)
    taken = found.take(17, seed=3)
    firsts = taken.tokens[:, 0].tolist()
    assert taken.tokens.shape == (5, 4)
    assert len(set(firsts)) == 5
    assert set(firsts) <= set(range(0, 40, 4))
    assert torch.equal(taken.documents, taken.tokens + 1)
    assert torch.equal(taken.sizes, taken.tokens.short())
    assert taken.sha256 == found.take(17, seed=3).sha256 != found.take(17, seed=4).sha256
    assert torch.equal(found.take(8, seed=3).tokens, taken.tokens[:2])
    assert sorted(found.take(40, seed=0).tokens[:, 0].tolist()) == list(range(0, 40, 4))


def test_take_more_than_there_is() -> None:
    with pytest.raises(BadInput, match=r"1,000 tokens .* hold 40 in whole blocks of 4\. Ask"):
        numbered(10).take(1000, seed=0)


def test_halves_alternate() -> None:
    one, other = numbered(5).halves()
    assert one.tokens[:, 0].tolist() == [0, 8, 16]
    assert other.tokens[:, 0].tolist() == [4, 12]
    with pytest.raises(BadInput, match="at least 2 blocks of 4 tokens, got 1"):
        numbered(1).halves()


def test_batches_are_the_blocks_in_order() -> None:
    batches = numbered(5).batches(2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 4), (2, 4), (1, 4)]
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert torch.equal(torch.cat(list(batches)), numbered(5).tokens.long())


def test_a_part_shorter_than_a_block() -> None:
    with pytest.raises(BadInput, match=r"calibration part of domain 'made' has \d+ tokens.*512"):
        pack(domain(TEXTS[:1]), "calibration", wrapped(byte_level()))


def test_tokenizers_that_cannot_serve() -> None:
    with pytest.raises(BadInput, match=r"no end-of-text token.*tokenizer_config\.json"):
        pack(domain(), "train", wrapped(byte_level(), unk_token="<|end|>"))

    class Slow:
        is_fast = False
        name_or_path = "old"

    with pytest.raises(BadInput, match=r"tokenizer of old is not a fast one.*tokenizer\.json"):
        pack(domain(), "train", Slow())
