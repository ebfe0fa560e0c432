"""Law 4: what is saved says the same in a fresh process; and what is damaged is refused."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llm_narrow import checkpoint, units, verify
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups
from tiny import CONFIGS, VOCAB, even, tiny, uneven

LANGUAGE = tuple(CONFIGS)
FIXED_WIDTH = ("bloom", "mpt")  # no stock config can say how wide their MLPs are
FREE_HEADS = (
    "cohere", "deepseek_v2", "gemma", "gemma2", "gemma3_text", "granite", "llama",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
TOKENS = torch.randint(VOCAB, (2, 18), generator=torch.Generator().manual_seed(5))
# 8 heads for 4 key/value heads: without one of those 6 are left, which do not divide 32.
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
LONG_ROPE = {
    "rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model that lost units: `neurons` and `heads` of every group, or unevenly."""

    kind: str
    stored: str  # the model type that its config.json must have
    neurons: int = 16
    heads: int = 0
    uneven: bool = False
    dtype: torch.dtype = torch.float32
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        less = "uneven" if self.uneven else f"{self.neurons}-{self.heads}"
        values = [str(v) if type(v) in (int, bool) else "-" for _, v in self.changes]
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.kind, "as", self.stored, less, dtype, *values])

    def narrowed(self) -> tuple[Any, dict[str, Any]]:
        model = tiny(self.kind, **dict(self.changes))
        if any(p.dim() == 3 for p in model.parameters()):  # what stock code adds up with
            model.set_experts_implementation("grouped_mm")
        groups = find_groups(model)
        keep = uneven(groups) if self.uneven else even(groups, neurons=self.neurons,
                                                       heads=self.heads)  # fmt: skip
        original = copy.deepcopy(model.config)
        units.remove(model, groups, keep)
        return model, {"original_config": original, "groups": groups, "keep": keep}


