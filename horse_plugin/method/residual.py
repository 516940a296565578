"""Residuals from keys and gradients (Eq. 4), and their spread over layers (Eq. 5, 6).

Tensors only. Rows are answer tokens; the layers come as a list from the lowest to the highest.
"""

import torch

from horse_plugin.distributed import total


def coefficients(keys: torch.Tensor, pseudo_keys: torch.Tensor, eta) -> torch.Tensor:
    """c_i = −η Σ_j H_ij H̃_ij (Sec. 3.3), n×1."""
    return -eta * (keys * pseudo_keys).sum(-1, keepdim=True)


def residual(keys, pseudo_keys, pseudo_grads, eta) -> torch.Tensor:
    """R = c ⊙ ∇G̃ (Eq. 4), n×d', token by token."""
    return coefficients(keys, pseudo_keys, eta) * pseudo_grads


def project_out(residual: torch.Tensor, direction: torch.Tensor, strength) -> torch.Tensor:
    """R − s · ⟨R, D⟩/‖D‖² · D with the whole-matrix inner product; R itself where D is zero."""
    products = (direction * direction).sum(), (residual * direction).sum()
    norm2, inner = total(torch.stack(products))
    share = inner / torch.where(norm2 > 0, norm2, 1)
    return residual - strength * share * direction


def spread(residuals: list[torch.Tensor], kind: str, strength=1.0) -> list[torch.Tensor]:
    """Spread the residuals over the layers.

    Args:
        residuals: R_1 … R_T, from the lowest edited layer to the highest.
        kind: ``orthogonal``: each R_l loses its component along R_{l−1} as it was before its own
            projection (Eq. 6); the layer below is the nearest of the same output width.
            ``gram_schmidt``: along every orthogonalised predecessor.
            ``decay``: R_l / (T − l + 1) (Eq. 5). ``uniform``: unchanged (MALMEN).
        strength: 1 removes the component (Eq. 6 as printed), 0 leaves it; used by the first two.
    """
    if kind == "uniform":
        return list(residuals)
    if kind == "decay":
        last = len(residuals)
        return [r / (last - i) for i, r in enumerate(residuals)]  # T − l + 1 with l = i + 1
    if kind == "orthogonal":
        return [
            project_out(r, below[-1], strength) if (below := _comparable(residuals[:l], r)) else r
            for l, r in enumerate(residuals)
        ]
    if kind == "gram_schmidt":
        done = []
        for r in residuals:
            for direction in _comparable(done, r):
                r = project_out(r, direction, strength)
            done.append(r)
        return done
    raise ValueError(f"unknown spread {kind!r}")


def _comparable(below: list[torch.Tensor], residual: torch.Tensor) -> list[torch.Tensor]:
    """The residuals that have an inner product with this one: modules of its output width."""
    return [r for r in below if r.shape == residual.shape]
