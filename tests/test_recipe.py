"""Recipes: what is refused, how it is told, and what flags do to a file."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from llm_narrow import recipe, units
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.recipe import FLAGS, Recipe, Section, load, target
from llm_narrow.sections import target_bytes

ROOT = Path(__file__).parent.parent
NAMES = {"model": "tiny", "domain": "text"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refused(**given: object) -> str:
    with pytest.raises(BadInput) as caught:
        load(None, {**NAMES, **given}, criteria=["attribution", "fisher"], spell=flag)
    return str(caught.value)


def leaves(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += leaves(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def test_two_names_are_enough_and_half_of_the_neurons_go() -> None:
    r = load(None, NAMES)
    assert r.prune.sparsity_by_kind == {"neurons": 0.5}
    assert r.prune.chosen_kinds == ("neurons",)


def test_every_setting_has_a_flag_and_every_flag_a_setting() -> None:
    assert sorted(FLAGS.values()) == sorted(leaves())


def test_kinds_are_those_of_units() -> None:
    assert recipe.Kind == units.Kind


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"sparsity": 1.5}, "--sparsity must be at least 0 and below 1"),
        ({"sparsity": "1"}, "--sparsity must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "--sparsity must be at least 0 and below 1"),
        ({"sparsity": "half"}, "got 'half'"),
        ({"sparsity": "nan"}, "got 'nan'"),
        ({"sparsity": "neurons=0.5,head=0.2"}, "got 'neurons=0.5,head=0.2'"),
        ({"sparsity": "neurons="}, "got 'neurons='"),
        ({"sparsity": True}, "got True"),
        ({"target_params": "160%"}, "--target-params must be above 0 and at most 100%, got '160%'"),
        ({"target_params": "0"}, "--target-params must be above 0"),
        ({"target_params": "90X"}, "--target-params must be a number of parameters"),
        ({"target_params": "60%", "sparsity": 0.5}, "either --sparsity or --target-params"),
        ({"target_flops": "60%", "sparsity": 0.5}, "either --sparsity or --target-flops"),
        ({"target_size": "200"}, "--target-size must be bytes of weights (200MB, 1.5GiB)"),
        ({"target_size": "0MB"}, "--target-size must be above 0"),
        ({"target_kv_cache": "101%"}, "--target-kv-cache must be above 0 and at most 100%"),
        ({"target_flops": "60%", "allocation": "uniform"}, "--target-flops needs --allocation"),
        ({"kinds": "layers", "allocation": "global", "target_params": "60%"},
         "--kinds layers needs --allocation joint, got global"),
        ({"kinds": "layers"}, "spends a budget in one shot: give prune.target_params"),
        ({"kinds": "layers,mlp", "target_params": "60%", "method": "lasso"}, "--method oneshot"),
        ({"target_flops": "60%", "keep_layers": 4}, "name layers in prune.kinds too"),
        ({"keep_layers": 0}, "--keep-layers must be a whole number of at least 1, got 0"),
        ({"sparsity": "heads=0.2", "kinds": "heads"}, "leave --kinds out"),
        ({"kinds": "neuron"},
         "--kinds must be one or more of neurons, heads, experts, attention, mlp, layers, "
         "vocabulary, got 'neuron'"),
        ({"kinds": ""}, "--kinds must be one or more of"),
        ({"allocation": "globl"}, "Did you mean 'global'?"),
        ({"criterion": "atribution"}, "--criterion 'atribution' is unknown. Did you mean"),
        ({"dtype": "float8"}, "Known: bfloat16, float16, float32"),
        ({"device": "gpu"}, "--device must be auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        ({"multiple": 0}, "--multiple must be a whole number of at least 1, got 0"),
        ({"damping": 0.0}, "--damping must be a number above 0"),
        ({"recover_tokens": -1}, "--recover-tokens must be a whole number of at least 0 tokens"),
        ({"recover_tokens": "many"}, "got 'many'"),
        ({"strength": -0.1}, "--strength must be a number of at least 0, got -0.1"),
        ({"penalty": "hoyer"}, "--penalty hoyer has no proximal step"),
        ({"step": "gradient"}, "lasso.control target needs exact zeros"),
        ({"recover_tokens": 512, "dtype": "bfloat16"}, "--dtype must be float32 for training"),
        ({"method": "laso"}, "Did you mean 'lasso'?"),
        ({"calibration_tokens": 512}, "--calibration-tokens must be at least 1024 (2 x blocks"),
        ({"held_out_tokens": 100}, "--held-out-tokens must be at least 512 (1 x blocks"),
        ({"length": 4}, "--length must be a whole number of at least 8"),
        ({"seed": -1}, "--seed must be a whole number of at least 0, got -1"),
        ({"seed": 1.5}, "--seed must be a whole number"),
        ({"model": ""}, "--model must be an alias"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_rule(given: dict[str, object], line: str) -> None:
    text = refused(**given)
    assert line in text
    assert "\n" not in text


def test_what_is_missing_names_the_flag() -> None:
    with pytest.raises(BadInput, match="model is missing: name it in a recipe or with --model"):
        load(None, {"domain": "text"}, spell=flag)


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: {name: tiny}\n"
        "prune: {sparcity: 0.5, sparsity: 1.5, damping: 1e-3}\n"
        "score: {criterion: atribution}\n"
        "sed: 1\n"
    )
    with pytest.raises(BadInput) as caught:
        load(file, criteria=["attribution"])
    assert str(caught.value).split("\n") == [
        f"{file}: 5 problems",
        "  domain is missing: name it in a recipe or with domain",
        "  prune.sparsity must be at least 0 and below 1, or such a number for each kind "
        "(neurons, heads), got 1.5",
        "  key of prune 'sparcity' is unknown. Did you mean 'sparsity'? Known: allocation, "
        "channels, damping, forget_refit, keep_layers, kinds, layout, method, multiple, "
        "query_heads, refit, refit_tokens, sparsity, target_flops, target_kv_cache, target_params, "
        "target_size, vocabulary, vocabulary_threshold.",
        "  key 'sed' is unknown. Did you mean 'seed'? Known: blocks, device, domain, dtype, "
        "lasso, measure, model, prune, recover, score, seed, train.",
        "  score.criterion 'atribution' is unknown. Did you mean 'attribution'? "
        "Known: attribution.",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: [", "is not YAML"),
        ("- 1", "must hold the sections of a recipe, got list"),
        ("", "must hold the sections of a recipe, got NoneType"),
        ("seed: 1\nseed: 2", "the key 'seed' stands there twice"),
        ("model: tiny", "model must be a mapping of settings, got 'tiny'"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        load(file)
    assert line in str(caught.value)


def test_a_file_that_is_missing_or_binary(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No recipe at"):
        load(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read as a recipe"):
        load(tmp_path / "r.yaml")


def test_an_unknown_setting_is_told() -> None:
    with pytest.raises(UnknownName, match=r"'sparcity' is unknown\. Did you mean 'sparsity'"):
        load(None, {**NAMES, "sparcity": 0.5})


def test_flags_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: {name: a}\ndomain: {name: b}\nblocks:\nprune: {target_params: 60%, multiple: 64}\n"
    )
    r = load(file, {"sparsity": "neurons=0.3", "model": None, "domain": Path("c")})
    assert (r.model.name, r.domain.name, r.prune.multiple) == ("a", "c", 64)
    assert r.prune.sparsity_by_kind == {"neurons": 0.3}
    assert r.prune.target_params is None


def test_one_sparsity_is_for_all_kinds_asked_for() -> None:
    r = load(None, {**NAMES, "sparsity": "0.25", "kinds": "neurons,heads"})
    assert r.prune.sparsity_by_kind == {"neurons": 0.25, "heads": 0.25}


def test_refit_may_be_yes_or_no(tmp_path: Path) -> None:
    modes = [load(None, {**NAMES, "refit": r}).prune.refit for r in (True, False, "oneshot")]
    assert modes == ["sequential", "none", "oneshot"]


@pytest.mark.parametrize(
    ("value", "parameters"),
    [("60%", 120), ("12.5%", 25), ("90M", 90_000_000), ("1.5k", 1500), ("77", 77), (5, 5)],
)
def test_target(value: int | str, parameters: int) -> None:
    assert target(value, 200) == parameters


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"sparsity": 0.3, "kinds": "heads"},
        {"sparsity": "neurons=0.5,heads=0.2"},
        {"target_params": "60%"},
        {"target_params": 1000, "kinds": "neurons,heads", "glob": "**/*.rs", "damping": 1e-5},
        {"target_size": "200MB", "kinds": "vocabulary,neurons"},
        {"target_kv_cache": "50%", "target_flops": "70%"},
        {"target_params": "70%", "kinds": "vocabulary,heads,layers,mlp", "keep_layers": 9},
    ],
)
def test_the_resolved_recipe_is_the_same_recipe(tmp_path: Path, given: dict[str, object]) -> None:
    first = load(None, {**NAMES, **given})
    (tmp_path / "r.yaml").write_text(first.to_yaml())
    second = load(tmp_path / "r.yaml")
    assert second.to_yaml() == first.to_yaml()
    assert second.prune.sparsity_by_kind == first.prune.sparsity_by_kind
    assert second.prune.chosen_kinds == first.prune.chosen_kinds
    assert (second.prune.parts, second.prune.targets) == (first.prune.parts, first.prune.targets)


@pytest.mark.parametrize(
    ("given", "allocation", "kinds", "parts"),
    [
        ({"target_size": "60%"}, "uniform", ("neurons",), ()),
        ({"target_flops": "60%"}, "joint", ("neurons",), ()),
        ({"target_kv_cache": "60%"}, "joint", ("neurons", "heads"), ()),
        ({"target_params": "60%", "kinds": "layers,heads"}, "joint", ("heads",), ("layers",)),
        ({"target_params": "60%", "kinds": "mlp,vocabulary"}, "joint", (), ("mlp",)),
    ],
)
def test_what_only_a_joint_budget_can_do_asks_for_one(
    given: dict[str, object], allocation: str, kinds: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    p = load(None, {**NAMES, **given}).prune
    assert (p.allocation, p.chosen_kinds, p.parts) == (allocation, kinds, parts)


def test_a_flag_replaces_any_size_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: a}\ndomain: {name: b}\nprune: {target_size: 60%}\n")
    assert load(file, {"sparsity": 0.5}).prune.targets == {}
    file.write_text("model: {name: a}\ndomain: {name: b}\nprune: {sparsity: 0.5}\n")
    assert load(file, {"target_size": "2MB"}).prune.sparsity_by_kind is None


@pytest.mark.parametrize(
    ("value", "found"),
    [("60%", 120.0), ("2kB", 2000.0), ("2KiB", 2048.0), ("1.5GB", 1.5e9), ("7b", 7.0), (5, 5)],
)
def test_bytes(value: int | str, found: float) -> None:
    assert target_bytes(value, 200) == found


def test_the_smallest_of_several_sizes_counts() -> None:
    p = load(None, {**NAMES, "target_params": "60%", "target_size": "200B"}).prune
    assert p.parameters_wanted(1000, 4) == 50
    assert p.parameters_wanted(70, 2) == 42


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_that_come_with_it(file: Path) -> None:
    load(file)
