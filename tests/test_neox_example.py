"""The small gpt_neox: trained by one script to a stock folder, narrowed in every way by another."""

import importlib.util
import itertools
import json
import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from folders import sentences
from llm_narrow import vocabulary
from llm_narrow.blocks import Blocks
from llm_narrow.errors import BadInput

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SIZES = ["--hidden", "32", "--layers", "2", "--heads", "4", "--intermediate", "48"]
SMALL = ["--rows", "384", "--length", "64", "--batch-size", "2", "--tokens", "2k", "--lr", "1e-2",
         "--validation-tokens", "256", "--held-out-tokens", "256", "--evaluate-every", "5",
         *SIZES]  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of the example by name; `train` is the name of another example's script too."""
    before = list(sys.path)
    sys.path[:0] = [str(EXAMPLES / "neox"), str(EXAMPLES / "bench")]
    found = {}
    for name in ("train", "show"):
        file = EXAMPLES / "neox" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"neox_{name}", file)
        assert spec is not None and spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[f"neox_{name}"] = found[name]
        spec.loader.exec_module(found[name])
    found |= {name: importlib.import_module(name) for name in ("ngrams", "pythia", "learned")}
    yield found
    sys.path[:] = before


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with more tokens than stay, some of them added ones of spaces."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([sentences(99, 300)], trainer)
    made.add_tokens(["        ", "|||MARK|||"])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture(scope="module")
def line(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a training of seconds."""
    domain = tmp_path_factory.mktemp("neox-domain")
    for number in range(300):
        file = domain / f"project{number % 10}" / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(sentences(number, 4))
    return ["--domain", str(domain), "--tokenizer", str(tokenizer_file), *SMALL]


@pytest.fixture(scope="module")
def trained(
    scripts: dict[str, ModuleType], line: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder that the script made, proof in a fresh process included. Do not write to it."""
    out = tmp_path_factory.mktemp("neox") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_NARROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        scripts["train"].main([*line, "--out", str(out)])
    return out


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text("utf-8"))


