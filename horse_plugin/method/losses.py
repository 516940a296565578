"""Losses per answer token, the terms of Eq. 7: one function a loss, found by its name.

To add a loss, decorate a function with :func:`token_loss`; the YAML's ``loc_loss`` then takes its
name. A loss gets

    logits      n×vocabulary, of the edited model, in any precision
    labels      n, the answer tokens
    reference   n×vocabulary log-probabilities of the unedited model, or None if it needs none
    dtype       the precision to compute in

and returns n losses in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TokenLoss:
    """A loss, and whether it compares with the unedited model's log-probabilities."""

    compute: Callable[..., torch.Tensor]
    needs_reference: bool


LOSSES: dict[str, TokenLoss] = {}


def token_loss(name: str, needs_reference: bool = False):
    """Register the decorated function as the loss of that name."""

    def register(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        LOSSES[name] = TokenLoss(compute, needs_reference)
        return compute

    return register


@token_loss("ce")
def cross_entropy(logits, labels, reference, dtype) -> torch.Tensor:
    """−log p of each label."""
    return _CrossEntropy.apply(logits, labels, dtype)


@token_loss("kl", needs_reference=True)
def kl_divergence(logits, labels, reference, dtype) -> torch.Tensor:
    """KL(unedited ‖ edited) at each position; the labels do not matter."""
    log_p = logits.to(dtype).log_softmax(-1)
    return F.kl_div(log_p, reference, log_target=True, reduction="none").sum(-1)


@token_loss("ce+kl", needs_reference=True)
def both(logits, labels, reference, dtype) -> torch.Tensor:
    """The sum of the two: teach the label, and leave the rest as it was."""
    return cross_entropy(logits, labels, None, dtype) + kl_divergence(
        logits, labels, reference, dtype
    )


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps one n×vocabulary tensor for the backward pass.

    torch's own keeps several, which is most of the memory of a training step. This one turns the
    tensor that it keeps into the gradient.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype):
        log_p = logits.log_softmax(-1, dtype=dtype)
        ctx.save_for_backward(log_p, labels)
        ctx.dtype = logits.dtype
        return -log_p.gather(1, labels[:, None])[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        gradient, labels = ctx.saved_tensors
        gradient.exp_()
        gradient.scatter_add_(1, labels[:, None], -torch.ones_like(grad)[:, None])
        return gradient.mul_(grad[:, None]).to(ctx.dtype), None, None
