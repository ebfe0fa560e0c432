"""Contrastive narrowing: scores less those of others, and what was forgotten, measured."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import refused
from llm_narrow import scores
from llm_narrow.contrast import _less
from llm_narrow.recipe import FORGETTING
from llm_narrow.scoring import Scored

TRAIN = ["--recover-tokens", "256", "--validation-tokens", "128", "--distill", "none"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain of numbers."""
    folder = tmp_path_factory.mktemp("domains") / "digits"
    for number in range(30):
        chance = random.Random(number)
        lines = (" ".join(str(chance.randrange(999)) for _ in range(12)) for _ in range(20))
        file = folder / f"project{number % 10}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    return folder


def of(values: list[float], tokens: int) -> Scored:
    return Scored({"g": torch.tensor(values)}, None, Path("s"), False, {"tokens": str(tokens)})


def test_scores_are_less_the_mean_of_others_per_token() -> None:
    own = of([4.0, 2.0, 1.0], 100)
    found = _less(own, [of([2.0, 2.0, 0.0], 50), of([0.0, 4.0, 8.0], 200)], 0.5)
    # Per token of the own text: [4, 4, 0] and [0, 2, 4], of which the mean, halved.
    assert found["g"].tolist() == [3.0, 0.5, 0.0]
    assert own.scores["g"].tolist() == [4.0, 2.0, 1.0]


def test_units_that_only_the_other_domain_uses_go_first(
    prune: Any, digits: Path, tmp_path: Path
) -> None:
    kept = {}
    for weight in ("0", "1"):
        done = prune("--forget", digits, "--forget-weight", weight, "--forget-refit", "0",
                     "--out", tmp_path / weight)  # fmt: skip
        assert done.code == 0, done.err
        told = json.loads((tmp_path / weight / "manifest.json").read_text())
        (name,) = told["forget"]["domains"]
        assert name == str(digits) and told["forget"]["weight"] == float(weight)
        one = told["forget"]["domains"][name]
        assert one["bits_per_byte_ratio"]["value"] == pytest.approx(
            one["bits_per_byte"] / one["bits_per_byte_before"]
        )
        if one["selectivity"] is not None:
            risen = one["bits_per_byte"] - one["bits_per_byte_before"]
            assert one["selectivity"] == pytest.approx(risen / told["forget"]["risen"])
        held, about = scores.read(tmp_path / weight / "scores.safetensors")
        assert ("forget" in about) == (weight == "1")
        assert weight == "0" or json.loads(about["forget"]).keys() == {str(digits)}
        kept[weight] = held
        assert "bits per byte" in done.out
    plain = prune("--out", tmp_path / "plain")
    assert plain.code == 0
    own, _ = scores.read(tmp_path / "plain/scores.safetensors")
    assert all(torch.equal(own[name], kept["0"][name]) for name in own)
    assert not all(torch.equal(own[name], kept["1"][name]) for name in own)
    there = prune("--domain", digits, "--out", tmp_path / "there")
    assert there.code == 0
    other, _ = scores.read(tmp_path / "there/scores.safetensors")
    for name in own:
        assert torch.allclose(kept["1"][name], own[name] - other[name], atol=1e-4)


def test_the_lasso_follows_the_contrast_and_a_trimmed_vocabulary_is_measured_too(
    prune: Any, run: Any, digits: Path, tmp_path: Path
) -> None:
    done = prune("--forget", digits, "--method", "lasso", "--lasso-tokens", "256", *TRAIN,
                 "--kinds", "vocabulary,neurons", "--sparsity", "0.5",
                 "--vocabulary-threshold", "9")  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "run/manifest.json").read_text())
    assert told["lasso"]["removed_zero"] > 0 and told["forget"]["domains"]
    again = run("recover", tmp_path / "run", "--tokens", "256", "--out", tmp_path / "again",
                "--no-speed")  # fmt: skip
    assert again.code == 0, again.err
    told = json.loads((tmp_path / "again/manifest.json").read_text())
    assert told["forget"]["domains"][str(digits)]["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--criterion", "magnitude", "--forget-weight", "1"), "needs scores that depend on"),
        (("--forget", "pythn"), "pythn"),
        (("--forget-weight", "-1"), "at least 0"),
        (("--forget-refit", "1", "--no-refit"), "needs --refit sequential"),
    ],
)
def test_what_cannot_be_forgotten_is_told(
    prune: Any, digits: Path, flags: tuple[str, ...], said: str
) -> None:
    refused(prune("--forget", digits, *flags), said)


def test_a_domain_is_not_kept_and_forgotten(prune: Any, domain_folder: Path) -> None:
    refused(prune("--forget", domain_folder), "is the domain to keep")


def test_of_a_small_domain_all_text_is_taken(prune: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    for number in range(10):
        small.mkdir(exist_ok=True)
        (small / f"{number}.txt").write_text(" ".join(str(n * number) for n in range(60)))
    done = prune("--forget", small)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "run/manifest.json").read_text())
    alone = prune("--domain", small, "--out", tmp_path / "alone")
    refused(alone, "were asked for, but the data hold")
    assert told["forget"]["domains"][str(small)]["documents"] > 0


def test_the_refit_forgets_as_well(prune: Any, digits: Path, tmp_path: Path) -> None:
    """The same units stay, and what reads them is another; test_refit has what it gives.

    A model that has learned nothing has nothing to forget, so no loss is looked at.
    """
    kept, weights = [], []
    for weight in ("0", "1"):
        done = prune("--forget", digits, "--forget-weight", "0", "--forget-refit", weight,
                     "--out", tmp_path / weight)  # fmt: skip
        assert done.code == 0, done.err
        told = json.loads((tmp_path / weight / "manifest.json").read_text())
        assert told["refit"].get("forget", 0.0) == told["forget"]["refit"] == float(weight)
        kept.append(load_file(tmp_path / weight / "model" / "keep.safetensors"))
        weights.append(load_file(tmp_path / weight / "model" / "model.safetensors"))
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    changed = {n for n, p in weights[0].items() if not torch.equal(p, weights[1][n])}
    assert changed == {n for n in weights[0] if "down_proj" in n}
    refused(prune("--forget-refit", "1", "--out", tmp_path / "none"), "name some there")


def test_naming_a_domain_is_enough(prune: Any, digits: Path, tmp_path: Path) -> None:
    for flags, counts in (((), FORGETTING), (("--no-refit",), 0.0)):
        done = prune("--forget", digits, *flags, "--out", tmp_path / f"run{counts}")
        assert done.code == 0, done.err
        told = json.loads((tmp_path / f"run{counts}/manifest.json").read_text())
        assert (told["forget"]["weight"], told["forget"]["refit"]) == (0.0, counts)
        assert told["recipe"]["prune"]["forget_refit"] == counts
