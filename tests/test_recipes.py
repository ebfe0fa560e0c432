"""The recipes that come with it: each plans for a model of its very shape, and the small ones run.

No weights are needed for a plan: models are built from their published dimensions on the `meta`
device, text is a small domain's, and scores are drawn at random. What the heads of the files say
of memory is what the dry run says.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import typer
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from example_modules import opened
from folders import write_domain
from llm_narrow import cli, domains, init_schema, models, recipe, scores
from llm_narrow.blocks import Blocks
from llm_narrow.init_recipes import EDITOR, SCHEMA, read
from llm_narrow.models import Loaded
from llm_narrow.scoring import Scored

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
WANTED = {
    "laptop-quick", "best-quality-1-gpu", "paper", "vocabulary-only", "heads-only",
    "own-repository", "other-language", "forget-domain", "llama-8b-1-gpu", "llama-70b-cluster",
}  # fmt: skip
LAPTOP = ("laptop-quick", "neurons-and-heads", "heads-only", "vocabulary-only", "forget-domain",
          "own-repository", "other-language")  # fmt: skip
# Hub ids without an alias, and the page that names the model.
DOCUMENTED = {"meta-llama/Llama-3.1-8B": "scale.md", "meta-llama/Llama-3.1-70B": "scale.md"}
# Model -> model type, its config.json where it matters, and its parameters, as published.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama-3.2-1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
         "max_position_embeddings": 131072, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "pythia-410m": (
        "gpt_neox",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "vocab_size": 50304, "max_position_embeddings": 2048},
        405_334_016,
    ),
    "qwen2.5-coder-1.5b": (
        "qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
         "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
         "max_position_embeddings": 32768, "tie_word_embeddings": True},
        1_543_714_304,
    ),
}  # fmt: skip


def on_gpu(asked: recipe.Recipe) -> bool:
    """Whether a recipe is for a GPU, whose passes are in bfloat16."""
    return asked.model.name != "smollm2-135m" and asked.dtype == "float32"


def published() -> dict[str, tuple[Any, int]]:
    """Model -> its config and parameters; the llamas of docs/scale.md are those of its script."""
    found = {
        name: (AutoConfig.for_model(kind, **told), parameters)
        for name, (kind, told, parameters) in PUBLISHED.items()
    }
    eight, seventy, small = opened("scale")["arithmetic"].MODELS
    for name, shape in (("meta-llama/Llama-3.1-8B", eight), ("meta-llama/Llama-3.1-70B", seventy),
                        ("smollm2-135m", small)):  # fmt: skip
        config = shape.config()
        config.max_position_embeddings = 8192
        found[name] = config, shape.parameters
    return found


@pytest.fixture
def planned(
    run: Any, model_folder: Path, domain_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:  # fmt: skip
    """`prune --recipe FILE --dry-run --json` for a model of the recipe's shape."""
    (tmp_path / "src").mkdir()
    for number in range(4):
        (tmp_path / f"src/{number}.rs").write_text("fn main() {}")
        (tmp_path / f"{number}.py").write_text("def main(): pass")
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = domains.load(str(domain_folder))
    shapes = published()

    def model_of(asked: recipe.Recipe, name: str, **given: object) -> Loaded:
        config, parameters = shapes[name]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked.dtype))
        assert sum(p.numel() for p in model.parameters()) == parameters
        return Loaded(model.eval(), tokenizer, name, tmp_path, "0" * 64)

    def calibration(start: Any, asked: recipe.Recipe, **given: object) -> Blocks:
        shape = asked.score.tokens // asked.blocks.length, asked.blocks.length
        ids = torch.zeros(shape, dtype=torch.int32)
        return Blocks(ids, ids.short(), ids, "0" * 64)

    def made(start: Any, *args: object, **given: object) -> Scored:
        g = torch.Generator().manual_seed(0)
        found = {x.name: torch.rand(x.size, generator=g) for x in start.groups}
        scores.write(tmp_path / "scores", found, {})
        about = {"criterion": "attribution", "tokens": "0", "seconds": "0"}
        return Scored(found, None, tmp_path / "scores", False, about)

    monkeypatch.setattr("llm_narrow.inputs.model_of", model_of)
    monkeypatch.setattr("llm_narrow.inputs.domain_of", lambda *args, **given: text)
    monkeypatch.setattr("llm_narrow.inputs.calibration", calibration)
    monkeypatch.setattr("llm_narrow.inputs.bf16", lambda asked: on_gpu(asked))
    monkeypatch.setattr("llm_narrow.scoring.made", made)
    monkeypatch.setattr("llm_narrow.contrast.contrasted", lambda s, r, own, **given: own)
    monkeypatch.setattr("llm_narrow.forecast.rate", lambda *args: 1e12)

    def go(file: Path) -> dict[str, Any]:
        done = run("prune", "--recipe", file, "--dry-run", "--json")
        assert done.code == 0, done.err
        told: dict[str, Any] = json.loads(done.out)
        return told

    return go


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_dry_run_plans_for_a_model_of_its_shape(file: Path, planned: Any) -> None:
    asked = recipe.load(file, criteria=scores.CRITERIA)
    told = planned(file)
    config, parameters = published()[asked.model.name]
    assert told["folder"] is None and told["model"]["parameters"] == parameters
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    sizes = {"neurons": config.intermediate_size, "heads": heads}
    rows = [row for row in told["plan"] if row["before"]]
    assert {row["before"] for row in rows} <= {*sizes.values()}
    for kind in asked.prune.chosen_kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        assert [row["before"] for row in of_kind] == [sizes[kind]] * config.num_hidden_layers
        assert all(0 < row["after"] < row["before"] for row in of_kind)
        assert kind != "neurons" or {row["after"] % asked.prune.multiple for row in of_kind} == {0}
    if kinds := asked.prune.sparsity_by_kind:
        for kind, share in kinds.items():
            (left,) = {row["after"] for row in rows if row["kind"] == kind}
            assert abs(left / sizes[kind] - (1 - share)) < 0.02
    # What the head says of memory is what the dry run says.
    most = max(part["bytes"] for part in told["forecast"]) / 1e9
    for number in re.findall(r"([\d.]+) GB[^.]*by the arithmetic of --dry-run", read(file).needs):
        assert number == (f"{most:.1f}" if "." in number else f"{most:.0f}")


