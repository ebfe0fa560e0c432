"""What the scripts of this folder share: options, timing, and saving with what it cost.

Runs inside the peers' environment too, so it imports nothing but torch, transformers and the
standard library.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def options(settings: Sequence[str]) -> argparse.Namespace:
    """What to cut, and how far."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of the whole model")
    parser.add_argument("--calibration", type=Path, required=True, help="safetensors: tokens")
    parser.add_argument("--setting", choices=settings, required=True)
    parser.add_argument("--keep", type=int, required=True, help="MLP neurons left in each layer")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="passes under bfloat16 autocast")
    parser.add_argument("--shared", type=Path, help="folder for what several settings need")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def tokens_of(file: Path) -> torch.Tensor:
    """The calibration blocks, (blocks, length) int64."""
    return load_file(file)["tokens"].long()


def model_of(folder: Path) -> Any:
    """The whole model in float32, by stock transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def autocast(wanted: bool) -> Any:
    """bfloat16 passes with float32 weights and weight gradients, which the peers sum up."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted)


def peak_bytes() -> int:
    """The most memory that this process has had, from /proc as ru_maxrss begins with a parent's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds of the block into `seconds`."""
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)


def save(
    model: Any, out: Path, *, tool: str, seconds: dict[str, float], peak: int,
    write: Callable[[Path], object] | None = None,
) -> None:  # fmt: skip
    """The pruned model as a Hugging Face folder, and facts.json beside it."""
    out.mkdir(parents=True, exist_ok=True)
    (write or model.save_pretrained)(out / "model")
    facts = {
        "version": version(tool),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "seconds": seconds,
        "peak_bytes": peak,
    }
    (out / "facts.json").write_text(json.dumps(facts))
