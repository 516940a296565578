"""The residual of one edit module from its keys and pseudo gradients (Eq. 4)."""

import torch


def coefficients(keys: torch.Tensor, pseudo_keys: torch.Tensor, eta) -> torch.Tensor:
    """Return c, n×1, with c_i = −η Σ_j H_ij H̃_ij (Sec. 3.3).

    Args:
        keys, pseudo_keys: H and H̃, n×d each.
        eta: η, a number or a scalar tensor.
    """
    return -eta * (keys * pseudo_keys).sum(-1, keepdim=True)


def residual(
    keys: torch.Tensor, pseudo_keys: torch.Tensor, pseudo_grads: torch.Tensor, eta
) -> torch.Tensor:
    """Return R = c ⊙ ∇G̃, n×d' (Eq. 4): every token has its own coefficient.

    Args:
        keys, pseudo_keys: H and H̃, n×d each.
        pseudo_grads: ∇G̃, n×d'.
        eta: η, a number or a scalar tensor.
    """
    return coefficients(keys, pseudo_keys, eta) * pseudo_grads


def capped(residuals: torch.Tensor, largest) -> torch.Tensor:
    """Return the residuals, n×d', with rows that are longer shortened to the length ``largest``.

    A gradient tells how an answer changes for a small step. Where it is steep, the step that Eq. 4
    asks for is so long that the gradient says nothing about its end.

    Args:
        largest: a length, a number or a scalar tensor; infinity is no limit.
    """
    norms = residuals.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(residuals.dtype).tiny)
    return residuals * (largest / norms).clamp(max=1)
