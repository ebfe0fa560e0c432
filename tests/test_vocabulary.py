"""Trimmed vocabularies: kept text encodes as before, all text decodes as before, logits stay."""

import copy
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_narrow import measure
from llm_narrow import vocabulary_rows as rows
from llm_narrow.blocks import Blocks, pack
from llm_narrow.domains import PARTS, Document, Domain
from llm_narrow.errors import BadInput
from llm_narrow.families import FAMILIES
from llm_narrow.vocabulary import closure, counts, filled, size, trimmed, used
from tiny import VOCAB, tiny

CODE = [f"def f{i}(a, b):\n    return a + b * {i}\n" for i in range(30)]
PROSE = [f"the quick brown fox {i} jumps over the lazy dog, naïve 中文 😀\n" for i in range(30)]
END, START = "<|end|>", "<|start|>"
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def wrapped(own: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=own, **(special or {"eos_token": END}))


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-NeoX has it: some tokens are added behind, runs of spaces among them."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[END, START, "<spare>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    own.train_from_iterator([*CODE, *PROSE], trainer)
    own.add_tokens([AddedToken("        ", special=False, normalized=False)])
    own.add_special_tokens(["<pad>"])
    own.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, own.token_to_id(START))]
    )
    return wrapped(own, eos_token=END, pad_token="<pad>")


def metaspace(kind: str) -> PreTrainedTokenizerFast:
    """As sentencepiece has it: ▁ for a space, bytes for what it does not know."""
    special = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    own = Tokenizer(models.BPE() if kind == "BPE" else models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    if kind == "BPE":
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, show_progress=False
        )
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    own.train_from_iterator([*CODE, *PROSE], trainer)
    content = json.loads(own.to_str())
    content["model"]["byte_fallback"] = True
    if kind == "BPE":
        content["model"]["unk_token"], content["model"]["fuse_unk"] = "<unk>", True
    content["added_tokens"] = [
        t for t in content["added_tokens"] if not t["content"].startswith("<0x")
    ]
    own = Tokenizer.from_str(json.dumps(content))
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return wrapped(own, eos_token=END, unk_token="<unk>")


MAKERS = [byte_level, lambda: metaspace("BPE"), lambda: metaspace("Unigram")]
every_maker = pytest.mark.parametrize("make", MAKERS, ids=["byte-level", "bytes", "unigram"])


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def laws(old: Any, new: Any, keep: Tensor, ids: Tensor, texts: Iterable[str]) -> int:
    """Text of kept tokens encodes as before, all text decodes as before; how much was kept."""
    kept = 0
    for text in texts:
        before, after = ids_of(old, text), ids_of(new, text)
        assert old.decode(before) == new.decode(after)
        if bool(keep[before].all()):
            kept += 1
            assert ids[before].tolist() == after
    return kept


def cut(tokenizer: Any, texts: list[str], threshold: int = 1, **given: Any) -> Any:
    keep = closure(tokenizer, used(counts(texts, tokenizer), threshold), **given)
    return keep, *trimmed(tokenizer, keep)


WORDS = st.lists(st.text("abcd", min_size=1, max_size=12), min_size=1, max_size=12)


@st.composite
def strange_bpe(draw: Any) -> PreTrainedTokenizerFast:
    """Joins in any order, several that make one token, tokens that no text is ever joined to."""
    vocabulary, merges = ["a", "b", "c", "d"], []
    for _ in range(draw(st.integers(3, 25))):
        pair = tuple(draw(st.sampled_from(vocabulary)) for _ in range(2))
        if pair not in merges and len("".join(pair)) <= 6:
            merges.append(pair)
            vocabulary += [] if "".join(pair) in vocabulary else ["".join(pair)]
    order = draw(st.permutations(merges))
    ids = {token: index for index, token in enumerate([END, *draw(st.permutations(vocabulary))])}
    own = Tokenizer(models.BPE(ids, order, ignore_merges=draw(st.booleans())))
    own.decoder = decoders.Fuse()
    own.add_special_tokens([END])
    return wrapped(own)


