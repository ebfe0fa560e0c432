"""Whole runs of every command on tiny models, and what they leave."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import llm_narrow
from commands import Finished, left_behind, refused
from folders import write_domain, write_model
from llm_narrow import stages
from llm_narrow.families import find_groups
from llm_narrow.recipe import FLAGS, Section
from tiny import CONFIGS, tiny

# A few steps of either training.
LEARNT = {"lasso_tokens": 256, "recover_tokens": 256, "validation_tokens": 64}


def test_prune_writes_a_whole_run_folder(finished: Finished) -> None:
    run, told = finished.folder, finished.told
    assert left_behind(run.parent) == ["run"]
    assert left_behind(run) == [
        "figures", "manifest.json", "model", "recipe.yaml", "report.html", "report.md",
        "rows.csv", "rows.jsonl", "scores.safetensors",
    ]  # fmt: skip
    assert {"README.md", "config.json", "keep.safetensors", "manifest.json", "recipe.yaml",
            "tokenizer.json"} <= set(left_behind(run / "model"))  # fmt: skip

    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest) == {
        "command", "versions", "seed", "model", "domain", "recipe", "plan", "scores", "stability",
        "refit", "checkpoint", "samples", "seconds",
    }  # fmt: skip
    assert manifest["command"].startswith("llm-narrow prune --model ")
    assert manifest["recipe"] == yaml.safe_load((run / "recipe.yaml").read_text())
    assert {(p["kind"], p["before"], p["after"]) for p in manifest["plan"]} == {
        ("neurons", 48, 24), ("heads", 2, 1),
    }  # fmt: skip
    assert manifest["domain"]["tokens"] == {"calibration": 512, "held_out": 256}
    assert set(manifest["stability"]) == {"neurons", "heads"}
    assert manifest["checkpoint"]["layout"] == "uniform"
    assert told["plan"] == manifest["plan"]
    assert "memory at the peak" in finished.err
    assert "parameters 27,808 → 20,128" in finished.err

    before, after = (json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines())
    assert (before["label"], after["label"]) == ("before", "after")
    assert (before["parameters"], after["parameters"]) == (27_808, 20_128)
    assert after["loss_difference"] == pytest.approx(after["loss"] - before["loss"], abs=1e-6)
    assert min(before["prefill"], after["decode"]) > 0
    assert told["rows"] == [before, after]
    sample = manifest["samples"][0]
    assert sample["prompt"] in (run / "report.md").read_text()


def test_the_checkpoint_loads_without_llm_narrow(finished: Finished) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(finished.folder / 'model')!r})\n"
        "assert m.config.intermediate_size == 24 and 'llm_narrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_run_repeats_from_its_own_recipe(
    finished: Finished, prune: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_NARROW_CACHE", str(finished.cache))
    arguments = ["--no-speed", "--out", tmp_path / "again"]
    done = run("prune", "--recipe", finished.folder / "recipe.yaml", *arguments)
    assert done.code == 0, done.err
    assert "used again" in done.err
    second = json.loads((tmp_path / "again/manifest.json").read_text())
    for key in ("plan", "stability", "samples"):
        assert second[key] == finished.told[key]
    weights = finished.told["checkpoint"]["sha256"]
    assert second["checkpoint"]["sha256"] == weights
    assert (finished.told["scores"]["reused"], second["scores"]["reused"]) == (False, True)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_family_goes_the_whole_way(prune: Any, tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path / kind, kind)
    kinds = {g.kind for g in find_groups(tiny(kind))} & {"neurons", "heads"}
    sparsity = ",".join(f"{name}=0.5" for name in sorted(kinds))
    done = prune("--model", folder, "--sparsity", sparsity, "--json", "--speed")
    assert done.code == 0, done.err
    before, after = json.loads(done.out)["rows"]
    assert after["parameters"] < before["parameters"]
    assert after["loss"] < 12


def test_every_setting_is_read(
    prune: Any,
    model_folder: Path,
    domain_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A setting that no code reads does nothing; whole runs have to read them all."""
    read: set[str] = set()
    other = write_domain(tmp_path / "other", files=30)
    names = {"model": model_folder, "domain": domain_folder, "length": 32,
             "calibration_tokens": 512, "held_out_tokens": 256}  # fmt: skip
    recipes = [
        llm_narrow.recipe.load(None, {**names, **given})
        for given in (
            {"sparsity": 0.5},
            {"target_params": "90%", "kinds": "neurons", "vocabulary": "domain",
             "forget": str(other)},
            {"target_flops": "50%", "target_kv_cache": "100%", "target_size": "99%",
             "kinds": "layers,neurons", "keep_layers": 1, "query_heads": 1, "channels": 24},
            {**LEARNT, "method": "lasso", "distill": "cached"},
            {**LEARNT, "method": "lasso", "step": "gradient", "control": "fixed",
             "recover_method": "lora", "lora_rank": 2},
        )
    ]
    plain = Section.__getattribute__

    def noted(self: Section, name: str) -> Any:
        if name in type(self).model_fields:
            read.add(f"{type(self).__name__.lower()}.{name}")
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", noted)
    for number, recipe in enumerate(recipes):
        stages.prune(recipe, out=tmp_path / str(number))
    for name, dotted in FLAGS.items():
        wanted = dotted if "." in dotted else f"recipe.{dotted}"
        assert wanted in read, name


