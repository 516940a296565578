"""Losses per answer token, the terms of Eq. 7: one function a loss, found by its name.

To add a loss, decorate a function with :func:`token_loss`; the YAML's ``loc_loss`` then takes its
name. A loss gets

    logits      n×vocabulary, of the edited model, in any precision
    labels      n, the answer tokens
    reference   n×vocabulary log-probabilities of the unedited model, or None if it needs none
    dtype       the precision to compute in

and returns n losses in nats.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

AT_ONCE = 2**22  # logits that are computed with at a time: 16 MB of float32


def some_rows(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield some rows of logits at a time, and the same rows of others, to compute with them."""
    rows = max(1, AT_ONCE // logits.shape[1])
    return zip(*(t.split(rows) for t in (logits, *others)), strict=True)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest token of each row; ``argmax`` is slow in bf16 on a CPU."""
    return logits.max(-1).indices


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
    """−log p of each label, which is a token and never ``UNKNOWN``."""
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
    """Cross-entropy that keeps nothing but the logits for the backward pass.

    torch's own keeps several n×vocabulary tensors in ``dtype``, which is most of the memory of a
    pass. Here the gradient, p − 1 at the label and p elsewhere, is computed of some rows at a time.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype):
        ctx.save_for_backward(logits, labels)
        ctx.dtype = dtype
        parts = some_rows(logits, labels)
        nats = [F.cross_entropy(x.to(dtype), y, reduction="none") for x, y in parts]
        return torch.cat(nats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for into, x, y, g in some_rows(gradient, logits, labels, grad):
            p = x.softmax(-1, dtype=ctx.dtype)
            p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1))
            into.copy_(p.mul_(g[:, None]))
        return gradient, None, None