@st.composite
def strange_unigram(draw: Any) -> PreTrainedTokenizerFast:
    """Scores far apart and equal ones, characters that only bytes or nothing can spell."""
    bytes_too = draw(st.booleans())
    pieces = draw(st.sets(st.text("abc", min_size=1, max_size=4), max_size=25))
    if not bytes_too:  # else a rival with an unknown character may win
        pieces |= set("".join(pieces))
    scores = st.sampled_from([-1.0, -2.0, -3.0, -5.0, -8.0, -13.0, -21.0, -50.0])
    vocabulary = [("<unk>", 0.0), (END, 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256 if bytes_too else 0)]
    vocabulary += [(piece, draw(scores)) for piece in sorted(pieces)]
    own = Tokenizer(models.Unigram(vocabulary, 0, bytes_too))
    own.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    own.add_special_tokens(["<unk>", END])
    return wrapped(own, eos_token=END, unk_token="<unk>")


@settings(max_examples=60, deadline=None)
@given(st.one_of(strange_bpe(), strange_unigram()), WORDS, WORDS)
def test_kept_text_encodes_as_before_in_any_tokenizer(
    tokenizer: PreTrainedTokenizerFast, seen: list[str], others: list[str]
) -> None:
    keep, new, ids = cut(tokenizer, seen)
    assert laws(tokenizer, new, keep, ids, seen) == len(seen)
    laws(tokenizer, new, keep, ids, others)


