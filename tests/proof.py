"""What the tests of relearning, certificates and gates share: tiny runs, and a lost domain."""

import json
import math
import random
from pathlib import Path
from typing import Any

import llm_narrow
from folders import write_domain, write_model
from llm_narrow import checkpoint
from llm_narrow.models import load
from llm_narrow.relearn_answers import ratio_of
from llm_narrow.relearn_cells import _fresh

OTHER = ("una", "casa", "perro", "gato", "libro", "mesa", "sol", "luna", "rio", "mar")
SMALL: dict[str, Any] = {
    "length": 32, "calibration_tokens": 512, "held_out_tokens": 256, "speed": False,
    "report": False, "samples": 0,
}  # fmt: skip
ASKED: dict[str, Any] = {
    "tokens": 768, "length": 32, "batch_size": 4, "validation_tokens": 256,
    "held_out_tokens": 512, "evaluate_every": 3, "seeds": 2, "lrs": "1e-3,3e-3", "points": 4,
    "target": "scratch",
}  # fmt: skip


def write_lost(folder: Path, seed: int = 500) -> Path:
    """A domain of other words than those that the runs are narrowed to."""
    for number in range(40):
        chance = random.Random(seed + number)
        words = (chance.choices(OTHER, k=8) for _ in range(30))
        lines = [" ".join([*some, f"{chance.random():.6f}"]) for some in words]
        file = folder / f"project{number % 10}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    return folder


def write_runs(place: Path, *names: str) -> dict[str, Path]:
    """Runs of one tiny model: by `score`, by `random`, `uneven`, or `fresh` (nothing is left)."""
    model, domain = write_model(place / "whole"), write_domain(place / "text")
    more: dict[str, dict[str, Any]] = {
        "random": {"criterion": "random"}, "uneven": {"allocation": "global", "multiple": 1}
    }  # fmt: skip
    found = {}
    for name in names:
        run = place / name
        settings = {"sparsity": 0.5, **SMALL, **more.get(name, {})}
        llm_narrow.prune(model=str(model), domain=str(domain), out=run, **settings)
        if name == "fresh":
            _fresh(load(str(run)), 77).save_pretrained(run / "model")
            assert checkpoint.weights_sha256(run / "model")
        found[name] = run
    return found


def shas(run: Path) -> tuple[str, str]:
    """The hashes of a run's whole model and of its own."""
    lines = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    return lines[0]["sha256"], lines[1]["sha256"]


def matrix_of(
    run: Path, file: Path, *, value: float | None = 6.0, low: float | None = None,
    high: float | None = None, on: float = 0.05, own: str | None = None,
) -> Path:  # fmt: skip
    """A matrix.json, as `bench --matrix` has it: the domain, prose and questions."""
    whole, mine = shas(run)
    names = {"whole": whole, "narrow": own or mine}

    def three(name: str, middle: float) -> dict[str, float]:
        return {name: middle, f"{name}_low": middle - 0.1, f"{name}_high": middle + 0.1}

    losses, choices = [], []
    for model, bits, right in (("whole", 1.0, 0.8), ("narrow", 1.5, 0.5)):
        first = model == "whole"
        for key in ("domain", "boolq-passages"):
            rise = {"increase": None} if first else three("increase", 0.35)
            losses.append({"set": key, "model": model, **three("bits_per_byte", bits), **rise})
        gap = {"acc_difference": None} if first else three("acc_difference", -0.3)
        choices.append({"set": "sciq", "model": model, **three("acc", right), **gap})
    about = {"items": 2, "sha256": "ab", "source": "x"}
    ratio = {
        "model": "narrow", "on": "domain", **three("on_increase", on),
        **three("off_increase", 0.3), "selectivity": value, "selectivity_low": low,
        "selectivity_high": high,
    }  # fmt: skip
    told = {
        "form": 1, "models": [{"name": n, "sha256": s} for n, s in names.items()],
        "sets": {
            "domain": {"group": "domain", "own": True, **about},
            "boolq-passages": {"group": "prose", "own": False, **about},
            "sciq": {"group": "knowledge", "own": False, **about},
        },
        "losses": losses, "choices": choices, "notes": [], "folder": ".",
        "selectivities": [{**ratio, "off": "sciq"}, {**ratio, "off": "off the domain"}],
    }  # fmt: skip
    file.write_text(json.dumps(told))
    return file


def audit_of(
    run: Path, folder: Path, *, tokens: float | None = 100.0, scratch: float | None = 200.0,
    own: str | None = None, domain: str = "english",
) -> Path:  # fmt: skip
    """The folder of an audit with a budget of 400 tokens, as `relearn` writes it."""
    whole, mine = shas(run)
    budget = 400
    ratio, at_least, at_most = ratio_of(
        math.inf if tokens is None else tokens, math.inf if scratch is None else scratch, budget
    )

    def line(name: str, kind: str, sha256: str | None, bits: float) -> dict[str, Any]:
        return {
            "subject": {"name": name, "kind": kind, "sha256": sha256}, "seeds": [0, 1],
            "curve": [{"bits_per_byte": {"value": bits, "low": bits, "high": bits}}],
        }  # fmt: skip

    answer = {
        "subject": "run", "asked": True, "goal": "whole", "target": 2.0, "tokens": tokens,
        "scratch_tokens": scratch, "budget": budget, "ratio": ratio, "at_least": at_least,
        "at_most": at_most, "low": at_least, "high": at_most,
    }  # fmt: skip
    told = {
        "domain": {"name": domain, "sha256": {"held_out": "cd"}},
        "command": "llm-narrow relearn run",
        "lines": [line("whole", "whole", whole, 1.0), line("run", "run", own or mine, 3.0)],
        "answers": [{**answer, "asked": False, "goal": "scratch"}, answer],
    }
    folder.mkdir()
    (folder / "relearn.json").write_text(json.dumps(told))
    return folder


def bench_of(run: Path, file: Path, *, first: str | None = None, timed: bool = True) -> Path:
    """What `bench WHOLE RUN --json` prints: 1.5 and 1.3 times as fast."""
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    rows[0]["sha256"] = first or rows[0]["sha256"]
    for name, value in (("prefill_ratio", 1.5), ("decode_ratio", 1.3)) if timed else ():
        rows[1] |= {name: value, f"{name}_low": value, f"{name}_high": value}
    file.write_text(json.dumps({"rows": rows}))
    return file
