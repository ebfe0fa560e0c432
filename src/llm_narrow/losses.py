"""The next-token loss, without ever holding the logits of a whole batch.

At a vocabulary of 49,152 the float32 logits of 4 x 512 tokens are 400 MB, and their gradient as
much again. Here the output head runs on a few hundred positions at a time, and the gradient of
each piece is taken at once, so that only (positions, hidden) survives to the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

CHUNK = 512  # positions whose logits exist at one time
LEARNT = 256  # the same where their gradients exist as well, about as large again twice
FROZEN = 128  # the same where the head learns nothing: no gradient as large as it is summed up

Loss = Callable[[Any, Tensor], Tensor]  # model, tokens (batch, length) -> sum over targets, ()
Piece = Callable[[Tensor, slice], Tensor]  # logits (positions, vocabulary), where -> sum, ()


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The map from final hidden states (…, hidden) to logits (…, vocabulary)."""
    layer = model.get_output_embeddings()

    def head(hidden: Tensor) -> Tensor:
        return capped(model, layer(hidden))

    return head


def capped(model: Any, logits: Tensor) -> Tensor:
    """What some architectures do to the logits after the output layer.

    Gemma bounds them, Cohere multiplies and Granite divides them by a number.
    """
    if (times := getattr(model, "logit_scale", None)) is not None:
        logits = logits * times
    if (by := getattr(model.config, "logits_scaling", None)) is not None:
        logits = logits / by
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over positions; each piece is differentiated going forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, model: Any, piece: Piece, names: list[str], *params: Tensor
    ) -> Tensor:
        device = hidden.device.type
        layer = model.get_output_embeddings()
        # Under autocast every piece would cast the weight anew, and its gradient back.
        narrow = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if narrow else params[0].dtype
        own = {
            name: p.detach().to(dtype).requires_grad_(p.requires_grad)
            for name, p in zip(names, params, strict=True)
        }
        learned = [p for p in own.values() if p.requires_grad]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in learned]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        with torch.autocast(device, enabled=False):
            # Few positions cost time only where each piece adds a gradient of the head.
            for at in _slices(len(hidden), LEARNT if learned else FROZEN):
                with torch.enable_grad():
                    h = hidden[at].detach().to(dtype).requires_grad_()
                    logits = capped(model, functional_call(layer, own, (h,)))
                    loss = piece(logits, at)
                    del logits
                    grad_h, *grads = torch.autograd.grad(loss, [h, *learned])
                total += loss.detach()
                grad_hidden[at] = grad_h
                for s, g in zip(sums, grads, strict=True):
                    s += g
                del loss, grads
        ctx.grads = [grad_hidden, *sums]
        ctx.learns = [p.requires_grad for p in params]
        ctx.dtypes = [p.dtype for p in params]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place and let go of, as each may be as large as the embedding: once only.
        of_hidden = ctx.grads.pop(0).mul_(grad)
        of_params = [
            ctx.grads.pop(0).mul_(grad).to(dtype) if learns else None
            for learns, dtype in zip(ctx.learns, ctx.dtypes, strict=True)
        ]
        return (of_hidden, None, None, None, *of_params)


def chunked_loss(model: Any, hidden: Tensor, piece: Piece) -> Tensor:
    """The sum of `piece` over the positions of `hidden` (positions, hidden), float32 ().

    `piece` is given the logits of a few hundred positions, in the precision that they were
    computed in, and where these are; it gives a sum over them. It is called going forward, once.
    """
    if not torch.is_grad_enabled():
        head = output_head(model)
        sums = [piece(head(hidden[at]), at) for at in _slices(len(hidden), CHUNK)]
        return torch.stack(sums).sum()
    named = dict(model.get_output_embeddings().named_parameters())
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, model, piece, list(named), *named.values()
    )
    return loss


def language_loss(model: Any, tokens: Tensor) -> Tensor:
    """Sum over all positions but the first of the next-token cross-entropy, in nats, float32 ().

    `tokens` is (batch, length) int64. Equal to the plain loss on `model(tokens).logits`.
    """
    targets = tokens[:, 1:].reshape(-1)

    def piece(logits: Tensor, at: slice) -> Tensor:
        return F.cross_entropy(logits.float(), targets[at], reduction="sum")

    return chunked_loss(model, hidden_states(model, tokens), piece)


def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """What the output head is given for each target, (batch * (length - 1), hidden)."""
    hidden: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def _slices(positions: int, most: int) -> list[slice]:
    return [slice(at, min(at + most, positions)) for at in range(0, positions, most)]
