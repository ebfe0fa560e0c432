"""GGUF export: llama.cpp says of a file what transformers says of the folder, or it is refused."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from folders import write_model
from llm_narrow import checkpoint, depth, from_gguf, gguf_check, models, to_gguf, units
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.families import find_groups
from llm_narrow.verify import NotVerified
from tiny import even, uneven

PROMPTS = ("def keep(", "the unit 12.5")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def small_check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and shorter continuations: every token is a question to a server."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not request.node.get_closest_marker("real"):
        small = functools.partial(gguf_check.check, prompts=PROMPTS, length=10)
        monkeypatch.setattr(gguf_check, "check", small)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write to it."""
    return write_model(tmp_path_factory.mktemp("made") / "llama")


@pytest.fixture
def own(tmp_path: Path, llama: Path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(llama, tmp_path / "own"))


def narrowed(folder: Path, kind: str, choose: Callable[[Any], Any], **changes: object) -> Path:
    """A checkpoint of a tiny model of the kind that lost what `choose` says."""
    whole = write_model(folder / "whole", kind, **changes)
    model = AutoModelForCausalLM.from_pretrained(whole)
    original, groups = copy.deepcopy(model.config), find_groups(model)
    keep = choose(groups)
    units.remove(model, groups, keep)
    out = folder / "narrow"
    out.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    checkpoint.write(model, tokenizer, out, original_config=original, groups=groups, keep=keep)
    return out


def field(file: Path, name: str) -> Any:
    return GGUFReader(file).fields[name].contents()


def holds(found: to_gguf.Exported) -> None:
    """The check ran, and everything in it is the same."""
    c = found.check
    assert c is not None and c.prompts == c.whole == len(PROMPTS)
    assert 0 < c.tokens == c.same and c.ties == 0
    assert c.difference < gguf_check.TOLERANCE["f32"] and c.agreement == 1
    assert c.loss == pytest.approx(c.loss_there, abs=1e-3) and c.loss > 1
    assert c.texts == len(gguf_check.TEXTS) and c.runtime.startswith("xllamacpp ")
    assert found.bytes == found.file.stat().st_size


KINDS = {
    "tied": ("llama", {}, "llama"),
    "untied": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
               "llama"),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, "llama"),
    "mistral": ("mistral", {"sliding_window": None}, "llama"),
    "granite": (
        "granite",
        {"num_key_value_heads": 2, "attention_multiplier": 8**-0.5, "embedding_multiplier": 1.0,
         "residual_multiplier": 1.0, "logits_scaling": 1.0},
        "llama",
    ),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen3": ("qwen3", {}, "qwen3"),
    "parallel": ("gpt_neox", {}, "gptneox"),
    "sequential": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True},
                   "gptneox"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_says_what_transformers_says(tmp_path, name):
    kind, changes, arch = KINDS[name]
    folder = write_model(tmp_path / "m", kind, **changes)
    found = to_gguf.export(folder, tmp_path / "m.gguf", quantize="f32")
    holds(found)
    assert (found.arch, found.quantization, found.wide) == (arch, "f32", ())
    assert {p.name for p in tmp_path.iterdir()} == {"m", "m.gguf"}
    heads = {t.name for t in GGUFReader(found.file).tensors} & {"output.weight"}
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert bool(heads) == (not tied or arch == "gptneox")


EVEN = {
    "llama": ("llama", {"neurons": 16, "heads": 1}, "llama"),
    "heads that do not fill the hidden size": ("qwen2", {"heads": 1}, "deci"),
    "qwen3": ("qwen3", {"neurons": 16, "heads": 1}, "qwen3"),
    "neurons alone": ("gpt_neox", {"neurons": 16}, "gptneox"),
}


