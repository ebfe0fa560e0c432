"""The next-token loss, without ever holding the logits of a whole batch.

At a vocabulary of 49,152 the float32 logits of 4 x 512 tokens are 400 MB, and their gradient as
much again. Here the output head runs on a few hundred positions at a time, and the gradient of
each piece is taken at once, so that only (positions, hidden) survives to the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 512  # positions whose logits exist at one time


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The map from final hidden states (…, hidden) to logits (…, vocabulary)."""
    layer = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = layer(hidden)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies over positions; each piece is differentiated going forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        *params: Tensor,
    ) -> Tensor:
        learned = [p for p in params if p.requires_grad]
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in learned]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = []
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                loss = F.cross_entropy(head(h).float(), t, reduction="sum")
                grad_h, *grad_p = torch.autograd.grad(loss, [h, *learned])
            total += loss.detach()
            grads.append(grad_h)
            for s, g in zip(sums, grad_p, strict=True):
                s += g
        ctx.grad_hidden = torch.cat(grads)
        ctx.grad_params = iter(sums)
        ctx.learns = [p.requires_grad for p in params]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_params = [next(ctx.grad_params) * grad if learns else None for learns in ctx.learns]
        return (ctx.grad_hidden * grad, None, None, *of_params)


def language_loss(model: Any, tokens: Tensor) -> Tensor:
    """Sum over all positions but the first of the next-token cross-entropy, in nats, float32 ().

    `tokens` is (batch, length) int64. Equal to the plain loss on `model(tokens).logits`.
    """
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = tokens[:, 1:].reshape(-1)
    head = output_head(model)
    if not torch.is_grad_enabled():
        pieces = zip(flat.split(CHUNK), targets.split(CHUNK), strict=True)
        losses = [F.cross_entropy(head(h).float(), t, reduction="sum") for h, t in pieces]
        return torch.stack(losses).sum()
    params = tuple(model.get_output_embeddings().parameters())
    loss: Tensor = _ChunkedLoss.apply(flat, targets, head, *params)  # type: ignore[no-untyped-call]
    return loss
