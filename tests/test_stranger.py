"""What went wrong when the program was tried as somebody new to it would (docs/first-hour.md)."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import refused
from folders import WORDS, sentences, write_model
from llm_narrow import BadInput, cache, claims, domains, models, outcome, precision, recipe, show


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    """A model of one's own to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


# Models ----------------------------------------------------------------------------------------


def test_a_pointer_of_git_lfs_is_told_from_a_broken_download(copied: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    (copied / "model.safetensors").write_text(text)
    with pytest.raises(BadInput, match="pointer of Git LFS and not the weights; run `git lfs pull"):
        models.check(str(copied))


def test_an_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BadInput, match="adapter of peft; merge it into its model first"):
        models.check(str(tmp_path))


@pytest.mark.parametrize("inner", ["checkpoint-20", "snapshots/0a1b"])
def test_a_folder_of_models_names_one(copied: Path, tmp_path: Path, inner: str) -> None:
    outer = tmp_path / "models--some--model"
    shutil.copytree(copied, outer / inner)
    with pytest.raises(BadInput) as told:
        models.check(str(outer))
    assert f"models are in folders below it: {outer / inner}; give one of these" in str(told.value)
    models.check(str(outer / inner))


def test_a_folder_that_holds_a_gguf_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"small\.gguf is beside it; to take that, give the file"):
        models.check(str(tmp_path))


def test_a_model_without_a_name(run: Any) -> None:
    refused(run("inspect", ""), "The name of the model is empty")


def test_weights_of_somebody_else(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_narrow import mistaken

    monkeypatch.setattr(mistaken.os, "access", lambda path, mode: False)
    told = mistaken.unreadable(copied / "model.safetensors", OSError("No such file"))
    assert told == "model.safetensors may not be read by this user; change its rights"


def test_a_damaged_tokenizer_says_more_than_a_key(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput) as told:
        models.load(str(copied))
    assert "tokenizer cannot be loaded: damaged, or of another version (KeyErr" in str(told.value)
    assert "fetch it again" in str(told.value)


def test_weights_that_are_not_numbers_are_refused(copied: Path, prune: Any) -> None:
    file = copied / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    done = prune("--model", copied, "--dry-run")
    refused(done, "are not finite", f"{name} holds numbers that are not finite", "damaged")


def test_weights_that_grow_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    assert "The weights are bfloat16 in their file" in precision.widened(tmp_path, "float32")
    assert precision.widened(tmp_path, "bfloat16") == ""
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    assert precision.widened(tmp_path, "float32") == ""


# Text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [" ", "", "ü"])
def test_a_book_on_one_line_is_cut(tmp_path: Path, between: str) -> None:
    file = tmp_path / "book.txt"
    text = between.join(f"{WORDS[n % 11]}{n * n}" for n in range(9000))
    file.write_text(text, encoding="utf-8")
    found = domains.load(str(file))
    pieces = sorted((d for part in found.documents.values() for d in part), key=lambda d: d.path)
    assert len(pieces) > 3 and "".join(d.text for d in pieces) == text
    assert max(len(d.text.encode()) for d in pieces) < 24_000


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    monkeypatch.setattr("llm_narrow.sources.os.access", lambda path, mode: False)
    with pytest.raises(BadInput, match="text may not be read by this user"):
        domains.load(str(tmp_path / "text"))


# Settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sparsity": "50%"}, "got '50%'; 50 % is 0.5"),
        ({"sparsity": "12.5"}, "12.5 % is 0.125"),
        ({"target_params": "60"}, "target_params 60 is too few to be meant; as a share of the "
         "model's it is 60%"),
        ({"target_params": "0.6"}, "it is 60%"),
        ({"target_flops": "0.75"}, "it is 75%"),
    ],
)  # fmt: skip
def test_shares_written_otherwise(given: dict[str, object], text: str) -> None:
    with pytest.raises(BadInput) as told:
        recipe.load(None, {"model": "m", "domain": "d", **given})
    assert text in str(told.value)


def test_an_empty_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    with pytest.raises(BadInput, match=r"it is empty; `llm-narrow init` writes one"):
        recipe.load(tmp_path / "empty.yaml")


def test_tasks_of_the_harness_are_pointed_to_it(run: Any, model_folder: Path) -> None:
    refused(run("bench", model_folder, "--tasks", "hellaswag"), "'hellaswag'", "--lm-eval")


# What is printed -------------------------------------------------------------------------------


