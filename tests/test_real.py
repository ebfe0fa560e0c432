"""The main job on the real SmolLM2-135M and the real Python corpus, at a small budget."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

BUDGET = ["--calibration-tokens", "8192", "--held-out-tokens", "4096", "--no-speed"]
JOB = ["prune", "--model", "smollm2-135m", "--domain", "python", "--sparsity", "neurons=0.5"]
STOCK = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
ids = tokenizer("def fibonacci(n):\\n", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=12, do_sample=False)
print(json.dumps({
    "ours": "llm_narrow" in sys.modules,
    "parameters": sum(p.numel() for p in model.parameters()),
    "widths": sorted({layer.mlp.down_proj.in_features for layer in model.model.layers}),
    "text": tokenizer.decode(out[0]),
}))
"""


def narrowed(out: Path, *more: str) -> dict[str, Any]:
    """Run the job in a process of its own; the machine-readable result."""
    command = [sys.executable, "-m", "llm_narrow", *JOB, "--recover-tokens", "0"]
    command += ["--out", str(out), *BUDGET, "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_half_of_the_neurons_of_smollm2_go_and_the_refit_makes_up_for_most(tmp_path: Path) -> None:
    refitted = narrowed(tmp_path / "refitted", "--seed", "3")
    bare = narrowed(tmp_path / "bare", "--seed", "3", "--no-refit")
    assert bare["scores"]["reused"] and bare["plan"] == refitted["plan"]
    before, after = refitted["rows"]
    assert before["parameters"] == 134_515_008
    assert after["parameters"] == 94_701_888
    lost = after["loss_difference"]
    lost_bare = bare["rows"][1]["loss_difference"]
    assert 0 < lost < 0.6 * lost_bare
    assert (tmp_path / "refitted" / "report.md").read_text().count("NOT RECOVERED") == 1

    isolated = [sys.executable, "-P", "-c", STOCK, str(tmp_path / "refitted" / "model")]
    done = subprocess.run(isolated, capture_output=True, text=True, check=True, cwd=tmp_path)
    stock = json.loads(done.stdout)
    assert not stock["ours"]
    assert stock["parameters"] == 94_701_888
    assert stock["widths"] == [768]
    assert stock["text"].startswith("def fibonacci(n):")
