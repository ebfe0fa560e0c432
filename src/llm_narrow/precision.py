"""Weights in another precision. Buffers stay as they are.

`model.to(torch.bfloat16)` rounds the frequencies of rotary embeddings too, an error in the angle
that grows with the position.
"""

import copy
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