def items(**changes: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(changes.items())


def fewer(kind: str) -> int:
    """How many heads go: DeepSeek 2 wants a number that divides 32, and has 4 of one query each."""
    return 2 if kind == "deepseek_v2" else 1


UNIFORM = [
    *(Case(kind, kind) for kind in LANGUAGE if kind not in FIXED_WIDTH),
    *(Case(kind, kind, heads=fewer(kind)) for kind in FREE_HEADS),
    *(Case(kind, kind, heads=fewer(kind), dtype=torch.bfloat16) for kind in FREE_HEADS),
    Case("llama", "llama", heads=1, changes=items(tie_word_embeddings=False)),
    Case("llama", "llama", heads=1, changes=items(attention_bias=True, mlp_bias=True)),
    Case("llama", "llama", neurons=0),
    Case("llama", "mistral", heads=1, changes=items(**EIGHT)),
    Case("llama", "mistral", heads=1, changes=items(**EIGHT, tie_word_embeddings=False)),
    Case("llama", "mistral", heads=1, changes=items(**EIGHT, rope_parameters=LONG_ROPE)),
    Case("llama", "granite", heads=1, changes=items(**EIGHT, attention_bias=True)),
    Case("llama", "granite", heads=1, changes=items(**EIGHT, mlp_bias=True)),
    Case("llama", "granite", heads=1, changes=items(**EIGHT, attention_bias=True, mlp_bias=True)),
    Case("mistral", "mistral", heads=1, changes=items(**EIGHT, sliding_window=4)),
    Case("qwen2", "qwen2", heads=1, changes=items(**EIGHT)),
    Case("phi3", "phi3", heads=1, changes=items(**EIGHT)),
    Case("gpt2", "gpt2", changes=items(n_inner=None)),
]
UNEVEN = [
    *(Case(kind, checkpoint.UNEVEN, uneven=True) for kind in LANGUAGE),
    *(Case(kind, checkpoint.UNEVEN, uneven=True, dtype=torch.bfloat16) for kind in LANGUAGE),
    *(
        Case(kind, checkpoint.UNEVEN, heads=1)
        for kind in LANGUAGE
        if kind not in FREE_HEADS or kind == "deepseek_v2"
    ),
    Case("gemma3_text", checkpoint.UNEVEN, heads=1, changes=items(**EIGHT)),
    Case("llama", checkpoint.UNEVEN, uneven=True, changes=items(tie_word_embeddings=False)),
]
CASES = UNIFORM + UNEVEN


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[Case, tuple[Path, Any, verify.Written, dict[str, Any]]]:
    """For each case its folder, the model in memory, and what a fresh process says of the folder.

    One process opens all uniform folders, without llm_narrow; another all uneven ones.
    """
    place = tmp_path_factory.mktemp("folders")
    found = {}
    for cases in (UNIFORM, UNEVEN):
        written = []
        for number, case in enumerate(cases):
            model, decision = case.narrowed()
            folder = place / f"{case.stored}{number}-{len(cases)}"
            folder.mkdir()
            about = checkpoint.write(model, None, folder, dtype=case.dtype, **decision)
            written.append((folder, model, about))
        answers = verify.ask([(folder, about, False) for folder, _, about in written], TOKENS)
        for case, (folder, model, about), answer in zip(cases, written, answers, strict=True):
            found[case] = (folder, model, about, answer)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fresh_process_gives_the_same_logits(told, case):
    folder, model, about, answer = told[case]
    layout = "uneven" if case.stored == checkpoint.UNEVEN else "uniform"
    assert (about.layout, about.model_type, about.dtype) == (layout, case.stored, case.dtype)
    assert json.loads((folder / "config.json").read_text())["model_type"] == case.stored
    expected = verify._logits(model, TOKENS, case.dtype)
    scale = expected.abs().max()
    assert scale > 0.5
    assert (answer["logits"] - expected).abs().max() / scale < verify.TOLERANCE[case.dtype] / 10
    late = (answer["cached"] - expected[:, -1]).abs().max() / scale
    assert late < verify.TOLERANCE[case.dtype]
    assert 1 <= answer["generated"].numel() <= 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loading_gives_back_the_model(told, case):
    """Here too, exactly; with no weights left without memory, and units to narrow again."""
    folder, model, _, _ = told[case]
    again = checkpoint.load(folder)
    assert again.dtype == case.dtype
    assert not again.training
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    expected = verify._logits(model, TOKENS, case.dtype)
    assert torch.equal(verify._logits(again, TOKENS, case.dtype), expected)
    if case.stored != "granite":
        assert [g.size for g in find_groups(again)] == [g.size for g in find_groups(model)]


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_an_uneven_folder_never_loads_as_something_else(told, case):
    """By its type; by class too, and if asked to make up what does not fit."""
    folder, *_ = told[case]
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="model type `llm_narrow`"):
            AutoModelForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match="llm_narrow"):
        AutoConfig.from_pretrained(folder)
    if case.kind == "llama":
        with pytest.raises(RuntimeError, match="mismatch"):
            LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", [UNIFORM[0], UNIFORM[-1], UNEVEN[0]], ids=str)
def test_the_keep_can_be_understood_alone(told, case):
    folder, *_ = told[case]
    with safe_open(folder / "keep.safetensors", framework="pt") as file:
        metadata = file.metadata()
    _, decision = case.narrowed()
    keep = checkpoint.read_keep(folder / "keep.safetensors")
    assert keep.keys() == decision["keep"].keys()
    assert all(torch.equal(keep[name], decision["keep"][name]) for name in keep)
    about = json.loads(metadata["groups"])
    assert about == {
        g.name: {"kind": g.kind, "size": g.size, "kept": int(keep[g.name].sum())}
        for g in decision["groups"]
    }
    original = json.loads(json.dumps(decision["original_config"].to_dict()))
    del original["_name_or_path"]
    assert json.loads(metadata["original_config"]) == original
    assert metadata["layout"] == ("uneven" if case in UNEVEN else "uniform")


