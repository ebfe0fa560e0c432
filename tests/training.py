"""What the tests of training share, and a program of their own to be killed or started twice."""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_narrow.blocks import Blocks
from llm_narrow.distill import cached_distill_loss, cached_teacher
from llm_narrow.losses import language_loss
from llm_narrow.settings import Settings
from llm_narrow.train import Step, Trained, train
from tiny import VOCAB, tiny

ROOT = Path(__file__).parent


def text(n: int = 16, *, length: int = 9, seed: int = 0) -> Blocks:
    """Blocks that can be learnt: each token is the one before it plus 1 or 2."""
    g = torch.Generator().manual_seed(seed)
    jumps = torch.randint(1, 3, (n, length), generator=g, dtype=torch.int32)
    jumps[:, 0] = torch.randint(0, VOCAB, (n,), generator=g)
    tokens = (jumps.cumsum(1) % VOCAB).int()
    sha256 = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Blocks(tokens, torch.ones_like(tokens).short(), torch.zeros_like(tokens), sha256)


def small(kind: str = "llama", **changes: Any) -> nn.Module:
    """A model that learns within a few steps."""
    return tiny(kind, std=0.1, **changes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Fading:
    """A step of one's own that remembers a number and a tensor, on which the weights depend."""

    def __init__(self) -> None:
        self.smoothed = 0.0
        self.seen = torch.zeros(3)

    def __call__(self, model: Any, step: Step) -> dict[str, Any]:
        self.smoothed = 0.9 * self.smoothed + 0.1 * step.loss
        if step.validation is not None:
            self.smoothed += 0.01 * step.validation
        self.seen[step.number % 3] += step.lr
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 - 1e-3 * self.smoothed - float(self.seen.sum()))
        return {"strength": self.smoothed, "norms": self.seen.tolist()}

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": self.smoothed, "seen": self.seen.clone()}

    def load_state_dict(self, held: dict[str, Any]) -> None:
        self.smoothed, self.seen = held["smoothed"], held["seen"].clone()


def whole_run(out: Path, mode: str, *, steps: int = 40, validate: bool = True) -> Trained:
    """A run with dropout and a step of its own; its weights go to final.safetensors."""
    torch.set_num_threads(1)
    model = small("gpt2")
    blocks = text(16)
    loss: Any = language_loss
    if mode == "cached":
        teacher = tiny("gpt2", seed=5)
        many = text(320)
        cached = cached_teacher(teacher, many, out / "teacher", k=8, temperature=2.0)
        loss, blocks = cached_distill_loss(cached), many
    settings = Settings(
        tokens=steps * 4 * 9, lr=1e-3, batch_size=2, accumulation=2, evaluate_every=3,
        weight_decay=0.01,
    )
    done = train(
        model, blocks, loss=loss, settings=settings, validation=text(4, seed=9),
        after_step=Fading(), state=out / "state", rows=out / "train.jsonl",
    )
    save_file(weights(model), out / "final.safetensors")
    return done


def _killed(place: Path, mode: str, kills: int, seed: int) -> dict[str, Any]:
    """Run over and over, killed at random moments, until that happened often enough.

    Every run that comes to its end is compared with one that nobody killed. This process computes
    nothing itself, so that it may fork.
    """
    importlib.import_module("torch._dynamo")  # which the first step imports, in every child anew
    small("gpt2")
    draw = random.Random(seed)
    assert _child(place / "whole", mode) == 0
    wanted, most = _hashes(place / "whole"), _progress(place / "whole")
    found: dict[str, Any] = {"kills": [], "runs": 0, "same": 0, "resumed": 0}
    out = place / "killed"
    while len(found["kills"]) < kills or not found["runs"]:
        here = _progress(out)
        go = len(found["kills"]) >= kills or here + 1 >= most
        kill_at = None if go else draw.randrange(here, most)
        code = _child(out, mode, kill_at, draw.uniform(0, 0.03))
        if code == -signal.SIGKILL:
            found["kills"].append(_progress(out))
            continue
        assert code == 0
        found["runs"] += 1
        found["same"] += _hashes(out) == wanted
        found["resumed"] += json.loads((out / "done.json").read_text())["resumed"] is not None
        shutil.rmtree(out)
    return found


def _child(out: Path, mode: str, kill_at: int | None = None, wait: float = 0.0) -> int:
    """A run in a process of its own, killed a moment after it came so far."""
    out.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            done = whole_run(out, mode)
            (out / "done.json").write_text(json.dumps({"resumed": done.resumed}))
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = 0
    while kill_at is not None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if _progress(out) >= kill_at:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _progress(out: Path) -> int:
    """Rows and shards written."""
    rows = out / "train.jsonl"
    lines = rows.read_bytes().count(b"\n") if rows.exists() else 0
    return lines + len(list(out.glob("teacher/*.safetensors")))


def _hashes(out: Path) -> dict[str, str]:
    """Of everything that has to be the same: weights, rows but for their speed, the cache."""
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
    found = {"rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    files = [out / "final.safetensors", *sorted(out.glob("teacher/*.safetensors"))]
    return found | {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _two(out: Path) -> None:
    """One of two processes, each with a batch of 2."""
    torch.set_num_threads(1)
    model = small()
    settings = Settings(tokens=4 * 4 * 9, lr=1e-2, batch_size=2, evaluate_every=2, choose="last")
    done = train(
        model, text(), loss=language_loss, settings=settings, validation=text(6, seed=9),
        rows=out / "train.jsonl", state=out / "state", expected_processes=2,
    )
    if os.environ["RANK"] == "0":
        save_file(weights(model), out / "final.safetensors")
        (out / "done.json").write_text(json.dumps({"validation": done.validation}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    place = Path(sys.argv[2])
    if sys.argv[1] == "two":
        _two(place)
    else:
        print(json.dumps(_killed(place, sys.argv[1], int(sys.argv[3]), int(sys.argv[4]))))
