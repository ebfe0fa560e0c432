"""The command line itself: every flag counts, the documents are right, and starting is quick."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import llm_narrow
from commands import refused
from llm_narrow import cli
from llm_narrow.recipe import FLAGS, Recipe
from llm_narrow.to_gguf import Exported

CHANGED = {
    "--model": "other", "--domain": "other", "--revision": "v1", "--glob": "*.md",
    "--text-column": "body", "--project-column": "repo", "--max-documents": "7",
    "--length": "64", "--batch-size": "3", "--criterion": "fisher", "--calibration-tokens": "4096",
    "--sparsity": "0.3", "--target-params": "60%", "--kinds": "heads", "--allocation": "global",
    "--target-size": "2MB", "--target-flops": "60%", "--target-kv-cache": "50%",
    "--query-heads": "2", "--channels": "24",
    "--layout": "padded", "--forget": "other", "--forget-weight": "2", "--multiple": "64",
    "--vocabulary": "domain", "--vocabulary-threshold": "3",
    "--damping": "0.1", "--held-out-tokens": "4096", "--samples": "3",
    "--seed": "1", "--device": "cpu", "--dtype": "bfloat16", "--trust-remote-code": None,
    "--no-refit": None, "--no-speed": None,
    "--refit-tokens": "8k",
    "--method": "lasso", "--lasso-tokens": "4k", "--lasso-lr": "1e-3", "--control": "timetable",
    "--strength": "2", "--weights": "one",
    "--no-report": None, "--no-fill": None,
    "--recover-tokens": "1M", "--recover-method": "lora", "--lora-rank": "2",
    "--lr": "1e-3", "--distill": "none", "--teacher": "other", "--temperature": "2",
    "--mix": "0.5", "--top-k": "8", "--schedule": "constant", "--warmup": "0.1",
    "--accumulation": "2", "--clip": "2", "--weight-decay": "0.1", "--checkpointing": None,
    "--sharded": None, "--validation-tokens": "4k", "--evaluate-every": "7",
    "--save-every-minutes": "1", "--trackers": "tensorboard",
}  # fmt: skip
# What is about this call and no part of the recipe; each has a test of its own here.
ABOUT_THE_CALL = {
    "--recipe", "--out", "--force", "--dry-run", "--scores", "--json", "--quiet", "--debug"
}  # fmt: skip


@pytest.fixture
def settled(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe that a command line comes to."""

    def go(*arguments: str) -> Recipe:
        caught: list[Recipe] = []

        def stop(recipe: Recipe, *args: object, **given: object) -> None:
            caught.append(recipe)
            raise llm_narrow.BadInput("far enough")

        # First, lest it be imported with what is put into `stages` here, and keep that.
        importlib.import_module("llm_narrow.recovery")
        for place in ("stages.prune", "stages.score", "benchmark.bench", "recovery.recover"):
            monkeypatch.setattr(f"llm_narrow.{place}", stop)
        done = run(*arguments)
        assert caught, done.err
        return caught[0]

    return go


def test_no_flag_of_prune_is_dead(settled: Any) -> None:
    names = ["prune", "--model", "m", "--domain", "d"]
    plain = settled(*names)
    command = typer.main.get_command(cli.app).commands["prune"]  # type: ignore[attr-defined]
    options = {o.opts[0] for o in command.params} - {"--help"}
    negative = {"--refit": "--no-refit", "--speed": "--no-speed", "--fill": "--no-fill",
                "--report": "--no-report"}  # fmt: skip
    tried = {negative.get(option, option) for option in options - ABOUT_THE_CALL}
    assert tried == {*CHANGED, "--step", "--penalty", "--keep-layers", "--forget-refit"}
    for option, value in CHANGED.items():
        changed = settled(*names, option, *([] if value is None else [value]))
        assert changed != plain, option
    paper = settled(*names, "--step", "gradient", "--control", "loss", "--penalty", "hoyer")
    assert (paper.lasso.step, paper.lasso.penalty) == ("gradient", "hoyer")
    fewer = settled(*names, "--kinds", "layers", "--keep-layers", "3", "--target-params", "60%")
    assert fewer.prune.keep_layers == 3
    unlearned = settled(*names, "--forget", "english", "--forget-refit", "0.1")
    assert unlearned.prune.forget_refit == 0.1


# Command -> what it calls, with names that the tests cannot load; prune, score and bench are read.
CALLED = {
    "certify": "certificate.certify", "compare": "compare_runs.compare", "export": "to_gguf.export",
    "explain": "explain.explain", "gate": "gate.gate", "prices": "pricing.prices",
    "push": "push.push", "relearn": "relearn.relearn",
}  # fmt: skip


@pytest.mark.parametrize(
    "document",
    ["README.md", *(f"docs/{name}.md" for name in ("recipes", "tasks", "export", "relearn",
                    "certificate", "matrix", "vocabulary", "forget", "compare", "prices",
                    "explain"))],
)  # fmt: skip
def test_the_commands_of_the_documents_parse(
    document: str, settled: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **given: object) -> None:
        raise llm_narrow.BadInput("far enough")

    for name in (*CALLED.values(), "bench_tasks.bench", "matrix.bench", "harness.bench",
                 "compare_runs.recompute"):  # fmt: skip
        monkeypatch.setattr(f"llm_narrow.{name}", stop)
    root = Path(__file__).parent.parent
    text = (root / document).read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.lstrip("$ ").startswith("llm-narrow ")]
    assert commands
    for line in commands:
        words = shlex.split(line.lstrip("$ ").partition(" > ")[0], comments=True)[1:]
        if {"--tasks", "--matrix", "--lm-eval"} & {*words} or words[0] in CALLED:
            assert "far enough" in run(*words).err, line
        elif words[0] in ("prune", "score", "bench"):
            words = [str(root / w) if w.startswith("recipes/") else w for w in words]
            assert settled(*words), line