def test_the_index_names_every_weight_once(told):
    folder, *_ = told[UNIFORM[0]]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(folder / "model.safetensors").keys()
    assert set(index["weight_map"].values()) == {"model.safetensors"}


@pytest.mark.parametrize("left", [None, 12])
@pytest.mark.parametrize("kind", LANGUAGE)
def test_an_uneven_model_can_be_narrowed_again(tmp_path, kind, left):
    """Unevenly, or to 12 neurons and one head each. The keep tells it in units of the original."""
    model, decision = Case(kind, "", uneven=True).narrowed()
    (tmp_path / "first").mkdir()
    checkpoint.write(model, None, tmp_path / "first", **decision)
    again = checkpoint.load(tmp_path / "first")
    groups = find_groups(again)
    keep = uneven(groups, seed=7, share=0.5)
    if left:
        keep = {g.name: torch.arange(g.size) < (left if g.kind == "neurons" else 1) for g in groups}
    units.remove(again, groups, keep)
    (tmp_path / "second").mkdir()
    about = checkpoint.write(again, None, tmp_path / "second", groups=groups, keep=keep,
                             original_config=again.config)  # fmt: skip
    assert about.layout == ("uniform" if left and kind in FREE_HEADS else "uneven")
    last = checkpoint.load(tmp_path / "second")
    expected = verify._logits(again, TOKENS, torch.float32)
    fused = any(p.dim() == 3 for p in again.parameters())  # may add up in another order by now
    difference = (verify._logits(last, TOKENS, torch.float32) - expected).abs().max()
    assert difference <= (1e-5 if fused else 0)
    whole = checkpoint.read_keep(tmp_path / "second" / "keep.safetensors")
    for name, first in decision["keep"].items():
        assert len(whole[name]) == len(first)
        assert torch.equal(whole[name][first], keep[name])
        assert not whole[name][~first].any()


def test_writing_leaves_the_model_as_it_is(tmp_path):
    model, decision = Case("llama", "mistral", heads=1, changes=items(**EIGHT)).narrowed()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config, original = model.config.to_dict(), decision["original_config"].to_dict()
    checkpoint.write(model, None, tmp_path, dtype=torch.bfloat16, **decision)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.to_dict() == config
    assert decision["original_config"].to_dict() == original


@pytest.mark.parametrize("case", [UNIFORM[3], UNEVEN[3]], ids=str)
def test_no_file_tells_where_the_model_lay(tmp_path, case):
    (tmp_path / "private").mkdir()
    (tmp_path / "narrow").mkdir()
    byte_level_tokenizer().save_pretrained(tmp_path / "private")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "private")
    model, decision = case.narrowed()
    for config in (model.config, decision["original_config"]):
        config.name_or_path = str(tmp_path / "private")
    checkpoint.write(model, tokenizer, tmp_path / "narrow", **decision)
    files = list((tmp_path / "narrow").iterdir())
    assert len(files) == 7
    assert not [path.name for path in files if b"private" in path.read_bytes()]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, with digits split off first, as SmolLM2's has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_save_tells_what_it_wrote_and_proved(tmp_path):
    """Stored as mistral, whose tokenizers transformers treats in its own way, in bfloat16."""
    case = Case("llama", "mistral", heads=1, changes=items(**EIGHT, vocab_size=257))
    model, decision = case.narrowed()
    model.generation_config.max_length = 77
    out = tmp_path / "deep" / "narrow"
    proved = checkpoint.save(model, byte_level_tokenizer(), out, dtype=torch.bfloat16,
                             files={"README.md": "# a card\n"}, **decision)  # fmt: skip
    assert (proved.layout, proved.model_type) == ("uniform", "mistral")
    assert proved.difference <= proved.tolerance == 5e-2
    assert proved.files == {path.name: path.stat().st_size for path in out.iterdir()}
    expected = {"config.json", "generation_config.json", "keep.safetensors", "model.safetensors",
                "model.safetensors.index.json", "README.md", "tokenizer.json",
                "tokenizer_config.json"}  # fmt: skip
    assert set(proved.files) == expected
    assert proved.sha256 == checkpoint.weights_sha256(out)
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 77
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (config["head_dim"], config["sliding_window"], config["dtype"]) == (4, None, "bfloat16")
    with pytest.raises(BadInput, match="narrow exists already"):
        checkpoint.save(model, None, out, **decision)