def test_memory_that_a_head_takes_from_the_arithmetic_is_its() -> None:
    told = json.loads((ROOT / "docs/bench/scale.json").read_text())["rows"]
    needs = read(ROOT / "recipes/llama-8b-1-gpu.yaml").needs
    (refit,) = [row["bytes"] for row in told if (row["model"], row["gpus"], row["stage"])
                == ("Llama-3.1-8B", 1, "refit, sequential")]  # fmt: skip
    (lora,) = [row["bytes"] for row in told if (row["model"], row["gpus"], row["stage"])
               == ("Llama-3.1-8B", 1, "recover, LoRA")]  # fmt: skip
    assert f"{refit / 1e9:.0f} GB (the refit) by that of examples/scale" in needs and lora < refit


def test_the_wanted_recipes_are_there() -> None:
    assert {*NAMES} >= WANTED and {*LAPTOP} <= {*NAMES}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_names_are_known_and_the_head_tells_what_it_is(file: Path, tmp_path: Path) -> None:
    asked = recipe.load(file, criteria=scores.CRITERIA)
    if asked.model.name in DOCUMENTED:
        page = (ROOT / "docs" / DOCUMENTED[asked.model.name]).read_text()
        assert asked.model.name.partition("/")[2] in page
    else:
        assert asked.model.name in models.KNOWN
    assert asked.domain.name in domains.DOMAINS or asked.domain.glob
    assert all(name in domains.DOMAINS for name in asked.score.forget or ())
    text = file.read_text()
    assert text.startswith(f"{EDITOR}{SCHEMA}\n") and max(map(len, text.splitlines())) <= 160
    head = read(file)
    assert head.what.endswith(".") and head.needs.endswith(".") and head.commands
    lacks = re.search(r"not run|not measured", head.needs, re.IGNORECASE)
    assert (", measured (docs/" in head.needs) != bool(lacks)
    for command in head.commands:
        name, *words = shlex.split(command)[1:]
        typer_command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
        taken = typer_command.make_context(name, words).params
        assert taken.get("recipe") in (None, Path("recipes") / file.name)


