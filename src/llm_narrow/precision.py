"""Weights in another precision. Buffers stay as they are.

`model.to(torch.bfloat16)` rounds the frequencies of rotary embeddings too, an error in the angle
that grows with the position.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def copied(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy of the model with parameters in `dtype` (as they are, if None)."""
    twin = copy.deepcopy(model)
    if dtype is not None:
        for p in twin.parameters():
            p.data = p.data.to(dtype)
    return twin


def widened(folder: Path, dtype: str) -> str:
    """What to tell where the weights take more bytes in `dtype` than in their folder, or ""."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = str(config.get("dtype") or config.get("torch_dtype") or dtype).removeprefix("torch.")
    if dtype != "float32" or stored not in ("bfloat16", "float16"):
        return ""
    return (
        f"The weights are {stored} in their file and are computed, counted and written as float32, "
        "in twice the bytes."
    )