def test_the_penalty_of_unknown_characters_stays_what_it_was() -> None:
    # By hand: ab + cd is -40, a + bcd -56. Were the lowest score of what is left, -20, to decide,
    # an unknown a would cost -30, and with bcd -31.
    vocabulary = [("<unk>", 0.0), (END, 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    vocabulary += [("ab", -20.0), ("cd", -20.0), ("bcd", -1.0), ("a", -55.0), ("zz", -60.0)]
    tokenizer = wrapped(Tokenizer(models.Unigram(vocabulary, 0, True)), unk_token="<unk>")
    keep, new, _ = cut(tokenizer, ["abcd", "bcd"])
    assert new.tokenize("abcd") == ["ab", "cd"]
    assert not bool(keep[tokenizer.convert_tokens_to_ids("a")])


@every_maker
def test_a_trained_tokenizer_keeps_its_text_and_reads_every_other(make: Any) -> None:
    tokenizer = make()
    keep, new, ids = cut(tokenizer, CODE)
    assert len(new) == int(keep.sum()) < len(tokenizer)
    assert laws(tokenizer, new, keep, ids, CODE) == len(CODE)
    assert laws(tokenizer, new, keep, ids, PROSE) < len(PROSE)
    strange = [
        "",
        " ",
        "▁",
        "  two  ",
        "\x00\x7f\x85\u2028",
        "한국어 ﬁ ½ 👩‍👩‍👧",
        "a\r\n\tb        c",
    ]
    laws(tokenizer, new, keep, ids, strange)


@every_maker
def test_new_ids_are_compact_and_in_the_old_order(make: Any) -> None:
    tokenizer = make()
    keep, new, ids = cut(tokenizer, CODE)
    assert ids[keep].tolist() == list(range(int(keep.sum())))
    assert (ids[~keep] == -1).all()
    texts = {index: text for text, index in new.get_vocab().items()}
    before = {index: text for text, index in tokenizer.get_vocab().items()}
    assert texts == {int(ids[i]): before[i] for i in keep.nonzero().flatten().tolist()}


@every_maker
def test_it_saves_and_loads_as_any_tokenizer(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.chat_template = CHAT
    _, new, ids = cut(tokenizer, CODE)
    new.save_pretrained(tmp_path)
    assert tempfile.gettempdir() not in (tmp_path / "tokenizer_config.json").read_text()
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again.get_vocab() == new.get_vocab()
    for text in [*CODE[:3], *PROSE[:3]]:
        assert again(text).input_ids == new(text).input_ids
    talk = [{"role": "user", "content": "def f1(a, b):"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert again.apply_chat_template(talk, **asked) == tokenizer.apply_chat_template(talk, **asked)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    for role in tokenizer.special_tokens_map:
        assert getattr(again, f"{role}_id") == int(ids[getattr(tokenizer, f"{role}_id")])


def test_ids_that_the_tokenizer_puts_in_are_new_ones() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_padding(
        pad_id=tokenizer.pad_token_id, pad_token="<pad>", length=99
    )
    _, new, ids = cut(tokenizer, CODE)
    assert (
        new.backend_tokenizer.encode(CODE[0]).ids[-1] == new.pad_token_id
    )  # the next call ends it
    assert new(CODE[0]).input_ids == ids[tokenizer(CODE[0]).input_ids].tolist()
    assert new(CODE[0]).input_ids[0] == new.convert_tokens_to_ids(START)


@pytest.mark.parametrize("kind", [processors.RobertaProcessing, processors.BertProcessing])
def test_ids_of_older_post_processors_are_new_ones(kind: Any) -> None:
    tokenizer = byte_level()
    pair = [(text, tokenizer.convert_tokens_to_ids(text)) for text in ("<pad>", START)]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([kind(*pair)])
    _, new, ids = cut(tokenizer, CODE)
    found = new.backend_tokenizer.encode(CODE[0]).ids
    assert found == ids[tokenizer.backend_tokenizer.encode(CODE[0]).ids].tolist()
    assert found[0] == new.convert_tokens_to_ids(START)


def test_what_the_chat_template_says_stays() -> None:
    tokenizer = byte_level()
    seen = closure(tokenizer, used(counts(CODE, tokenizer)))
    tokenizer.chat_template = "{{ 'the lazy dog' }}<spare>"
    told = closure(tokenizer, used(counts(CODE, tokenizer)), keep_special=False)
    assert bool(told[ids_of(tokenizer, "the lazy dog")].all())
    assert not bool(seen[ids_of(tokenizer, "the lazy dog")].all())
    assert bool(told[tokenizer.convert_tokens_to_ids("<spare>")])


def test_added_tokens_that_nothing_names_may_go() -> None:
    tokenizer = byte_level()
    wanted = used(counts(CODE, tokenizer))
    spare = tokenizer.convert_tokens_to_ids(["<spare>", "        "])
    assert bool(closure(tokenizer, wanted)[spare].all())
    keep = closure(tokenizer, wanted, keep_special=False)
    assert not bool(keep[spare].any())
    assert bool(keep[tokenizer.convert_tokens_to_ids([END, START, "<pad>"])].all())
    assert bool(closure(tokenizer, wanted, keep_special=False, named=spare)[spare].all())
    new, ids = trimmed(tokenizer, keep)
    laws(tokenizer, new, keep, ids, [*CODE, "<spare>", "x        y"])


def test_what_spells_unknown_text_stays() -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    plain = byte_level()
    keep = closure(plain, nothing)
    letters = {t for t in plain.get_vocab() if len(t) == 1}
    assert len(letters) == 256
    assert int(keep.sum()) == 256 + 5  # the added tokens
    spelled = metaspace("BPE")
    keep = closure(spelled, nothing)
    kept = {t for t, i in spelled.get_vocab().items() if keep[i]}
    assert kept == {"<unk>", END, "▁", *(f"<0x{byte:02X}>" for byte in range(256))} | {" "} & set(
        spelled.get_vocab()
    )


def test_counts_are_of_the_text_as_it_is_packed() -> None:
    tokenizer = byte_level()
    found = counts(CODE, tokenizer)
    assert found.shape == (size(tokenizer),)
    expected = torch.zeros_like(found)
    for text in CODE:
        for index in ids_of(tokenizer, text):
            expected[index] += 1
    assert found.equal(expected)
    packed = counts(packed_of(CODE, tokenizer, 1), tokenizer)
    packed[tokenizer.eos_token_id] -= len(CODE)  # the separators
    assert packed.equal(expected)
    assert used(found, 5).equal(expected >= 5)


def test_filled_gives_a_whole_multiple_of_real_tokens() -> None:
    tokenizer = byte_level()
    counted = counts(CODE, tokenizer)
    keep = closure(tokenizer, used(counted, 8))
    full = filled(tokenizer, keep, counted, multiple=16)
    assert int(full.sum()) == -(-int(keep.sum()) // 16) * 16 > int(keep.sum())
    assert bool(full[keep].all())
    gained, left = counted[full & ~keep], counted[~full]
    assert int(gained.min()) >= int(left.max()), "one that is used more often was left"
    new, ids = trimmed(tokenizer, full)
    laws(tokenizer, new, full, ids, [*CODE, *PROSE])
    everything = filled(tokenizer, keep, counted, multiple=4096)
    trimmed(tokenizer, everything)
    assert int(everything.sum()) == len(tokenizer)


def packed_of(texts: list[str], tokenizer: Any, length: int) -> Blocks:
    documents = tuple(Document("p", f"{i}.py", text) for i, text in enumerate(texts))
    name = f"{length}{hash(tuple(texts))}"
    domain = Domain("made", dict.fromkeys(PARTS, documents), {}, dict.fromkeys(PARTS, name))
    return pack(domain, "train", tokenizer, length=length)


def by_document(row: Tensor, sizes: Tensor) -> dict[int, int]:
    found: dict[int, int] = {}
    for owner, bytes_of in zip(row.tolist(), sizes.tolist(), strict=True):
        if owner >= 0:
            found[owner] = found.get(owner, 0) + bytes_of
    return found


def plain_text(tokenizer: Any, tokens: Tensor, documents: Tensor) -> str:
    return str(tokenizer.decode(tokens[documents >= 0].tolist()))


@every_maker
def test_translated_blocks_hold_the_same_text_and_bytes(make: Any) -> None:
    tokenizer = make()
    keep, new, ids = cut(tokenizer, CODE)
    before = packed_of([*CODE, *PROSE], tokenizer, 24)
    after = rows.translated(before, tokenizer, new, ids)
    assert after.tokens.shape[0] == before.tokens.shape[0]
    assert after.tokens.shape[1] > 24
    changed = 0
    for b, a in zip(
        zip(before.tokens, before.documents, before.sizes, strict=True),
        zip(after.tokens, after.documents, after.sizes, strict=True),
        strict=True,
    ):
        assert by_document(*b[1:]) == by_document(*a[1:])
        assert plain_text(tokenizer, *b[:2]) == plain_text(new, *a[:2])
        if bool(keep[b[0]].all()):
            assert a[0][:24].tolist() == ids[b[0]].tolist()
            assert (a[1][24:] == -1).all()
        else:
            changed += 1
    assert 0 < changed < len(before.tokens)
    assert (after.sizes >= 0).all()
    assert after.sizes.dtype == torch.int16
    assert after.tokens.dtype == after.documents.dtype == torch.int32


@every_maker
def test_a_whole_document_is_translated_as_it_is_read_in_use(make: Any) -> None:
    tokenizer = make()
    _, new, ids = cut(tokenizer, CODE)
    for text in PROSE[:4]:
        length = len(ids_of(tokenizer, text)) + 1
        before = packed_of([text], tokenizer, length)
        after = rows.translated(before, tokenizer, new, ids)
        assert after.tokens[0].tolist() == [*ids_of(new, text), new.eos_token_id]
        assert len(after.tokens[0]) > length


@every_maker
def test_translated_blocks_are_measured_on_the_same_documents(make: Any) -> None:
    tokenizer = make()
    _, new, ids = cut(tokenizer, CODE)
    before = packed_of([*CODE, *PROSE], tokenizer, 24)
    after = rows.translated(before, tokenizer, new, ids)
    sums = []
    for blocks in (before, after):
        shape = (len(blocks.tokens), blocks.tokens.shape[1] - 1)
        ones = measure.TokenResults(torch.ones(shape), torch.ones(shape, dtype=torch.bool))
        sums.append(measure.sums_of(ones, blocks))
    assert sums[0].documents.equal(sums[1].documents)
    inner = after.documents[:, 1:] >= 0
    text = inner & (after.tokens[:, 1:] != new.eos_token_id)
    assert int(sums[1].tokens.sum()) == int(text.sum()), "separators or filling were counted"


def test_a_stretch_is_read_whole_but_for_characters_that_are_cut() -> None:
    tokenizer = byte_level()
    reader = rows._plain(tokenizer)
    tokens = ids_of(tokenizer, "한 the fox jumps 한")
    assert rows._readable(reader, tokens) == (0, len(tokens))
    for first, last in ((0, 1), (0, 2), (1, 0), (2, 0), (2, 1)):
        inner = tokens[first : len(tokens) - last]
        # A character of three bytes, each a token: what is left of it is read apart.
        expected = (-first % 3, len(inner) - (-last % 3))
        assert rows._readable(reader, inner) == expected


def test_blocks_longer_than_the_model_reads() -> None:
    tokenizer = byte_level()
    _, new, ids = cut(tokenizer, CODE)
    blocks = packed_of(PROSE, tokenizer, 24)
    with pytest.raises(BadInput, match=r"Blocks of 24 tokens take up to \d+ .* has 25 positions"):
        rows.translated(blocks, tokenizer, new, ids, longest=25)


MODELS = [
    *((kind, {}) for kind in FAMILIES if kind != "mlp"),
    ("llama", {"tie_word_embeddings": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("opt", {"tie_word_embeddings": False, "word_embed_proj_dim": 16}),
    ("phi", {"intermediate_size": 48}),  # its head has a bias
    ("gptj", {"rotary_dim": 4}),
]
MODEL_NAMES = [f"{kind}{'-'.join(map(str, changes.values()))}" for kind, changes in MODELS]
STAY = torch.ones(VOCAB, dtype=torch.bool).index_fill_(0, torch.tensor([3, 8, 9, 30, 63]), False)


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=MODEL_NAMES)
def test_logits_of_the_tokens_that_stay_are_those_they_were(
    kind: str, changes: dict[str, object], tmp_path: Path
) -> None:
    whole = tiny(kind, **changes)
    small = copy.deepcopy(whole)
    old_ids = rows.new_rows(STAY, multiple=12)
    assert old_ids.tolist() == [*STAY.nonzero().flatten().tolist(), -1]
    rows.remove_rows(small, old_ids)
    tokens = torch.randint(0, 59, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(rows.teacher_tokens(tokens, old_ids)).logits
        found = small(tokens).logits
    columns = rows.teacher_columns(expected, old_ids)
    assert float((found[..., :59] - columns).abs().max() / columns.abs().max()) <= 1e-6
    assert (found[..., 59:] == 0).all()
    assert small.config.vocab_size == 60 == small.get_input_embeddings().num_embeddings
    for layer in small.modules():
        match layer:
            case torch.nn.Linear():
                assert (layer.out_features, layer.in_features) == layer.weight.shape
            case torch.nn.Embedding():
                assert (layer.num_embeddings, layer.embedding_dim) == layer.weight.shape
    small.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        loaded = again(tokens).logits
    if any(p.dim() == 3 for p in small.parameters()):  # experts: another kernel after loading
        assert torch.allclose(loaded, found, atol=1e-5 * float(found.abs().max()))
    else:
        assert loaded.equal(found)
    embedding, head = small.get_input_embeddings().weight, small.get_output_embeddings().weight
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())


def test_the_row_of_padding_moves_with_its_token() -> None:
    model = tiny("llama", pad_token_id=62)
    rows.remove_rows(model, rows.new_rows(STAY, multiple=1))
    assert model.config.pad_token_id == 58
    assert model.get_input_embeddings().padding_idx == model.model.padding_idx == 58


def test_without_padding_fewer_rows_are_left() -> None:
    model = tiny("phi", intermediate_size=48)
    before = sum(p.numel() for p in model.parameters())
    rows.remove_rows(model, rows.new_rows(STAY, multiple=1))
    assert sum(p.numel() for p in model.parameters()) == before - 5 * (32 + 32 + 1)
    assert model.get_output_embeddings().out_features == 59 == model.vocab_size


def test_a_model_that_lost_heads_and_neurons_can_lose_rows() -> None:
    from llm_narrow import units
    from llm_narrow.families import find_groups
    from tiny import uneven

    whole = tiny("llama")
    groups = find_groups(whole)
    units.remove(whole, groups, uneven(groups))
    small = copy.deepcopy(whole)
    old_ids = rows.new_rows(STAY, multiple=1)
    rows.remove_rows(small, old_ids)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = rows.teacher_columns(whole(rows.teacher_tokens(tokens, old_ids)).logits, old_ids)
        torch.testing.assert_close(small(tokens).logits, expected, rtol=1e-6, atol=1e-6)


def test_every_id_of_the_configs_is_renamed() -> None:
    model = tiny("llama", eos_token_id=[2, 10], bos_token_id=50_256)
    generation = model.generation_config
    generation.update(
        bos_token_id=4, eos_token_id=[2, 10], pad_token_id=-1, forced_eos_token_id=62,
        suppress_tokens=[3, 4], begin_suppress_tokens=[30], bad_words_ids=[[4, 5], [4, 9]],
        sequence_bias=[[[10], 2.0], [[8], 1.0]], decoder_start_token_id=None,
    )  # fmt: skip
    assert rows.named_ids(model)[10] == "eos_token_id of config.json"
    assert sorted(rows.named_ids(model)) == [0, 2, 4, 10, 62]
    rows.remove_rows(model, rows.new_rows(STAY, multiple=1))
    # Of 3, 8, 9, 30 and 63, those that are below an id move it down.
    assert model.config.eos_token_id == generation.eos_token_id == [2, 7]
    assert model.config.bos_token_id is None, "an id that was no row now is one"
    assert (generation.bos_token_id, generation.pad_token_id) == (3, None)
    assert generation.forced_eos_token_id == 58
    assert generation.suppress_tokens == [3]
    assert generation.begin_suppress_tokens is None
    assert generation.bad_words_ids == [[3, 4]]
    assert generation.sequence_bias == [[[7], 2.0]]
    assert generation.decoder_start_token_id is None


def test_a_token_that_a_config_names_cannot_go() -> None:
    model = tiny("llama", eos_token_id=30)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(BadInput, match=r"token 30 is the eos_token_id of config\.json and has to"):
        rows.remove_rows(model, rows.new_rows(STAY))
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_rows_that_cannot_be() -> None:
    model = tiny("llama")
    with pytest.raises(BadInput, match="row 64 is out of range: the model has 64"):
        rows.remove_rows(model, torch.arange(65))
    with pytest.raises(BadInput, match="kept twice"):
        rows.remove_rows(model, torch.tensor([0, 1, 2, 2]))
    with pytest.raises(BadInput, match="keeps no token"):
        rows.new_rows(~STAY & STAY)
    with pytest.raises(BadInput, match="at least 1, got 0"):
        rows.new_rows(STAY, multiple=0)


def test_models_whose_vocabulary_is_more_than_rows() -> None:
    model = tiny("llama")
    model.config.vocab_size = 32  # what its config makes is another model than it is
    model.lm_head = torch.nn.Identity()
    model.model.embed_tokens = torch.nn.Identity()
    with pytest.raises(BadInput, match=r"of a llama cannot be trimmed.*\n.*embed_tokens"):
        rows.vocabulary_axes(model)


def test_the_map_is_kept_on_disk(tmp_path: Path) -> None:
    old_ids = rows.new_rows(STAY)
    file = tmp_path / rows.MAP
    rows.write_map(file, old_ids, VOCAB)
    found, before = rows.read_map(file)
    assert found.equal(old_ids) and before == VOCAB
    ids = rows.new_ids(found, before)
    assert ids[STAY].tolist() == list(range(59)) and (ids[~STAY] == -1).all()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BadInput, match="is no map of a trimmed vocabulary"):
        rows.read_map(file)
    save_file({"old_ids": old_ids}, file, {"version": "2", "size": "64"})
    with pytest.raises(BadInput, match="version 2, not 1"):
        rows.read_map(file)
    with pytest.raises(BadInput, match="is missing"):
        rows.read_map(tmp_path / "none")


def test_the_divergence_is_that_from_the_teacher_over_what_is_left() -> None:
    # By hand: of the teacher's halves of 1/2, 1/4, 1/4, the last token goes: 2/3 and 1/3 are left.
    old_ids = torch.tensor([0, 1, -1])
    taught = torch.tensor([[0.5, 0.25, 0.25]]).log()
    logits = torch.tensor([[0.25, 0.25, 0.5]]).log().requires_grad_()
    wanted = torch.tensor([2 / 3, 1 / 3])
    by_hand = (wanted * (wanted / 0.25).log()).sum()
    found = rows.column_divergence(logits, taught, old_ids)
    assert float(found.detach()) == pytest.approx(float(by_hand))
    found.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, 0.25, 0.5]]) - torch.tensor(
        [[2 / 3, 1 / 3, 0]]))  # fmt: skip


def test_a_student_with_its_teachers_rows_has_nothing_to_learn() -> None:
    teacher = tiny("gpt_neox")
    student = copy.deepcopy(teacher)
    old_ids = rows.new_rows(STAY, multiple=1)
    rows.remove_rows(student, old_ids)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        taught = teacher(rows.teacher_tokens(tokens, old_ids)).logits[0]
        got = student(tokens).logits[0]
    assert float(rows.column_divergence(got, taught, old_ids, temperature=2.0)) == pytest.approx(
        0, abs=1e-5
    )
    other = rows.column_divergence(got.roll(1, -1), taught, old_ids, temperature=2.0)
    assert float(other) > 0.1


def test_text_and_thresholds_that_choose_nothing() -> None:
    tokenizer = byte_level()
    empty = Blocks(*(torch.zeros(1, 4, dtype=torch.int32) for _ in range(3)), "")
    for text in ([], ["", ""], empty):
        with pytest.raises(BadInput, match="no text to count"):
            counts(text, tokenizer)
    found = counts(CODE, tokenizer)
    for threshold in (0, -1, 10**9):
        with pytest.raises(BadInput, match=rf"from 1 to {int(found.max())}, .* got {threshold:,}"):
            used(found, threshold)
    strange = Blocks(torch.tensor([[9999]]), torch.ones(1, 1), torch.zeros(1, 1), "")
    with pytest.raises(BadInput, match="token 9999, and the ids of the tokenizer end at"):
        counts(strange, tokenizer)


@pytest.mark.parametrize("outside", [-1, 10_000])
def test_ids_out_of_range(outside: int) -> None:
    tokenizer = byte_level()
    for call in (closure, trimmed):
        with pytest.raises(BadInput, match=f"{outside} is out of range: .* from 0 to"):
            call(tokenizer, torch.tensor([5, outside]))
    with pytest.raises(BadInput, match="out of range"):
        closure(tokenizer, torch.tensor([5]), named=[outside])


def test_tokens_that_have_to_stay() -> None:
    tokenizer = byte_level()
    keep = closure(tokenizer, used(counts(CODE, tokenizer)))
    for text, why in ((END, "is the eos_token"), (START, "is put in by the tokenizer itself"),
                      ("a", "spells what no other")):  # fmt: skip
        index = tokenizer.convert_tokens_to_ids(text)
        less = keep.index_fill(0, torch.tensor([index]), False)
        said = json.dumps(text).strip('"').replace("|", r"\|")
        with pytest.raises(BadInput, match=rf"(?s)'{said}' \({index}\) {why}.*keep it"):
            trimmed(tokenizer, less)
    part = tokenizer.convert_tokens_to_ids("ret")
    assert bool(keep[part])
    with pytest.raises(BadInput, match=rf"'ret' \({part}\) is part of a token that stays"):
        trimmed(tokenizer, keep.index_fill(0, torch.tensor([part]), False))


def test_tokenizers_that_cannot_be_trimmed() -> None:
    class Slow:
        is_fast = False
        name_or_path = "old"

    words = Tokenizer(models.WordPiece({END: 0, "a": 1}, unk_token=END))
    marked = Tokenizer(models.BPE({END: 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    random = Tokenizer(models.BPE({END: 0, "a": 1}, [], dropout=0.1))
    for tokenizer, why in (
        (Slow(), "tokenizer of old is not a fast one"),
        (wrapped(words), "WordPiece tokenizer, and only BPE and Unigram"),
        (wrapped(marked), "marks of where in a word"),
        (wrapped(random), "joins at random"),
    ):
        with pytest.raises(BadInput, match=why):
            closure(tokenizer, torch.tensor([1]))
    gaps = Tokenizer(models.BPE({END: 0, "a": 1, "b": 7}, []))
    gapped = wrapped(gaps)
    new, ids = trimmed(gapped, closure(gapped, torch.tensor([1])))
    assert new.get_vocab() == {END: 0, "a": 1, "b": 2} and ids.tolist() == [0, 1, *[-1] * 5, 2]
