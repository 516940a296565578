"""The metric C̄ of the ridge term: what a change of a weight costs, direction by direction.

Eq. 1 charges ‖ΔW‖², as if ordinary text used every direction of the key space alike. What ordinary
text feels of ΔW is tr(ΔWᵀCΔW), where C = E[k kᵀ] is the second moment of an edit module's keys on
such text, and Eq. 2 becomes

    min ‖HΔW − R‖² + e^λ tr(ΔWᵀC̄ΔW),    C̄ = (1−ρ) C/mean(diag C) + ρI.

MEMIT (Meng et al. 2023) has the same C in its closed form. C̄ = I is the paper's own ridge term.
"""

from itertools import pairwise

import torch

from horse_plugin.errors import HorseError
from horse_plugin.method.finite import all_finite

STRIPES = 8  # of W, each of which leaves its own zeros out: 9 of 16 products are left


def metric_of(moment: torch.Tensor, rho: float) -> torch.Tensor:
    """Return C̄ = (1−ρ) C/mean(diag C) + ρI, d×d, in float64.

    Args:
        moment: C, d×d, the second moment of keys, or a sum Σ k kᵀ of them: its scale falls out.
        rho: ρ, from above 0 to 1: the share of directions that ordinary text does not use.

    Raises:
        HorseError: C is zero or not finite.
    """
    moment = moment.double()
    scale = moment.diagonal().mean()
    if not (scale > 0 and all_finite(moment)):
        raise HorseError("the second moment of the keys on ordinary text is zero or not finite.")
    metric = (1 - rho) / scale * moment
    metric.diagonal().add_(rho)
    return metric


def inverse_root(metric: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular W = L⁻ᵀ with W Wᵀ = C̄⁻¹, d×d, where C̄ = L Lᵀ.

    In the coordinates H' = HW and ΔW = W·ΔW' the metric is I, and Eq. 2 is the paper's.

    Raises:
        HorseError: C̄ is not positive definite.
    """
    try:
        lower = torch.linalg.cholesky(metric)
    except torch.linalg.LinAlgError:
        raise HorseError("the metric has no inverse: preserve_rho is too small.") from None
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).T


def times_root(x: torch.Tensor, root: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Return xW, or xWᵀ, n×d, without most of the products with the zeros below W's diagonal.

    Args:
        x: n×d.
        root: W, d×d, as :func:`inverse_root` makes it.
        transposed: whether to return xWᵀ.
    """
    found = torch.empty_like(x)
    for a, b in pairwise(len(root) * i // STRIPES for i in range(STRIPES + 1)):
        if transposed:
            torch.mm(x[:, a:], root[a:b, a:].T, out=found[:, a:b])
        else:
            torch.mm(x[:, :b], root[:b, a:b], out=found[:, a:b])
    return found


def whitened(shift: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """Return LᵀΔW = W⁻¹ΔW, d×d', whose squared length is tr(ΔWᵀC̄ΔW), with C̄ = L Lᵀ.

    Args:
        shift: ΔW, d×d'.
        root: W, d×d, as :func:`inverse_root` makes it; None is C̄ = I.
    """
    if root is None:
        return shift
    return torch.linalg.solve_triangular(root.to(shift), shift, upper=True)