def test_the_schema_that_is_shipped_is_that_of_now() -> None:
    told = (ROOT / "recipes" / SCHEMA).read_text("utf-8")
    how = f"llm-narrow init --schema > recipes/{SCHEMA}"
    assert told == init_schema.text(), how


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_the_shipped_schema_takes_every_recipe(file: Path) -> None:
    told = json.loads((ROOT / "recipes" / SCHEMA).read_text("utf-8"))
    jsonschema.Draft202012Validator(told).validate(yaml.safe_load(file.read_text("utf-8")))


@pytest.mark.parametrize("name", LAPTOP)
def test_the_recipes_for_a_laptop_run(
    name: str, prune: Any, domain_folder: Path, tmp_path: Path
) -> None:
    file = ROOT / f"recipes/{name}.yaml"
    asked = recipe.load(file)
    more: list[object] = ["--recipe", file, "--vocabulary-threshold", 1, "--multiple", 4]
    if asked.domain.glob:
        more += ["--glob", "**/*.txt"]
    if not asked.prune.chosen_kinds:  # of 384 tokens 320 are all the characters there are
        more += ["--target-params", "95%"]
    if asked.score.forget:
        write_domain(tmp_path / "other")
        more += ["--forget", tmp_path / "other"]
    if asked.recover.tokens:
        more += ["--recover-tokens", 256, "--validation-tokens", 64]
    done = prune(*more, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    before, after = told["rows"]
    assert after["parameters"] < before["parameters"]
    if (share := asked.prune.target_params) and asked.prune.chosen_kinds:
        assert after["parameters"] <= recipe.target(share, before["parameters"])
    gone = {row["kind"] for row in told["plan"] if row["after"] < row["before"]}
    assert gone == {*asked.prune.chosen_kinds}
    assert gone or after["parameters"] <= 0.95 * before["parameters"]
    assert ("forget" in told) == bool(asked.score.forget)
    assert ("vocabulary" in told) == (asked.prune.vocabulary == "domain")
    assert ("recover" in told) == bool(asked.recover.tokens)


@pytest.mark.real
@pytest.mark.long
def test_the_vocabulary_of_the_real_model_goes(run: Any, tmp_path: Path) -> None:
    file = ROOT / "recipes/vocabulary-only.yaml"
    small = ["--calibration-tokens", "1024", "--held-out-tokens", "1024", "--samples", "0"]
    done = run("prune", "--recipe", file, *small, "--no-speed", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    before, after = json.loads(done.out)["rows"]
    assert before["parameters"] == 134_515_008
    assert 0.89 < after["parameters"] / before["parameters"] <= 0.9
    assert after["bits_per_byte"] < 1.1 * before["bits_per_byte"]


@pytest.mark.long
def test_an_installed_wheel_has_the_recipes(tmp_path: Path) -> None:
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "import setuptools.build_meta as b; b.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    away = tmp_path / "away"
    away.mkdir()
    line = [sys.executable, "-m", "llm_narrow", "init", "mine.yaml", "--template", "laptop-quick"]
    subprocess.run(line, cwd=away, check=True, env={
        **os.environ, "PYTHONPATH": str(tmp_path / "installed"),
    })  # fmt: skip
    first = (away / "mine.yaml").read_text().splitlines()[0]
    assert first == f"{EDITOR}{(tmp_path / 'installed/llm_narrow/recipes' / SCHEMA).as_uri()}"
    inside = {file.name for file in (tmp_path / "installed/llm_narrow/recipes").iterdir()}
    assert inside == {SCHEMA, *(file.name for file in FILES)}