def damage_weights(folder: Path, about: verify.Written) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_weight(folder: Path, about: verify.Written) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("accident", "told_of"),
    [
        (damage_weights, "its logits differ from those in memory by 0.0"),
        (lose_weight, "cannot open it: .*down_proj"),
    ],
)
def test_a_folder_that_fails_the_proof_is_not_left(tmp_path, monkeypatch, accident, told_of):
    write = checkpoint.write

    def careless(model, tokenizer, folder, **decision):
        about = write(model, tokenizer, folder, **decision)
        accident(folder, about)
        return about

    monkeypatch.setattr(checkpoint, "write", careless)
    model, decision = Case("llama", "llama", uneven=accident is lose_weight,
                           changes=items(vocab_size=257)).narrowed()  # fmt: skip
    with pytest.raises(verify.NotVerified, match=told_of):
        checkpoint.save(model, byte_level_tokenizer(), tmp_path / "narrow", **decision)
    assert not list(tmp_path.iterdir())


def test_a_fresh_process_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "SECONDS", 0)
    model, decision = Case("llama", "llama").narrowed()
    with pytest.raises(verify.NotVerified, match="did not open it in 0 seconds"):
        checkpoint.save(model, None, tmp_path / "narrow", **decision)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "told_of"),
    [
        ({"logits": torch.full((2, 16, 257), torch.nan)}, "logits differ from .* by nan of"),
        ({"logits": torch.zeros(2, 16, 9)}, "its logits .* have another shape"),
        ({"cached": torch.zeros(2, 257)}, "logits from a cache differ from .* by 1 of"),
        ({"encoded": torch.ones(3)}, "its tokenizer, .* encodes 'def f"),
        ({"generated": torch.ones(1, 0)}, "generates nothing"),
    ],
    ids=["nan", "shape", "cache", "tokenizer", "nothing generated"],
)
def test_every_part_of_the_answer_counts(tmp_path, monkeypatch, answer, told_of):
    """The answer of a fresh process, with one part of it put wrong."""
    model, decision = Case("llama", "llama", changes=items(vocab_size=257)).narrowed()
    tokenizer = byte_level_tokenizer()
    about = checkpoint.write(model, None, tmp_path, **decision)
    tokens = torch.randint(257, (2, 16))
    logits = verify._logits(model, tokens, torch.float32)
    good = {"logits": logits, "cached": logits[:, -1], "generated": torch.ones(1, 4),
            "encoded": torch.tensor(tokenizer(verify.TEXT)["input_ids"])}  # fmt: skip
    monkeypatch.setattr(verify, "ask", lambda folders, tokens: [good])
    assert verify.verify(tmp_path, about, model, tokenizer, tokens=tokens) == 0
    monkeypatch.setattr(verify, "ask", lambda folders, tokens: [{**good, **answer}])
    with pytest.raises(verify.NotVerified, match=told_of):
        verify.verify(tmp_path, about, model, tokenizer, tokens=tokens)


def test_a_keep_that_is_not_the_models_is_refused(tmp_path):
    model = tiny("llama")
    groups = find_groups(model)
    keep = units.keep_all(groups)
    keep[groups[1].name][:] = False
    with pytest.raises(BadInput, match=r"self_attn has 2 heads, and keep holds 0"):
        checkpoint.write(model, None, tmp_path, original_config=model.config, groups=groups,
                         keep=keep)  # fmt: skip