def test_several_sizes_are_made_from_the_same_scores(prune: Any, tmp_path: Path) -> None:
    done = prune("--target-params", "95%, 90%", "--json")
    assert done.code == 0, done.err
    runs = json.loads(done.out)["runs"]
    assert [run["scores"]["reused"] for run in runs] == [False, True]
    sizes = [run["rows"][1]["parameters"] / run["rows"][0]["parameters"] for run in runs]
    assert 0.9 < sizes[0] <= 0.95 and 0.85 < sizes[1] <= 0.9
    assert left_behind(tmp_path / "run") == ["90-percent", "95-percent"]
    refused(prune("--target-params", "95%,x", "--out", tmp_path / "no"), "'x'")
    assert not (tmp_path / "no").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(prune: Any, tmp_path: Path) -> None:
    done = prune("--dry-run")
    assert done.code == 0, done.err
    assert "neurons" in done.out and "24" in done.out and "parameters" in done.out
    assert "memory at the peak" in done.err
    assert "About what the rest takes" in done.out and "measurement" in done.out
    assert left_behind(tmp_path) == []
    told = json.loads(prune("--dry-run", "--json").out)
    assert told["folder"] is None
    assert told["plan"][0] == {
        "group": "model.layers.0.mlp", "kind": "neurons", "before": 48, "after": 24
    }  # fmt: skip


def test_quiet_leaves_only_the_result(prune: Any) -> None:
    done = prune("--quiet")
    assert done.err == ""
    assert "loss, nats/token" in done.out


def test_force_replaces_a_run_and_nothing_else(prune: Any, tmp_path: Path) -> None:
    assert prune("--quiet").code == 0
    refused(prune(), "run exists already", "--force")
    assert prune("--quiet", "--force", "--sparsity", "0.25").code == 0
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["prune"]["sparsity"] == {"neurons": 0.25}
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("years of work")
    refused(prune("--force", "--out", precious), "is not a run folder")
    assert (precious / "chapter1.txt").read_text() == "years of work"


