"""LayerNorms over fewer channels than they take the mean of.

A LayerNorm subtracts the mean over all channels of the residual stream and divides by their spread.
Of a model whose writers put zeros into some of them, the mean is the sum over the others divided by
the number of all. A norm that remembers this number computes what the whole model does.
"""

from typing import Any

import torch
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps")  # what norm modules call theirs
FIXED = {"OlmoLayerNorm": 1e-5}  # of those that call it nothing
OVER_ONE = ("NemotronLayerNorm1P",)  # those that keep their weight as what it is above 1


class WideNorm(nn.Module):
    """The LayerNorm of a stream of `full` channels, of which those that are missing are zero.

    Takes and gives (..., channels left). Statistics are float32, as in torch's own. `above` is
    added to the weight, for norms that keep theirs as a difference.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: Any, full: int) -> None:
        """Take over the parameters of a norm that are cut already, and its epsilon."""
        super().__init__()
        self.full = full
        self.eps = epsilon(norm)
        self.above = 1.0 if type(norm).__name__ in OVER_ONE else 0.0
        self.register_parameter("weight", getattr(norm, "weight", None))
        self.register_parameter("bias", getattr(norm, "bias", None))

    def forward(self, hidden: Tensor) -> Tensor:
        """The normed hidden states, in the type that they came in."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        left = wide.shape[-1]
        mean = wide.sum(-1, keepdim=True) / self.full
        centred = wide - mean
        squares = centred.square().sum(-1, keepdim=True) + (self.full - left) * mean.square()
        found = centred * torch.rsqrt(squares / self.full + self.eps)
        if self.weight is not None:
            found = found * (self.weight.to(wide.dtype) + self.above)
        if self.bias is not None:
            found = found + self.bias.to(wide.dtype)
        return found.to(hidden.dtype)

    def extra_repr(self) -> str:
        """What printing the model shows of it."""
        return f"{self.full}, eps={self.eps}"


def epsilon(module: Any) -> float:
    """What a norm adds to the variance, by any of its names. KeyError for a norm unknown here."""
    name = epsilon_name(module)
    return FIXED[type(module).__name__] if name is None else float(getattr(module, name))


def epsilon_name(module: Any) -> str | None:
    """The attribute that a norm keeps its epsilon in; None of what has none."""
    return next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)


def takes_mean(module: Any) -> bool:
    """Whether a module is a norm that subtracts the mean, stock or ours."""
    name = type(module).__name__
    return isinstance(module, WideNorm) or ("LayerNorm" in name and "RMS" not in name)


def over(module: Any, channels: int) -> bool:
    """Whether it is such a norm of one row of so many channels."""
    weight = getattr(module, "weight", None)
    shape = getattr(module, "normalized_shape", None) if weight is None else weight.shape
    return takes_mean(module) and shape is not None and tuple(shape) == (channels,)
