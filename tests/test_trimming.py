"""The vocabulary as a part of `prune`: trimmed first, measured in bytes, known to the teacher."""

import json
import random
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import refused
from folders import write_domain, write_model
from llm_narrow import inputs, trimming, vocabulary_rows
from llm_narrow import recipe as recipes
from llm_narrow.progress import silent
from llm_narrow.rows import Row, read

TRAIN = ["--recover-tokens", "512", "--validation-tokens", "128", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows words that the domain has not."""
    chance = random.Random(0)
    more = " ".join("".join(chance.choices(ascii_lowercase, k=6)) for _ in range(500))
    place = tmp_path_factory.mktemp("models") / "wide"
    return write_model(place, vocabulary=1600, more=more, vocab_size=1600)


@pytest.fixture(scope="module")
def domain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domain(tmp_path_factory.mktemp("domains") / "few", files=30)


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def rows(run: Path) -> list[Row]:
    return read(run / "rows.jsonl")[0]


def test_the_vocabulary_goes_first_and_units_for_the_rest(prune: Any, tmp_path: Path) -> None:
    done = prune("--kinds", "vocabulary,neurons", "--target-params", "42%")
    assert done.code == 0, done.err
    run = tmp_path / "run"
    facts, (before, after) = told(run), rows(run)
    cut = facts["vocabulary"]
    config = json.loads((run / "model/config.json").read_text())
    assert cut["rows"] == config["vocab_size"] < cut["rows_before"] and cut["rows"] % 64 == 0
    assert facts["model"]["parameters"] == before.parameters == cut["parameters_before"]
    assert cut["parameters"] > after.parameters <= 0.42 * before.parameters
    assert before.bits_per_byte_ratio is None and after.bits_per_byte_ratio is not None
    assert after.documents == before.documents and after.tokens >= before.tokens
    assert "come up at least 2 times" in done.err
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert len(tokenizer.get_vocab()) <= cut["rows"] == model.lm_head.weight.shape[0]
    old_ids, size = vocabulary_rows.read_map(run / "model" / vocabulary_rows.MAP)
    assert (len(old_ids), size) == (cut["rows"], cut["rows_before"])


def test_the_vocabulary_alone_leaves_the_logits_of_what_stays(
    prune: Any, model_folder: Path, tmp_path: Path
) -> None:
    done = prune("--kinds", "vocabulary", "--vocabulary-threshold", "1")
    assert done.code == 0, done.err
    facts = told(tmp_path / "run")
    assert facts["refit"] == {"mode": "not needed: no unit was removed"}
    assert facts["scores"] is None and all(row["before"] == row["after"] for row in facts["plan"])
    whole = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    old_ids, _ = vocabulary_rows.read_map(tmp_path / "run/model" / vocabulary_rows.MAP)
    new = torch.arange(0, len(old_ids), 7)[None]
    with torch.no_grad():
        expected = whole(old_ids[new]).logits[..., old_ids]
        assert torch.allclose(narrow(new).logits, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_target_that_the_vocabulary_alone_passes_keeps_more_tokens(
    prune: Any, tmp_path: Path
) -> None:
    least = 0.0
    for share in ("99%", "96%"):
        done = prune("--kinds", "vocabulary,neurons", "--target-params", share, "--force")
        assert done.code == 0, done.err
        facts, (before, after) = told(tmp_path / "run"), rows(tmp_path / "run")
        wanted = float(share[:-1]) / 100 * before.parameters
        row = (before.parameters - facts["vocabulary"]["parameters"]) / (
            facts["vocabulary"]["rows_before"] - facts["vocabulary"]["rows"]
        )
        assert wanted - 64 * row <= after.parameters <= wanted != least
        assert facts["refit"]["mode"].startswith("not needed")
        least = wanted


def test_recovery_learns_from_a_teacher_with_the_same_rows(
    prune: Any, run: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    done = prune("--kinds", "vocabulary,neurons", "--target-params", "42%", *TRAIN)
    assert done.code == 0, done.err
    recovered = told(tmp_path / "run")["recover"]
    assert recovered["validation"] < recovered["validation_first"]
    # Again, from the run folder: the map says which of the teacher's rows there are.
    again = tmp_path / "again"
    for how in ("teacher", "cached"):
        done = run("recover", tmp_path / "run", "--tokens", "256", "--out", again, "--force",
                   "--distill", how, "--top-k", "8", "--no-speed")  # fmt: skip
        assert done.code == 0, done.err
        assert (again / "model" / vocabulary_rows.MAP).is_file()
    # Beside the original, on the same documents.
    done = run("bench", model_folder, again, "--domain", domain_folder, "--length", "32",
               "--held-out-tokens", "256", "--no-speed", "--json")  # fmt: skip
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["rows"]
    assert second["bits_per_byte_ratio"] > 0 and second["documents"] == first["documents"]


def test_a_vocabulary_can_be_trimmed_again(prune: Any, tmp_path: Path) -> None:
    prune("--kinds", "vocabulary", "--vocabulary-threshold", "1")
    first, size = vocabulary_rows.read_map(tmp_path / "run/model" / vocabulary_rows.MAP)
    second = tmp_path / "second"
    done = prune("--model", tmp_path / "run", "--kinds", "vocabulary", "--vocabulary-threshold",
                 "20", "--out", second)  # fmt: skip
    assert done.code == 0, done.err
    both, of = vocabulary_rows.read_map(second / "model" / vocabulary_rows.MAP)
    assert of == size and len(both) < len(first)
    assert set(both.tolist()) <= set(first.tolist())  # in ids of the original


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kinds", "vocabulary", "--target-params", "30%"), "least that removing unused tokens"),
        (("--kinds", "vocabulary", "--method", "lasso"), "no units to draw"),
        (("--kinds", "experts", "--method", "lasso"), "cannot draw experts to zero"),
        (("--vocabulary", "some"), "--vocabulary 'some' is unknown"),
        (("--vocabulary", "domain", "--vocabulary-threshold", "0"), "at least 1"),
        (("--vocabulary", "domain", "--vocabulary-threshold", "999999"), "most frequent token"),
        (("--kinds", ""), "--kinds"),
    ],
)
def test_what_cannot_be_trimmed_is_told(
    prune: Any, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    refused(prune(*flags), said)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_would_stay(prune: Any, tmp_path: Path) -> None:
    done = prune("--kinds", "vocabulary,neurons", "--target-params", "42%", "--dry-run")
    assert done.code == 0 and "Vocabulary:" in done.err and "parameters" in done.out
    assert not (tmp_path / "run").exists()


def test_a_comparison_reads_the_same_tokens(
    run: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: '{model_folder}'}}\ndomain: {{name: '{domain_folder}'}}\n"
        "prune: {vocabulary: domain}\n"
    )
    done = run("compare", "--recipe", recipe, "--sizes", "80%", "--tokens", "1024",
               "--lasso-tokens", "256", "--out", tmp_path / "out")  # fmt: skip
    refused(done, "must be whole to compare")


def test_tokens_are_counted_in_all_text_but_the_held_out(
    model_folder: Path, domain_folder: Path
) -> None:
    recipe = recipes.load(None, {"model": model_folder, "domain": domain_folder, "length": 32,
                                 "kinds": "vocabulary", "vocabulary_threshold": 1})  # fmt: skip
    start = inputs.gather(recipe)
    found = trimming.chosen(start, recipe, track=silent)
    there = {}
    for part in ("train", "calibration", "held_out"):
        tokens = inputs.blocks_of(start.loaded, start.domain, part, recipe).tokens
        there[part] = set(tokens.flatten().tolist())
    assert all(found.keep[sorted(there["train"] | there["calibration"])])
    assert found.used == len(there["train"] | there["calibration"])
    train = trimming.chosen(start, recipe, counted_in=("train",), track=silent)
    assert train.used == len(there["train"]) and train.counted < found.counted
    fewer = trimming.chosen(start, recipe, rows=int(train.keep.sum()) - 64, track=silent)
    assert int(fewer.keep.sum()) == int(train.keep.sum()) - 64