def test_the_output_is_checked_before_any_work(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*args: object, **given: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("llm_narrow.inputs.gather", too_late)
    (tmp_path / "run").mkdir()
    refused(prune(), "exists already")
    (tmp_path / "file").write_text("")
    refused(prune("--out", tmp_path / "file" / "run"), "cannot be written")


def test_scores_once_then_any_size(prune: Any, run: Any, model_folder: Path, domain_folder: Path,
                                   tmp_path: Path) -> None:  # fmt: skip
    file = tmp_path / "s.safetensors"
    names = ["--model", model_folder, "--domain", domain_folder]
    arguments = ["score", *names, "--out", file, "--length", "32", "--calibration-tokens", "512"]
    done = run(*arguments)
    assert done.code == 0, done.err
    assert "attribution" in done.out
    refused(run(*arguments), "exists already", "--force")
    assert run(*arguments, "--force", "--quiet").code == 0

    for size in ("0.25", "0.5"):
        done = prune("--scores", file, "--sparsity", size, "--dry-run", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["stability"]["neurons"] <= 1
        assert "Scoring" not in done.err
    refused(prune("--scores", file, "--kinds", "heads"), "score again with --kinds heads")
    refused(prune("--scores", file, "--criterion", "fisher"), "criterion must be fisher")
    other = write_model(tmp_path / "other", seed=5)
    refused(prune("--scores", file, "--model", other), "model must be")
    text = write_domain(tmp_path / "text", files=50)
    refused(prune("--scores", file, "--domain", text), "domain must be")
    refused(prune("--scores", tmp_path / "none.safetensors"), "cannot be read as a score file")
    (tmp_path / "bad.safetensors").write_bytes(file.read_bytes()[:-8])
    refused(prune("--scores", tmp_path / "bad.safetensors"), "cannot be read as a score file")


def test_bench_puts_models_side_by_side(
    finished: Finished, run: Any, model_folder: Path, domain_folder: Path
) -> None:
    arguments = ["--domain", domain_folder, "--length", "32", "--held-out-tokens", "256"]
    done = run("bench", model_folder, finished.folder, *arguments, "--json")
    assert done.code == 0, done.err
    whole, narrow = json.loads(done.out)["rows"]
    measured = [row["loss"] for row in finished.told["rows"]]
    assert [whole["loss"], narrow["loss"]] == pytest.approx(measured, abs=1e-6)
    assert narrow["decode_ratio"] > 0
    refused(run("bench", model_folder, model_folder, *arguments), "named twice")


def test_inspect(run: Any, model_folder: Path) -> None:
    done = run("inspect", model_folder, "--json")
    told = json.loads(done.out)
    by_kind = {r["kind"]: r for r in told["removable"]}
    # A neuron owns a row of gate and up and a column of down; a head 2 queries of 8, k, v, o.
    assert by_kind["neurons"]["parameters_per_unit"] == 3 * 32
    assert by_kind["heads"]["parameters_per_unit"] == 32 * (16 + 8 + 8 + 16)
    assert by_kind["neurons"]["parameters"] == 2 * 48 * 96
    assert told["groups"][0]["group"] == "model.layers.0.mlp"
    assert "33.1 %" in run("inspect", model_folder).out


def test_models_and_domains_are_listed(run: Any) -> None:
    told = json.loads(run("models", "--json").out)["models"]
    assert {"smollm2-135m", "pythia-410m"} <= {row["alias"] for row in told}
    assert "smollm2-135m" in run("models").out
    told = json.loads(run("domains", "--json").out)["domains"]
    assert {"python", "python-stdlib"} <= {row["name"] for row in told}
    assert "python-stdlib" in run("domains").out


def test_the_same_from_python(
    prune: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    narrow = llm_narrow.prune(
        model=model_folder, domain=domain_folder, sparsity=0.5, out=tmp_path / "run",
        length=32, calibration_tokens=512, held_out_tokens=256, speed=False,
    )  # fmt: skip
    assert narrow.folder == tmp_path / "run"
    assert narrow.model.config.intermediate_size in (24, 48)
    assert sum(p.numel() for p in narrow.model.parameters()) == narrow.plan.parameters_after
    assert [row.label for row in narrow.rows] == ["before", "after"]
    assert narrow.tokenizer.eos_token == "<end>"
    with pytest.raises(llm_narrow.UnknownName, match="Did you mean 'sparsity'"):
        llm_narrow.prune(model="x", domain="y", sparcity=0.5)


def test_uneven_layers_load_and_can_be_measured_and_cut_again(
    prune: Any, run: Any, domain_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--allocation", "global", "--multiple", "1", "--sparsity", "0.4", "--json"]
    told = json.loads(prune(*arguments).out)
    widths = {row["after"] for row in told["plan"] if row["kind"] == "neurons"}
    assert len(widths) == 2
    assert told["checkpoint"]["layout"] == "uneven"
    loaded = llm_narrow.load(str(tmp_path / "run"))
    assert sum(p.numel() for p in loaded.model.parameters()) == told["rows"][1]["parameters"]

    again = prune("--model", tmp_path / "run", "--out", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    cut = json.loads(again.out)["plan"]
    assert {row["before"] for row in cut if row["kind"] == "neurons"} == widths


def test_the_refit_may_read_more_than_was_scored(
    model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    made = {}
    for tokens in (None, 256, 1024):
        given = {} if tokens is None else {"refit_tokens": tokens}
        made[tokens] = llm_narrow.prune(
            model=model_folder, domain=domain_folder, sparsity=0.5, length=32,
            calibration_tokens=512, held_out_tokens=256, speed=False, samples=0, report=False,
            out=tmp_path / str(tokens), **given,
        )  # fmt: skip
    facts = {tokens: one.manifest for tokens, one in made.items()}
    assert [f["refit"]["tokens"] for f in facts.values()] == [512, 256, 1024]
    assert [f["domain"]["tokens"]["calibration"] for f in facts.values()] == [512, 512, 1024]
    scores = {(tmp_path / str(tokens) / "scores.safetensors").read_bytes() for tokens in made}
    losses = {one.rows[1].loss for one in made.values()}
    assert (len(scores), len(losses)) == (1, 3)