def test_the_documented_defaults_are_those_of_the_recipe() -> None:
    text = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    for name, dotted in FLAGS.items():
        line = next((t for t in text.splitlines() if f"`{dotted}`" in t), "")
        assert f"`--{name.replace('_', '-')}" in line, dotted


def test_debug_shows_the_traceback(prune: Any) -> None:
    done = prune("--model", "smollm2-135n", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err and "UnknownName" in done.err


def test_wrong_usage_exits_with_2(run: Any) -> None:
    for arguments in (["prune", "--modle", "x"], ["prun"], ["prune", "--seed", "x"], ["score"]):
        done = run(*arguments)
        assert done.code == 2, arguments
        assert "Error: " in done.err or "Usage: " in done.err


def test_version(run: Any) -> None:
    assert run("--version").out == f"llm-narrow {llm_narrow.__version__}\n"


# Imports -------------------------------------------------------------------------------------


def test_the_public_names() -> None:
    assert llm_narrow.__all__ == sorted(llm_narrow.__all__)
    assert llm_narrow.__all__ == [
        "BadInput", "Bench", "Compared", "Inspected", "Loaded", "NarrowError", "Plan", "Pruned",
        "Recipe", "Scored", "TargetOutOfReach", "UnknownName", "Unreachable", "__version__",
        "bench", "compare", "inspect", "load", "prune", "recover", "resume", "score",
    ]  # fmt: skip
    assert all(getattr(llm_narrow, name) is not None for name in llm_narrow.__all__)
    assert set(llm_narrow.__all__) <= set(dir(llm_narrow))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm_narrow.nothing


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, llm_narrow, llm_narrow.cli\n"
        "found = {'torch', 'transformers', 'pydantic', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_flag_of_tasks_arrives(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: dict[str, Any] = {}

    def stop(recipe: None, names: list[str], console: object, **given: object) -> None:
        caught.update(given, names=names)
        raise llm_narrow.BadInput("far enough")

    monkeypatch.setattr("llm_narrow.bench_tasks.bench", stop)
    line = "bench m n --tasks humaneval --prompt raw --samples-per-task 5 --temperature 0.5 --k 1,5 --limit 3 --max-new-tokens 64 --batch-size 8 --allow-unsandboxed --out answers --seed 1 --device cpu --dtype bfloat16 --trust-remote-code"  # noqa: E501
    done = run(*line.split())
    assert "far enough" in done.err
    assert caught == {
        "names": ["m", "n"], "sets": "humaneval", "prompt": "raw", "samples_per_task": 5,
        "temperature": 0.5, "k": "1,5", "limit": 3, "max_new_tokens": 64, "batch_size": 8,
        "allow_unsandboxed": True, "out": Path("answers"), "seed": 1, "device": "cpu",
        "dtype": "bfloat16", "trust_remote_code": True,
    }  # fmt: skip
    command = typer.main.get_command(cli.app).commands["bench"]  # type: ignore[attr-defined]
    flags = {o.opts[0] for o in command.params if o.opts[0].startswith("--")}
    of_text = {cli.cli_show.solving.flag(name) for name in cli.cli_show.solving.OF_TEXT}
    assert flags == of_text | ABOUT_THE_CALL - {"--force", "--dry-run", "--scores"} | {
        word for word in line.split() if word.startswith("--")
    }


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bench m --limit 0", "--limit is about problems to solve"),
        ("bench m --k 1 --prompt raw", "--prompt and --k is about"),
        ("bench m --tasks mbpp --domain d --no-speed", "--domain and --speed is about held-out"),
        ("bench m --tasks mbpp --recipe r.yaml", "--recipe is about held-out text"),
    ],
)
def test_flags_of_bench_that_would_do_nothing_are_refused(run: Any, line: str, told: str) -> None:
    refused(run(*line.split()), told)


def test_export_arrives(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []

    def made(*names: Path, track: object, **given: object) -> Exported:
        caught.append((names, given))
        return Exported(tmp_path / "x.gguf", 1000, "llama", "q8_0", ("a",), ("Known.",), None)

    monkeypatch.setattr("llm_narrow.to_gguf.export", made)
    done = run("export", "runs/x", "--out", "x.gguf", "--quantize", "q8_0", "--force", "--no-check")
    assert done.code == 0, done.err
    assert caught == [
        ((Path("runs/x"), Path("x.gguf")), {"quantize": "q8_0", "force": True, "check": False})
    ]
    told = " ".join(done.out.split())
    assert "llama, q8_0, 1.0 kB" in told and "1 tensors are in f16" in told and "Known." in told
    refused(run("export", "x", "--out", "y", "--to", "onnx"), "Format 'onnx' is unknown")