def test_the_folder_is_a_stock_one_of_a_model_that_has_learned(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    config = model.config
    assert (config.model_type, config.use_parallel_residual) == ("gpt_neox", True)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert not config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert config.vocab_size == len(tokenizer) == 384
    assert config.eos_token_id == tokenizer.eos_token_id
    facts = facts_of(trained)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["tokens"] == 2048 and facts["verified"] < 1e-4
    found = facts["figures"]
    assert found["validation"]["model"]["loss"]["value"] < facts["first_validation"] - 0.5
    for part in ("validation", "held_out"):
        own, counted = found[part]["model"], found[part]["unigram"]
        above = counted["loss"]["value"] - own["loss"]["value"]
        assert counted["above"]["value"] == pytest.approx(above)
        assert found[part]["bigram"]["loss"]["value"] < counted["loss"]["value"]
    text = (trained / "README.md").read_text("utf-8")
    assert f"{found['validation']['model']['bits_per_byte']['value']:.3f} (" in text
    assert facts["command"] in text
    steps = [json.loads(row) for row in (trained / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(17))
    assert not trained.with_name("small.unfinished").exists()


def test_a_stopped_training_goes_on_to_the_same_weights(
    scripts: dict[str, ModuleType], line: list[str], trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(scripts["train"], "verify", lambda *args: 0.0)
    save, saved = scripts["train"].train.__globals__["states"].save, []

    def stop(folder: Path, snapshot: Any, made_by: Any) -> None:
        save(folder, snapshot, made_by)
        saved.append(snapshot.step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("llm_narrow.train.states.save", stop)
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        scripts["train"].main([*line, "--out", str(out)])
    assert saved == [5, 10] and not out.exists()
    with pytest.raises(BadInput, match=r"other settings \(heads was '4' and is '2' now\)"):
        scripts["train"].main([*line, "--out", str(out), "--heads", "2"])
    scripts["train"].main([*line, "--out", str(out)])
    assert saved[2:] == [15, 16]
    weights = [load_file(f / "model.safetensors") for f in (trained, out)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0] | weights[1])
    assert not out.with_name("model.unfinished").exists()


def test_a_finished_model_is_replaced_when_forced_only(
    scripts: dict[str, ModuleType], line: list[str], trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(scripts["train"], "verify", lambda *args: 0.0)
    out = tmp_path / "small"
    shutil.copytree(trained, out)
    again = [*line, "--out", str(out), "--seed", "1"]
    with pytest.raises(BadInput, match="exists already"):
        scripts["train"].main(again)
    assert facts_of(out) == facts_of(trained)
    scripts["train"].main([*again, "--force"])
    assert facts_of(out)["settings"]["seed"] == 1


def test_minutes_choose_tokens_once(
    scripts: dict[str, ModuleType], line: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    script = scripts["train"]
    monkeypatch.setattr(script, "verify", lambda *args: 0.0)
    at = line.index("--tokens")
    line = [*line[:at], *line[at + 2 :], "--out", str(tmp_path / "model")]
    measured = []

    def speed(*args: Any) -> Any:
        measured.append(true_speed(*args))
        return script.Speed(step=2.0, validation=1.0)

    true_speed = script.speed
    monkeypatch.setattr(script, "speed", speed)
    true_train = script.train

    def stopped(*args: Any, **given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", lambda *a, **g: (stopped if "state" in g else true_train)(
        *a, **g))  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        script.main([*line, "--minutes", "0.4"])
    assert measured[0].step > 0 and measured[0].validation > 0
    monkeypatch.setattr(script, "train", true_train)
    script.main([*line, "--minutes", "0.4"])
    assert len(measured) == 1
    # 24 s less two validations of 1 s, at 2 s a step and a fifth of a validation: ten steps.
    assert facts_of(tmp_path / "model")["tokens"] == 10 * 2 * 64


def test_affordable_is_never_less_than_a_step(scripts: dict[str, ModuleType]) -> None:
    script = scripts["train"]
    settings = script.Settings(1, batch_size=4, evaluate_every=5)
    assert script.affordable(0.001, script.Speed(2.0, 1.0), settings, 32) == 4 * 32


def test_the_threshold_is_the_lowest_that_fits(
    scripts: dict[str, ModuleType], tokenizer_file: Path
) -> None:
    pythia = scripts["pythia"]
    whole = pythia.tokenizer(tokenizer_file)
    counted = vocabulary.counts([sentences(n, 20) for n in range(5)], whole)
    found = pythia.trimmed(whole, counted, 320)

    def closed(threshold: int) -> int:
        used = vocabulary.used(counted, threshold)
        return int(vocabulary.closure(whole, used, keep_special=False).sum())

    lower = [t for t in counted.unique().tolist() if 0 < t < found.threshold]
    assert lower and closed(found.threshold) <= 320 < min(closed(t) for t in lower)
    assert found.rows == len(found.tokenizer) == 320
    assert found.used == int((counted >= found.threshold).sum())
    names = found.tokenizer.get_vocab()
    assert "<|endoftext|>" in names
    assert not {"|||MARK|||", "<|padding|>", "        "} & names.keys()  # the text has none
    text = sentences(1, 20)
    assert found.tokenizer.decode(found.tokenizer(text)["input_ids"]) == text
    roomy = pythia.trimmed(whole, counted, 4096)
    assert roomy.threshold == 1 and roomy.rows < 448
    with pytest.raises(BadInput, match=r"--rows must be at least 25\d, .*got 64"):
        pythia.trimmed(whole, counted, 64)


def test_counting_by_hand(scripts: dict[str, ModuleType]) -> None:
    ngrams, rows = scripts["ngrams"], 7
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, rows - 1, (6, 9), generator=chance).pow(2) % (rows - 1)
    pairs = Counter((a, b) for block in tokens.tolist()
                    for a, b in itertools.pairwise(block))  # fmt: skip
    found = ngrams.bigram(tokens, rows)
    once, twice = (sum(c == n for c in pairs.values()) for n in (1, 2))
    discount = once / (once + 2 * twice)
    assert found.discount == pytest.approx(discount) and 0 < discount < 1

    def by_hand(a: int, b: int) -> float:
        below = (1 + len({x for x, y in pairs if y == b})) / (rows + len(pairs))
        total = sum(c for (x, _), c in pairs.items() if x == a)
        if not total:
            return below
        kinds = len({y for x, y in pairs if x == a})
        return (max(0, pairs[a, b] - discount) + discount * kinds * below) / total

    for a in range(rows):  # the last is in no block
        told = found.probability(torch.full((rows,), a), torch.arange(rows))
        assert told.tolist() == pytest.approx([by_hand(a, b) for b in range(rows)])
        assert float(told.sum()) == pytest.approx(1)
    share = ngrams.unigram(tokens, rows)
    assert share.tolist() == pytest.approx(
        [(1 + int((tokens == n).sum())) / (tokens.numel() + rows) for n in range(rows)]
    )
    blocks = Blocks(tokens.int(), torch.ones(6, 9).short(), torch.zeros(6, 9).int(), "")
    nats = sum(-math.log(by_hand(a, b)) for block in tokens.tolist()
               for a, b in itertools.pairwise(block))  # fmt: skip
    sums = ngrams.sums(blocks, found)
    assert (float(sums.nats), float(sums.tokens)) == (pytest.approx(nats), 48)
    assert float(ngrams.sums(blocks, share).nats) == pytest.approx(
        -float(share[tokens[:, 1:]].log().sum())
    )


def test_pairs_of_which_none_came_up_once_need_no_discount(scripts: dict[str, ModuleType]) -> None:
    found = scripts["ngrams"].bigram(torch.tensor([[0, 1, 0, 1, 0]]), 3)
    assert found.discount == 0
    assert found.probability(torch.tensor([0, 2]), torch.tensor([1, 1])).tolist() == [1.0, 2 / 5]


@pytest.fixture
def show(
    scripts: dict[str, ModuleType], trained: Path, line: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[ModuleType, list[str]]:  # fmt: skip
    """The script, with options that make it tiny, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    return scripts["show"], [
        "--model", str(trained), "--domain", line[1], "--length", "32", "--batch-size", "4",
        "--calibration-tokens", "256", "--held-out-tokens", "256", "--validation-tokens", "128",
        "--tokens", "1024", "--threshold", "400", "--out", str(tmp_path / "docs" / "result"),
    ]  # fmt: skip


def test_show_makes_every_run_and_takes_them_up_again(
    show: tuple[ModuleType, list[str]], trained: Path, tmp_path: Path, run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    script, options = show
    script.main(options)
    written = json.loads((tmp_path / "docs" / "result.json").read_text("utf-8"))
    about, rows = written["about"], {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["random", "attribution", "refit", "oneshot", "lasso", "trained on",
                          "heads", "vocabulary"]  # fmt: skip
    same = {rows[name]["parameters"] for name in ("random", "attribution", "refit", "oneshot",
                                                  "lasso")}  # fmt: skip
    assert same == {about["parameters"] - 2 * 24 * (32 + 1 + 32)}
    assert rows["refit"]["layout"] == "uniform"
    assert (rows["heads"]["layout"], rows["heads"]["model_type"]) == ("uneven", "llm_narrow")
    assert rows["vocabulary"]["rows"] < 384 and rows["vocabulary"]["above"] is None
    assert f"({rows['vocabulary']['rows']} of 384 stay)" in (
        (tmp_path / "docs" / "result.md").read_text("utf-8")
    )
    assert rows["trained on"]["above"]["value"] < 0
    assert rows["lasso"]["zero_after_lasso"] == 48
    (pair,) = [p for p in about["pairs"] if p["first"] == "refit"]
    losses = [rows[name]["loss"]["value"] for name in ("refit", "attribution")]
    assert pair["difference"]["value"] == pytest.approx(losses[0] - losses[1], abs=1e-6)
    assert about["away_from_fresh"]["least_largest_bias"] > 0
    assert about["away_from_fresh"]["norms"] == 5 and about["away_from_fresh"]["biases"] == 13
    if about["gguf"] is not None:
        assert about["gguf"]["arch"] == "gptneox"
        assert about["gguf"]["same"] + about["gguf"]["ties"] == about["gguf"]["tokens"]
    page = (tmp_path / "docs" / "result.md").read_text("utf-8")
    assert all(row["command"] in page for row in rows.values())
    assert facts_of(trained)["command"] in page
    assert f"{rows['heads']['above']['value']:+.3f} (" in page

    asked = []
    for name in ("prune", "recover"):
        home = "stages" if name == "prune" else "recovery"
        monkeypatch.setattr(f"llm_narrow.{home}.{name}", lambda recipe, **given: (
            asked.append(recipe), Path("stop").read_text()))  # fmt: skip
    script.main(options)  # nothing is made anew
    assert not asked
    for row in rows.values():
        # The command beside the figures asks for the settings that they were made with.
        with pytest.raises(FileNotFoundError):
            run(*shlex.split(row["command"])[1:])
        folder = Path(shlex.split(row["command"])[-1])
        held = json.loads((folder / "manifest.json").read_text("utf-8"))["recipe"]
        assert json.loads(json.dumps(asked.pop().resolved())) == held
    with pytest.raises(FileNotFoundError):
        script.main([*options, "--neurons", "0.25"])
    assert asked.pop().prune.sparsity == {"neurons": 0.25}


def test_a_refused_export_is_told(scripts: dict[str, ModuleType]) -> None:
    told = scripts["show"].gguf_line({"error": "heads are gone", "command": ""}, 3)
    assert told == "Row 3 as GGUF: **refused**. heads are gone"
    assert "not installed" in scripts["show"].gguf_line(None, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--tokens", "none"], "--tokens must be"),
        (["--lr", "-1"], "--lr must be a number above 0, got -1.0"),
        (["--hidden", "36", "--tokens", "2k"], "--hidden must be a multiple of 8 times --heads"),
        (["--layers", "0", "--tokens", "2k"], "--layers must be at least 1, got 0"),
        (["--rows", "10", "--tokens", "2k"], "--rows must be at least 25"),
        (["--domain", "pythn", "--tokens", "2k"], "Did you mean 'python'"),
        (["--tokenizer", "nothing.json", "--tokens", "2k"], "nothing.json is no tokenizer.json"),
        (["--out", ".", "--tokens", "2k", "--force"], "exists, and train.py has not made it"),
    ],
)
def test_bad_options_of_the_training(
    scripts: dict[str, ModuleType], line: list[str], tmp_path: Path, options: list[str],
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    at = line.index("--tokens")
    whole = [*line[:at], *line[at + 2 :], "--out", str(tmp_path / "out"), *options]
    refused(scripts["train"], whole, said, capsys)
    assert not list(tmp_path.iterdir())


def test_bad_options_of_the_show(
    show: tuple[ModuleType, list[str]], tmp_path: Path, tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    script, options = show
    refused(script, [*options, "--model", str(tmp_path)], "is no folder of examples/neox/train.py",
            capsys)  # fmt: skip
    refused(script, [*options, "--neurons", "1.5"], "1.5", capsys)
    refused(script, [*options, "--length", "128"], "--length", capsys)


def refused(
    script: ModuleType, line: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line on stderr, as when the script is run."""
    import results

    with pytest.raises(SystemExit) as ended:
        results.told(lambda _: script.main(line))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and not any("Traceback" in text for text in lines)


def test_a_tokenizer_that_ends_no_text_is_refused(
    scripts: dict[str, ModuleType], tokenizer_file: Path, tmp_path: Path
) -> None:
    content = json.loads(tokenizer_file.read_text("utf-8"))
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(content), "utf-8")
    with pytest.raises(BadInput, match=r"has no token <\|endoftext\|>"):
        scripts["pythia"].tokenizer(other)


@pytest.mark.real
def test_the_package_has_pythias_tokenizer(scripts: dict[str, ModuleType]) -> None:
    whole = scripts["pythia"].tokenizer()
    assert vocabulary.size(whole) == 50280
    assert whole("def f(x):\n        return")["input_ids"][-2:] == [50270, 2309]
