"""What a user can get wrong: one line that says the value, the rule and the way out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands import SMALL, left_behind, refused
from folders import sentences, write_model


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--model", "smollm2-135n"], ["'smollm2-135n' is unknown", "Did you mean 'smollm2-135m'"]),
        (["--domain", "pyton"], ["'pyton' is unknown", "Did you mean 'python'"]),
        (["--criterion", "atribution"], ["'atribution' is unknown", "'attribution'"]),
        (["--sparsity", "1"], ["--sparsity must be at least 0 and below 1", "got '1'"]),
        (["--sparsity", "-0.5"], ["--sparsity must be at least 0 and below 1"]),
        (["--target-params", "100"], ["target_params 100 is below", "the least that removing"]),
        (["--calibration-tokens", "9999999"], ["9,999,999 tokens were asked for"]),
        (["--length", "264", "--calibration-tokens", "528", "--held-out-tokens", "264"],
         ["blocks.length must be at most 256", "--length"]),
        (["--device", "cuda:7"], ["'cuda:7' is not there", "auto or cpu"]),
        (["--recipe", "none.yaml"], ["No recipe at none.yaml"]),
        (["--glob", "*.rs"], ["No file of", "fits the glob '*.rs'"]),
        (["--text-column", "body"], ["text_column does not apply"]),
    ],
)
def test_bad_settings(prune: Any, tmp_path: Path, arguments: list[str], texts: list[str]) -> None:
    refused(prune(*arguments), *texts)
    assert left_behind(tmp_path) == []


def truncated(folder: Path) -> Path:
    file = write_model(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def corrupt(folder: Path) -> Path:
    (write_model(folder) / "model.safetensors").write_bytes(b"not a header at all")
    return folder


def pickled(folder: Path) -> Path:
    (write_model(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def without_weights(folder: Path) -> Path:
    (write_model(folder) / "model.safetensors").unlink()
    return folder


def with_config(folder: Path, **changes: object) -> Path:
    file = write_model(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def undeclared(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    write_model(folder)
    config = AutoConfig.for_model(
        "codegen", vocab_size=320, n_embd=32, n_layer=1, n_head=4, n_positions=256, rotary_dim=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def quantised(folder: Path) -> Path:
    return with_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def of_another_tokenizer(folder: Path) -> Path:
    return write_model(folder, vocab_size=100)


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (truncated, ["model.safetensors"]),
        (corrupt, ["model.safetensors"]),
        (pickled, ["safetensors", "pytorch_model.bin"]),
        (without_weights, ["weights"]),
        (undeclared, ["'codegen'", "Declared: ", "docs/adding-an-architecture.md"]),
        (quantised, ["quantised"]),
        (of_another_tokenizer, ["tokenizer"]),
    ],
)
def test_bad_models(prune: Any, tmp_path: Path, make: Any, texts: list[str]) -> None:
    folder = make(tmp_path / "model")
    refused(prune("--model", folder), *texts)
    assert left_behind(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "holds no files"),
        ({"a/1.txt": b"", "b/2.txt": b" \n"}, "2 empty"),
        ({"a/1.txt": b"\0\1\2", "b/2.txt": b"ab\0"}, "2 binary"),
        ({"a/1.txt": "größer".encode("latin-1")}, "1 not UTF-8"),
        ({"1.txt": b"a few words", "2.txt": b"some more"}, "too little data"),
    ],
)
def test_bad_domains(prune: Any, tmp_path: Path, files: dict[str, bytes], text: str) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    refused(prune("--domain", folder), text)
    assert left_behind(tmp_path) == ["text"]


def test_a_text_column_that_does_not_exist(prune: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": sentences(i, 30)}) + "\n" for i in range(40)))
    refused(prune("--domain", file, "--text-column", "body"), "'body'", "text")
    assert prune("--domain", file, "--dry-run").code == 0


def test_a_full_disk_leaves_nothing(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **given: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run"))

    monkeypatch.setattr("llm_narrow.checkpoint.save", full)
    refused(prune("--quiet"), "No space left on the disk")
    assert left_behind(tmp_path) == []


def test_ctrl_c_leaves_nothing(prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **given: object) -> None:
        assert [name[:4] for name in left_behind(tmp_path)] == [".run"]
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_narrow.checkpoint.save", stop)
    done = prune("--quiet")
    assert (done.code, done.err) == (130, "Interrupted; nothing is left half-written.\n")
    assert left_behind(tmp_path) == []


def test_the_domain_is_looked_up_before_the_model_is_loaded(
    prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_narrow.models.load", lambda *args, **given: 1 / 0)
    refused(prune("--domain", "pyton"), "'pyton' is unknown")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_process_and_a_real_signal(
    number: signal.Signals, code: int, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    names = ["--model", str(model_folder), "--domain", str(domain_folder), *SMALL]
    command = [sys.executable, "-m", "llm_narrow", "prune", *names, "--out", str(tmp_path / "run")]

    def heed_interrupts() -> None:
        # A job in the background of a script is started with interrupts ignored, and so are we.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and not left_behind(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert err.strip().splitlines()[-1] == "Interrupted; nothing is left half-written."
    assert "Traceback" not in err
    assert left_behind(tmp_path) == []
