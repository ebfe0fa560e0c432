"""Models by hub id, with the real client against a small hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from commands import SMALL
from folders import write_model
from hub import client_env, serve

# The client settles its address and cache when it is imported, hence a process of its own.
SCRIPT = """
import json, sys
import torch
from llm_narrow import models
from llm_narrow.errors import NarrowError

def track(items, what, total=None):
    for item in items:
        told.append([what, total])
        yield item

for name, options in json.loads(sys.argv[1]):
    told = []
    try:
        loaded = models.load(name, track=track, **options)
        total = loaded.model(torch.arange(3, 40)[None]).logits.double().sum().item()
        files = sorted(path.name for path in loaded.folder.iterdir())
        answer = {"total": total, "files": files, "folder": str(loaded.folder), "told": told}
    except NarrowError as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(answer))
rows = {row.alias: row for row in models.known()}
print(json.dumps({alias: row.bytes for alias, row in rows.items() if row.cached}))
"""

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def loads(
    url: str, home: Path, *asked: tuple[str, dict[str, Any]], offline: bool = False
) -> list[dict[str, Any]]:
    """What loading each of the models in a fresh process gives, and at the end what is cached."""
    environment = {**os.environ, **client_env(url, home), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps(asked)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the client draws nothing itself"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Pythia of 5 MB with pickles beside it, one of pickles only, a gated model, a bare one."""
    folder = tmp_path_factory.mktemp("hub")
    pythia = folder / "models/EleutherAI/pythia-410m"
    write_model(pythia, "gpt_neox", intermediate_size=10_000)
    (pythia / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (pythia / "flax_model.msgpack").write_bytes(b"no")
    (pythia / "modeling_own.py").write_text("raise SystemExit('code of the model ran')")
    (pythia / "onnx").mkdir()
    save_file({"a": torch.zeros(1)}, pythia / "onnx" / "model.safetensors")
    pickled = write_model(folder / "models/EleutherAI/pythia-14m", "gpt_neox")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    gated = write_model(folder / "models/meta-llama/Llama-3.2-1B", "llama")
    (gated / ".gated").write_text("")
    own = write_model(folder / "models/own/llama", "llama")
    about = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    about |= {"model_type": "own", "auto_map": classes}
    (own / "config.json").write_text(json.dumps(about))
    (own / "own.py").write_text(CODE)
    bare = folder / "models/EleutherAI/pythia-31m"
    bare.mkdir(parents=True)
    (bare / "config.json").write_text("{}")
    return folder


def test_a_known_model_comes_from_the_hub_and_then_from_its_cache(tmp_path, root):
    repository = root / "models/EleutherAI/pythia-410m"
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(repository)
        expected = model(torch.arange(3, 40)[None]).logits.double().sum().item()
    with serve(root) as url:
        first, by_id, cached = loads(
            url, tmp_path, ("pythia-410m", {}), ("EleutherAI/pythia-410m@main", {})
        )
    assert first["total"] == pytest.approx(expected)
    assert first["files"] == [
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    size = sum((repository / name).stat().st_size for name in first["files"])
    assert cached == {"pythia-410m": size}
    megabytes = [told for told in first["told"] if told[0] == "EleutherAI/pythia-410m (MB)"]
    assert megabytes
    assert {total for _, total in megabytes} == {size // 1_000_000}
    assert by_id["folder"] == first["folder"]
    assert not any("(MB)" in what for what, _ in by_id["told"])

    commit = Path(first["folder"]).name
    again = loads(url, tmp_path, ("pythia-410m", {}))  # the server is gone
    assert again[0]["folder"] == first["folder"]
    offline = loads(
        url, tmp_path, ("pythia-410m", {}), ("pythia-410m", {"revision": commit}),
        ("pythia-160m", {}), offline=True,
    )  # fmt: skip
    assert [answer.get("text") for answer in offline[:2]] == [None, None]
    assert offline[0]["total"] == offline[1]["total"] == first["total"]
    assert offline[2]["error"] == "Unreachable"
    assert "smollm2-135m" in offline[2]["text"]
    assert offline[3] == cached


def test_what_the_hub_cannot_give_is_told_in_the_users_terms(tmp_path, root):
    with serve(root) as url:
        pickled, gated, absent, revision, own, bare, cached = loads(
            url, tmp_path, ("pythia-14m", {}), ("llama-3.2-1b", {}), ("runs/absent", {}),
            ("pythia-410m", {"revision": "step7"}), ("bad--/name", {}), ("pythia-31m", {}),
        )  # fmt: skip
    assert pickled["error"] == "BadInput"
    assert "pythia-14m on the hub has only pickled weights (pytorch_model.bin)" in pickled["text"]
    assert gated["error"] == "Unreachable"
    assert "Llama-3.2-1B is gated: accept its licence" in gated["text"]
    assert "log in" in gated["text"]
    assert absent["error"] == "BadInput"
    assert "runs/absent is neither a folder nor a model on the hub" in absent["text"]
    assert revision["error"] == "BadInput"
    assert "pythia-410m has no revision 'step7'" in revision["text"]
    assert own["error"] == "BadInput"
    assert "bad--/name is neither a folder nor a model on the hub" in own["text"]
    assert bare["error"] == "BadInput"
    assert "has no weights; model.safetensors is needed" in bare["text"]
    assert cached == {}
    assert not list(tmp_path.rglob("*.bin"))


def test_code_that_comes_with_a_model_runs_only_if_trusted(tmp_path, root):
    with serve(root) as url:
        refused, trusted, _ = loads(
            url, tmp_path, ("own/llama", {}), ("own/llama", {"trust_remote_code": True})
        )
    assert refused["error"] == "BadInput"
    assert "needs code of its own; read that code, then give --trust-remote-code" in refused["text"]
    assert "own.py" in trusted["files"]


def test_a_hub_out_of_reach_says_what_works_without_it(tmp_path):
    answer, cached = loads("http://127.0.0.1:9", tmp_path, ("pythia-410m", {}))
    assert answer["error"] == "Unreachable"
    assert "EleutherAI/pythia-410m: the hub cannot be reached" in answer["text"]
    for way in ("smollm2-135m", "folder", ".gguf", "HF_HOME"):
        assert way in answer["text"]
    assert cached == {}


def test_a_model_larger_than_the_disk_is_refused_before_it_is_fetched(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from llm_narrow import hub
    from llm_narrow.errors import BadInput

    file = SimpleNamespace(filename="model.safetensors", file_size=10**18, commit_hash="0")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BadInput, match=r"No space left .* needs 1,000,000,000,000 MB, .*HF_HOME"):
        hub._fetch("a/b", [file], lambda items, what, total=None: items)


def test_a_disk_that_fills_up_while_fetching_is_told(tmp_path, monkeypatch):
    import errno

    from llm_narrow import hub
    from llm_narrow.errors import BadInput

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(BadInput, match="No space left"):
        hub.download("a/b")


def test_the_main_job_runs_on_a_hub_model_as_on_any_other(tmp_path, root, domain_folder):
    """`llm-narrow prune --model pythia-410m --domain …`, with nothing but the hub moved."""
    command = [sys.executable, "-m", "llm_narrow", "prune", "--model", "pythia-410m"]
    command += ["--domain", str(domain_folder), "--out", str(tmp_path / "run"), "--json", *SMALL]
    command += ["--sparsity", "neurons=0.5,heads=0.25"]
    with serve(root) as url:
        environment = {**os.environ, **client_env(url, tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["checkpoint"]["layout"] == "uneven"  # no stock gpt_neox has fewer heads
    kept = {(row["kind"], row["before"], row["after"]) for row in result["plan"]}
    assert kept == {("neurons", 10_000, 5_000), ("heads", 4, 3)}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "figures", "model", "manifest.json", "recipe.yaml", "report.html", "report.md", "rows.csv",
        "rows.jsonl", "scores.safetensors",
    }  # fmt: skip