@pytest.mark.parametrize("name", EVEN)
def test_evenly_narrowed(tmp_path, name):
    kind, removed, arch = EVEN[name]
    folder = narrowed(tmp_path, kind, lambda groups: even(groups, **removed))
    assert checkpoint.layout(folder) == "uniform"
    found = to_gguf.export(folder, tmp_path / "m.gguf", quantize="f32")
    holds(found)
    assert found.arch == arch


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"num_hidden_layers": 3}), ("mistral", {}), ("qwen2", {}),
     ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False})],
)  # fmt: skip
def test_unevenly_narrowed(tmp_path, kind, changes):
    folder = narrowed(tmp_path, kind, uneven, **changes)
    assert checkpoint.layout(folder) == "uneven"
    found = to_gguf.export(folder, tmp_path / "m.gguf", quantize="f32")
    holds(found)
    assert found.arch == "deci"
    keep = checkpoint.read_keep(folder / "keep.safetensors")
    layers = range(len(keep) // 2)
    kept = {k: [int(keep[f"model.layers.{i}.{k}"].sum()) for i in layers]
            for k in ("mlp", "self_attn")}  # fmt: skip
    assert len(set(kept["mlp"])) > 1
    assert field(found.file, "deci.feed_forward_length") == kept["mlp"]
    assert field(found.file, "deci.attention.head_count_kv") == kept["self_attn"]
    assert field(found.file, "deci.attention.head_count") == [2 * n for n in kept["self_attn"]]


@pytest.mark.parametrize("first", [{"attention": 0, "mlp": 2}, {"attention": 1, "mlp": 0}])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_halves_of_layers_that_are_gone(tmp_path, kind, first):
    whole = write_model(tmp_path / "whole", kind, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(whole)
    original, groups = copy.deepcopy(model.config), find_groups(model)
    layers = depth.layers_of(model, groups)
    gone = {g.name for half, n in first.items() for g in layers[n].half(half)}
    keep = {g.name: torch.full((g.size,), g.name not in gone) for g in groups}
    depth.take_out(model, groups, keep)
    folder, tokenizer = tmp_path / "narrow", AutoTokenizer.from_pretrained(whole)
    folder.mkdir()
    checkpoint.write(model, tokenizer, folder, original_config=original, groups=groups, keep=keep)
    found = to_gguf.export(folder, tmp_path / "m.gguf", quantize="f32")
    holds(found)
    names = {t.name for t in GGUFReader(found.file).tensors}
    # llama.cpp needs a head in the first layer: it is one of zeros.
    assert ("blk.1.attn_q.weight" in names) == (first["attention"] != 1)
    heads = field(found.file, "deci.attention.head_count_kv")
    assert heads[first["attention"]] == (1 if first["attention"] == 0 else 0)
    assert field(found.file, "deci.feed_forward_length")[first["mlp"]] == to_gguf.ZEROS


def test_a_run_folder_will_do_and_another_reader_finds_the_same_weights(tmp_path, own):
    shutil.copytree(own, tmp_path / "run" / "model")
    found = to_gguf.export(tmp_path / "run", tmp_path / "m.gguf", quantize="f32", check=False)
    assert found.check is None
    assert field(found.file, "general.name") == "run"
    loaded = models.load(str(found.file))
    original = AutoModelForCausalLM.from_pretrained(own).state_dict()
    assert all(torch.equal(t, original[name]) for name, t in loaded.model.state_dict().items())
    text, tokenizer = "keep the 12 units", AutoTokenizer.from_pretrained(own)
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_trimmed_vocabulary(tmp_path):
    """Fewer tokens and merges, and embeddings filled up to a round number."""
    folder = write_model(tmp_path / "m", vocab_size=304)
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    model = fields["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < 290}
    model["merges"] = [m for m in model["merges"] if "".join(m) in model["vocab"]]
    path.write_text(json.dumps(fields), encoding="utf-8")
    found = to_gguf.export(folder, tmp_path / "m.gguf", quantize="f32")
    holds(found)
    tokens = field(found.file, "tokenizer.ggml.tokens")
    assert tokens[:290] == sorted(model["vocab"], key=model["vocab"].get)
    assert tokens[290:] == [f"[PAD{i}]" for i in range(290, 304)]
    kinds = field(found.file, "tokenizer.ggml.token_type")
    assert [kinds[i] for i in (0, 2, 3, 289, 290)] == [TokenType.CONTROL, TokenType.CONTROL,
        TokenType.NORMAL, TokenType.NORMAL, TokenType.UNUSED]  # fmt: skip
    assert field(found.file, "tokenizer.ggml.merges") == [" ".join(m) for m in model["merges"]]


def test_what_the_file_says_of_the_tokenizer(tmp_path, own):
    tokenizer: Any = AutoTokenizer.from_pretrained(own)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.bos_token, tokenizer.pad_token = "<s>", "<pad>"
    tokenizer.add_tokens(["narrow model"])  # not a special one
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(own)
    found = to_gguf.export(own, tmp_path / "m.gguf", quantize="f32")
    holds(found)
    said = {name: field(found.file, f"tokenizer.ggml.{name}") for name in (
        "model", "pre", "bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token",
        "add_eos_token")}  # fmt: skip
    assert list(said.values()) == ["gpt2", "gpt-2", 1, 2, 0, True, False]
    assert field(found.file, "tokenizer.chat_template") == "{{ messages[0]['content'] }}"
    assert field(found.file, "tokenizer.ggml.token_type")[320] == TokenType.USER_DEFINED


@pytest.mark.parametrize("name", sorted(from_gguf.PRE_TOKENIZERS))
def test_ways_of_splitting_are_told_apart(name):
    assert gguf_check._split_as(from_gguf.PRE_TOKENIZERS[name]()) == name


def test_another_way_of_saying_the_same_splitting():
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    words = pre_tokenizers.Split(Regex(from_gguf.GPT2), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = pre_tokenizers.Sequence([digits, words, to_bytes])
    assert gguf_check._split_as(made) == "smollm"
    other = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert gguf_check._split_as(other) is None
    assert gguf_check._split_as(None) is None


@pytest.mark.parametrize("quantize", ["f16", "bf16", "q8_0", "q4_0"])
def test_quantised(tmp_path, llama, quantize):
    found = to_gguf.export(llama, tmp_path / "m.gguf", quantize=quantize)
    c = found.check
    assert c is not None and c.tolerance == gguf_check.TOLERANCE.get(quantize)
    assert c.difference < {"f16": 1e-3, "bf16": 1e-2, "q8_0": 5e-2, "q4_0": 0.4}[quantize]
    assert c.difference > 0 and c.same >= 0.4 * c.tokens
    state = load_file(llama / "model.safetensors")
    tensors = {t.name: t for t in GGUFReader(found.file).tensors}
    block = quantize in ("q8_0", "q4_0")
    # 48 neurons fill no block of 32
    wide = {f"blk.{i}.ffn_down.weight" for i in range(2)} if block else set()
    assert set(found.wide) == wide
    for name, t in tensors.items():
        kind = quantize.upper()
        if "norm" in name:
            kind = "F32"
        elif name in wide:
            kind = "F16"
        elif name == "token_embd.weight" and quantize == "q4_0":
            kind = "Q8_0"
        assert t.tensor_type == GGMLQuantizationType[kind], name
    stored = tensors["blk.1.ffn_up.weight"]
    back = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    exact = state["model.layers.1.mlp.up_proj.weight"]
    step = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}[quantize]
    error = (back - exact).abs().max() / exact.abs().max()
    assert 0 < error <= step


def test_the_loss_of_each_side_is_told_as_its_own(tmp_path, llama):
    exact, rounded = (
        to_gguf.export(llama, tmp_path / f"{kind}.gguf", quantize=kind).check
        for kind in ("f32", "q4_0")
    )
    assert rounded.loss == pytest.approx(exact.loss, abs=1e-6)  # transformers', of the folder
    assert abs(rounded.loss_there - exact.loss_there) > 1e-4


def test_numbers_too_large_for_f16(tmp_path, own):
    state = load_file(own / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(state, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"blk\.1\.ffn_up\.weight holds .*--quantize bf16 or f32"):
        to_gguf.export(own, tmp_path / "m.gguf", check=False)
    assert to_gguf.export(own, tmp_path / "m.gguf", quantize="bf16", check=False).bytes > 0


def test_a_file_that_computes_otherwise_is_refused_and_leaves_nothing(tmp_path, llama, monkeypatch):
    (tmp_path / "m.gguf").write_text("of before")
    monkeypatch.setattr(to_gguf, "_change", lambda *args: None)  # rows of q and k as they were
    with pytest.raises(NotVerified, match=r"log-probabilities by llama\.cpp differ"):
        to_gguf.export(llama, tmp_path / "m.gguf", quantize="f32", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "of before"


def test_a_file_that_encodes_otherwise_is_refused(tmp_path, llama, monkeypatch):
    words = gguf_check.read_tokenizer(llama)
    other = dataclasses.replace(words, merges=words.merges[::-1])
    monkeypatch.setattr(gguf_check, "read_tokenizer", lambda folder: other)
    with pytest.raises(NotVerified, match=r"llama\.cpp encodes .* otherwise than the model's"):
        to_gguf.export(llama, tmp_path / "m.gguf", quantize="q8_0")
    assert not list(tmp_path.iterdir())


def test_a_file_that_llama_cpp_cannot_load_is_refused_with_its_reason(tmp_path, llama, monkeypatch):
    found = to_gguf._widths

    def wider(*args: Any) -> Any:
        return [dataclasses.replace(w, neurons=w.neurons + 32) for w in found(*args)]

    monkeypatch.setattr(to_gguf, "_widths", wider)
    with pytest.raises(NotVerified, match=r"cannot run it: .*blk\.0\.ffn_gate.* wrong shape"):
        to_gguf.export(llama, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gap", "quantize", "outcome"),
    [(0.001, "f16", "tie"), (1.0, "f16", "refused"), (1.0, "q4_0", "told")],
)
def test_near_ties_are_told_and_others_refused(monkeypatch, tmp_path, gap, quantize, outcome):
    """The model likes token 3 best everywhere and 4 almost as well; llama.cpp took 4 once."""
    logits = torch.zeros(8)
    logits[3], logits[4] = 10.0, 10.0 - gap

    class Fixed:
        config = SimpleNamespace(max_position_embeddings=64)

        def __call__(self, tokens: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=logits.expand(1, tokens.shape[1], 8))

    loaded = SimpleNamespace(model=Fixed(), tokenizer=lambda text: {"input_ids": [1, 3, 3]})
    told = [float(logits.log_softmax(0)[3]), 3]
    said = {"generated": [[3, 3, 4, 3], [3, 3, 3, 3]], "speed": [1.0, 2.0], "text": [told, told],
            "encoded": [[1, 3, 3]] * len(gguf_check.TEXTS)}  # fmt: skip
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: loaded)
    monkeypatch.setattr(gguf_check, "ask", lambda *args, **kwargs: said)
    (tmp_path / "file").touch()
    if outcome == "refused":
        with pytest.raises(NotVerified, match=r"of 8 greedy tokens llama\.cpp takes 1 that are"):
            gguf_check.check(tmp_path / "file", tmp_path, quantize)
        return
    found = gguf_check.check(tmp_path / "file", tmp_path, quantize)
    assert (found.tokens, found.same, found.whole) == (8, 7, 1)
    assert found.ties == (outcome == "tie")
    assert (found.difference, found.agreement, found.speed) == (0, 1, 1.5)


def refused(folder: Path, out: Path, says: str, **options: Any) -> None:
    before = {p.name for p in out.parent.iterdir()}
    with pytest.raises(BadInput, match=says):
        to_gguf.export(folder, out, check=False, **options)
    assert {p.name for p in out.parent.iterdir()} == before


def test_a_quantization_that_is_not_there(tmp_path, llama):
    with pytest.raises(UnknownName, match=r"Quantization 'q8' .*Known: bf16, f16, f32, q4_0, q8_0"):
        to_gguf.export(llama, tmp_path / "m.gguf", quantize="q8")


def test_without_llama_cpp_only_unchecked(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(gguf_check, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"package xllamacpp\).*llm-narrow\[gguf\].*--no-check"):
        to_gguf.export(llama, tmp_path / "m.gguf")
    assert to_gguf.export(llama, tmp_path / "m.gguf", check=False).check is None


def test_a_place_that_is_taken(tmp_path, llama):
    (tmp_path / "m.gguf").touch()
    refused(llama, tmp_path / "m.gguf", r"m\.gguf exists already.*--force")
    refused(llama, tmp_path, r"is a folder\. Give the name of a file", force=True)
    assert to_gguf.export(llama, tmp_path / "m.gguf", check=False, force=True).bytes > 1000


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="root writes anywhere")
def test_a_place_that_cannot_be_written(llama):
    with pytest.raises(BadInput, match=r"/proc/m\.gguf cannot be written"):
        to_gguf.export(llama, Path("/proc/m.gguf"), check=False)


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it has to be 'silu'"),
    "rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
             "rope_type is 'linear'; it has to be 'default' or 'llama3'"),
    "partial": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                     "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "window": ({"model_type": "mistral", "sliding_window": 16}, "sliding_window is 16; .* null"),
    "multiplier": ({"model_type": "granite", "logits_scaling": 8.0, "attention_multiplier": 1.0},
                   "(?s)2 problems.*logits_scaling is 8.*attention_multiplier is 1.0.* 0.35355"),
    "bias": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias has to be false"),
    "architecture": ({"model_type": "opt"}, "'opt' cannot be written .*Known: gpt_neox, granite"),
    "damage": ({"hidden_size": "many"}, r"config\.json is damaged"),
    "layers": ({"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj\.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_llama_cpp_would_not_follow(tmp_path, own, name):
    changes, says = CONFIGS[name]
    path = own / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")
    refused(own, tmp_path / "m.gguf", says)


def test_a_folder_that_is_none(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "m.gguf", r"has no config\.json")


def test_widths_that_llama_cpp_has_no_place_for(tmp_path):
    folder = narrowed(tmp_path, "qwen3", uneven)
    says = r"its layers differ in width.*for qwen3 \(it can for llama, .*--allocation uniform\."
    refused(folder, tmp_path / "m.gguf", says)


def test_heads_that_llama_cpp_misses(tmp_path):
    folder = narrowed(tmp_path, "gpt_neox", lambda groups: even(groups, heads=1))
    refused(folder, tmp_path / "m.gguf", r"heads are gone.*for gpt_neox .*uniform and no heads")


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another head": (lambda s: {**s, HEAD: s[EMBEDDING] + 1}, "ties the head .*stored is another"),
    "no embedding": (lambda s: {k: s[k] for k in s if k != EMBEDDING}, "token_embd.weight .*miss"),
    "a part of a layer": (lambda s: {k: s[k] for k in s if k != UP}, "blk.1.ffn_up.weight .*miss"),
    "unknown": (lambda s: {**s, "model.extra.weight": s[UP] + 0}, "extra.weight has no place"),
    "quantised": (lambda s: {**s, UP: s[UP].to(torch.int8)}, "type I8: quantised .*before"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_whole(tmp_path, own, name):
    change, says = WEIGHTS[name]
    path = own / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    refused(own, tmp_path / "m.gguf", says)


def test_an_equal_head_that_is_stored_all_the_same(tmp_path, own):
    path = own / "model.safetensors"
    state = load_file(path)
    save_file({**state, HEAD: state[EMBEDDING].clone()}, path, {"format": "pt"})
    found = to_gguf.export(own, tmp_path / "m.gguf", check=False)
    assert "output.weight" not in {t.name for t in GGUFReader(found.file).tensors}


def test_an_untied_head_that_is_missing(tmp_path):
    folder = write_model(tmp_path / "m", tie_word_embeddings=False)
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({k: t for k, t in state.items() if k != HEAD}, path, {"format": "pt"})
    refused(folder, tmp_path / "m.gguf", r"output\.weight \(of the GGUF file\) is missing")


def test_weights_that_are_cut_short_or_absent(tmp_path, own):
    path = own / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(own, tmp_path / "m.gguf", "damaged or cut short")
    path.write_bytes(struct.pack("<Q", 10**9))
    refused(own, tmp_path / "m.gguf", "damaged or cut short")
    path.unlink()
    refused(own, tmp_path / "m.gguf", "has no weights")


def _normalised(t: Any) -> None:
    t.normalizer = normalizers.Lowercase()


def _other_splitting(t: Any) -> None:
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("keep"), "isolated"), t.pre_tokenizer])  # fmt: skip


def _whole_words(t: Any) -> None:
    t.model.ignore_merges = True


def _unknown(t: Any) -> None:
    t.model.byte_fallback = True


def _ended_twice(t: Any) -> None:
    t.post_processor = processors.TemplateProcessing(
        single="$A <end> <end>", pair="$A $B", special_tokens=[("<end>", 2)]
    )


TOKENIZERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "normaliser": (_normalised, r"text is normalised \(Lowercase\)"),
    "splitting": (_other_splitting, "it splits text as none of these: default, gpt-2, llama-bpe"),
    "merges": (_whole_words, "ignore_merges has to be False where text is split as gpt-2"),
    "fallback": (_unknown, "byte_fallback is True; it has to be unset"),
    "ends": (_ended_twice, "it puts other tokens around a text"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_llama_cpp_would_not_follow(tmp_path, own, name):
    change, says = TOKENIZERS[name]
    path = own / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    change(backend)
    backend.save(str(path))
    refused(own, tmp_path / "m.gguf", f"(?s)would tokenize otherwise: 1 problem.*{says}")


def test_tokens_that_take_spaces_and_texts_without_an_end(tmp_path, own):
    path = own / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["added_tokens"][1]["lstrip"] = True
    path.write_text(json.dumps(fields), encoding="utf-8")
    path = own / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "eos_token": None}), encoding="utf-8")
    refused(own, tmp_path / "m.gguf", "(?s)2 problems.*'<s>' also takes spaces.*no eos_token")


def test_a_tokenizer_of_another_kind(tmp_path, own):
    words = Tokenizer(WordLevel({"a": 0, "<end>": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(own)
    refused(own, tmp_path / "m.gguf", "a WordLevel tokenizer cannot be written .*byte-level BPE")


def test_a_tokenizer_of_another_model(tmp_path):
    folder = write_model(tmp_path / "m", vocab_size=300)
    refused(folder, tmp_path / "m.gguf", "gives ids up to 319, and the model has 300 embeddings")


def test_no_tokenizer_and_a_damaged_one(tmp_path, own):
    path = own / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:-1000], encoding="utf-8")
    refused(own, tmp_path / "m.gguf", "the tokenizer cannot be loaded")
    path.unlink()
    refused(own, tmp_path / "m.gguf", r"has no tokenizer\.json")


def test_composed_accents_are_told(tmp_path, own):
    path = own / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.normalizer = normalizers.NFC()
    backend.save(str(path))
    found = to_gguf.export(own, tmp_path / "m.gguf", check=False)
    assert len(found.notes) == 1 and "NFC" in found.notes[0]
    assert to_gguf.export(own, tmp_path / "n.gguf", check=False, quantize="q8_0").wide


@pytest.mark.long
@pytest.mark.real
def test_smollm2_says_the_same_in_llama_cpp(tmp_path):
    folder = models.load("smollm2-135m").folder
    found = to_gguf.export(folder, tmp_path / "smollm2.gguf")
    c = found.check
    assert c is not None and (found.arch, field(found.file, "tokenizer.ggml.pre")) == (
        "llama", "smollm")  # fmt: skip
    assert c.prompts == 8 and c.tokens > 400 and c.same + c.ties == c.tokens and c.ties < 5
    assert c.difference < 1e-3 and abs(c.loss - c.loss_there) < 1e-2
    assert c.texts == len(gguf_check.TEXTS)
    assert 2 * 134_515_008 < found.bytes < 2.05 * 134_515_008