def test_tables_in_a_pipe_are_not_broken_for_a_terminal(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # which several test processes set
    lines = run("models").out.splitlines()
    row = next(line for line in lines if "qwen2.5-coder-7b" in line)
    assert "Qwen/Qwen2.5-Coder-7B" in row and "7.6B" in row and "Apache-2.0" in row


def test_a_narrow_terminal_loses_no_column(
    run: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    row = next(t for t in run("inspect", model_folder).out.splitlines() if "neurons" in t)
    assert "96" in row and "9,216" in row and "transformers" in row


def test_what_a_model_writes_cannot_command_the_terminal() -> None:
    assert show.seen("def f():\n\treturn 1") == "def f():\n\treturn 1"
    assert show.seen("a\x1b[2Jb\r\x9bc\u202ed\x00") == "a\ufffd[2Jb\ufffd\ufffdc\ufffdd\ufffd"
    sample = {"prompt": "p\x1b]0;", "before": "\x1b[31m", "after": "\x07"}
    from rich.console import Console

    console = Console(file=open(os.devnull, "w"), record=True, width=60)  # noqa: SIM115
    result = SimpleNamespace(folder=Path("r"), rows=(), manifest={"samples": [sample]})
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr(show, "rows", lambda rows: "")
        result.rows = (1,)
        console.print(show.pruned(result))  # type: ignore[arg-type]
    console.file.close()
    assert "\x1b" not in console.export_text(styles=False)


def test_a_terminal_that_lacks_characters(model_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "größer → kleiner"
    shutil.copytree(model_folder, place)
    done = subprocess.run(
        [sys.executable, "-m", "llm_narrow", "inspect", str(place)], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = b" ".join(done.stdout.split())  # a title is broken where its table ends
    assert b"gr??er ? kleiner:" in said and b"27,808 parameters" in said


# Disks and other runs --------------------------------------------------------------------------


def test_a_file_larger_than_the_disk_takes(tmp_path: Path) -> None:
    refused_at = pytest.raises(BadInput, match="larger than this disk or `ulimit -f` allows")
    with refused_at, cache.written_whole(tmp_path / "x"):
        raise OSError(errno.EFBIG, "File too large")
    with refused_at, cache.written_whole(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: File too large (os error 27)")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_NARROW_CACHE", str(tmp_path / "file"))
    (tmp_path / "text").mkdir()
    for n in range(6):
        (tmp_path / "text" / f"{n}.txt").write_text(sentences(n, 9))
    with pytest.raises(BadInput, match=r"cannot be written: .*cache with LLM_NARROW_CACHE"):
        domains.load(str(tmp_path / "text"))


HOLDING = """
import sys
from pathlib import Path
from llm_narrow import outcome
with outcome.run_folder(Path(sys.argv[1]), force=True):
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_the_same_folder(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as first:  # fmt: skip
        assert first.stdout and first.stdout.readline() == "begun\n"
        with (
            pytest.raises(BadInput, match=f"Process {first.pid} is at work on .*another --out"),
            outcome.run_folder(place, force=True),
        ):
            pytest.fail("the block must not run")
        assert [p.name for p in tmp_path.iterdir()] == [f".run.partial-{first.pid}"]
        first.kill()
        first.wait()
    with outcome.run_folder(place, force=False) as run:  # what was killed is no hindrance
        assert [p.name for p in tmp_path.iterdir()] == [run.name]
    assert place.is_dir()


def test_a_mark_ends_with_its_block(tmp_path: Path) -> None:
    with claims.held(tmp_path):
        assert claims.is_held(tmp_path)
    assert not claims.is_held(tmp_path) and not claims.is_held(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_training_says_how_to_go_on(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_narrow.stages._lessons", stop)
    done = prune("--quiet", "--recover-tokens", "2k", "--validation-tokens", "64")
    assert done.code == 130
    assert done.err.splitlines() == [
        "Interrupted; nothing is left half-written.",
        f"What is done is kept; go on with: llm-narrow resume {tmp_path / 'run'}",
    ]


def test_folders_with_blanks_and_umlauts(prune: Any, tmp_path: Path) -> None:
    place = tmp_path / "mein Möbel"
    text = place / "Texte für Ü"
    for n in range(40):
        (text / f"{n}.txt").parent.mkdir(parents=True, exist_ok=True)
        (text / f"{n}.txt").write_text(sentences(n, 30))
    done = prune("--model", write_model(place / "ein Modell"), "--domain", text,
                 "--out", place / "das Ergebnis", "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    assert (place / "das Ergebnis" / "model" / "model.safetensors").is_file()
