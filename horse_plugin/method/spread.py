"""How residuals are spread over the layers (Eq. 5, 6): one function a rule, found by its name.

To add a rule, decorate a function with :func:`spread_rule`; the YAML's ``spread`` then takes its
name. A rule gets the residuals R_1 … R_T, n×d' each, the keys H_1 … H_T, n×d, the gradients
∇G_1 … ∇G_T, n×d', and the strength s; it returns R'_1 … R'_T.
"""

from collections.abc import Callable

import torch

from horse_plugin.distributed import sum_over_ranks

Tensors = list[torch.Tensor]
SPREADS: dict[str, Callable[..., Tensors]] = {}


def spread_rule(name: str):
    """Register the decorated function as the spread of that name."""

    def register(rule: Callable[..., Tensors]) -> Callable[..., Tensors]:
        SPREADS[name] = rule
        return rule

    return register


@spread_rule("orthogonal")
def orthogonal(residuals: Tensors, keys: Tensors, grads: Tensors, strength) -> Tensors:
    """Eq. 6: R'_l = R_l − s · ⟨R_l, R_{l−1}⟩/‖R_{l−1}‖² · R_{l−1}.

    R_{l−1} is the residual below as it was before its own projection, and the layer below is the
    nearest one of the same output width.
    """
    return [
        project_out(r, below[-1], strength) if (below := _of_same_width(residuals[:l], r)) else r
        for l, r in enumerate(residuals)
    ]


@spread_rule("gram_schmidt")
def gram_schmidt(residuals: Tensors, keys: Tensors, grads: Tensors, strength) -> Tensors:
    """Project out every layer below, as it is after its own projection."""
    projected = []
    for r in residuals:
        for direction in _of_same_width(projected, r):
            r = project_out(r, direction, strength)
        projected.append(r)
    return projected


@spread_rule("released")
def released(residuals: Tensors, keys: Tensors, grads: Tensors, strength) -> Tensors:
    """The projection of the authors' released code, which differs from Eq. 6.

    It takes the component along the raw gradient ∇G_{l−1} of the nearest layer below out of R_l.
    """
    return [
        project_out(r, below[-1].to(r), strength) if (below := _of_same_width(grads[:l], r)) else r
        for l, r in enumerate(residuals)
    ]


@spread_rule("uniform")
def uniform(residuals: Tensors, keys: Tensors, grads: Tensors, strength) -> Tensors:
    """R'_l = R_l, as in MALMEN."""
    return list(residuals)


@spread_rule("decay")
def decay(residuals: Tensors, keys: Tensors, grads: Tensors, strength) -> Tensors:
    """Eq. 5: R'_l = R_l / (T − l + 1)."""
    n_layers = len(residuals)
    return [r / (n_layers - i) for i, r in enumerate(residuals)]  # T − l + 1 with l = i + 1


def project_out(residual: torch.Tensor, direction: torch.Tensor, strength) -> torch.Tensor:
    """Return R − s · ⟨R, D⟩/‖D‖² · D with the inner product of whole matrices; R where D is zero.

    Args:
        residual, direction: R and D, n×d' each.
        strength: s; 1 removes the component, 0 leaves it.
    """
    products = (direction * direction).sum(), (residual * direction).sum()
    norm2, inner = sum_over_ranks(torch.stack(products))
    share = inner / torch.where(norm2 > 0, norm2, 1)
    return residual - strength * share * direction


def _of_same_width(below: Tensors, residual: torch.Tensor) -> Tensors:
    """Return the residuals that have an inner product with this one."""
    return [r for r in below if r.shape == residual.shape]
