"""The ridge closed form of Eq. 2, in its dual or primal form, by Cholesky.

Rows are answer tokens here, columns features: the transpose of the paper's notation.
"""

import warnings

import torch

from horse_plugin import distributed as parallel
from horse_plugin.errors import HALF_HINT, HorseError

CHUNK = 8192  # tokens


class Ridge:
    """Solves with (HᵀH + μI)⁻¹ for one module's keys H, factorised once.

    With fewer tokens than features the n×n dual is factorised, by the push-through identity
    (HᵀH + μI)⁻¹Hᵀ = Hᵀ(HHᵀ + μI)⁻¹; otherwise the d×d primal. Of several processes each gives its
    own rows of H and R and gets those of ∂L/∂R; the dual gathers H and R, the primal sums HᵀH and
    HᵀR.

    Args:
        keys: H, n×d.
        mu: μ = e^λ > 0, a number or a tensor with one element.
    """

    def __init__(self, keys: torch.Tensor, mu):
        self.mu = torch.as_tensor(mu, dtype=keys.dtype, device=keys.device)
        n, self._own = parallel.rows(len(keys))
        self.dual = n < keys.shape[1]
        self.keys = parallel.gather(keys) if self.dual else keys
        self._factor = self._cholesky()

    def factors(self, residual: torch.Tensor) -> torch.Tensor:
        """Z, n×d', with ΔW = HᵀZ for ``keys``; only where ``dual`` holds."""
        return self._inverse(parallel.gather(residual))

    def shift(self, residual: torch.Tensor) -> torch.Tensor:
        """ΔW = (HᵀH + μI)⁻¹HᵀR, d×d' (Eq. 2)."""
        if self.dual:
            return self.keys.T @ self.factors(residual)
        return self._inverse(parallel.total(self.keys.T @ residual))

    def residual_grad(self, weight_grad: torch.Tensor) -> torch.Tensor:
        """∂L/∂R = H(HᵀH + μI)⁻¹g, n×d', for g = ∂L/∂W, d×d' (the trace in Eq. 7)."""
        if self.dual:
            return self._inverse(self.keys @ weight_grad)[self._own]
        return self.keys @ self._inverse(weight_grad)

    def lamda_grad(self, weight_grad: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """∂L/∂λ = −e^λ⟨(HᵀH + μI)⁻¹g, ΔW⟩ for μ = e^λ, a scalar.

        In the dual, μ(HᵀH + μI)⁻¹g = g − Hᵀ(HHᵀ + μI)⁻¹Hg.
        """
        if self.dual:
            scaled = weight_grad - self.keys.T @ self._inverse(self.keys @ weight_grad)
        else:
            scaled = self.mu * self._inverse(weight_grad)
        return -(scaled * shift).sum()

    def _inverse(self, right: torch.Tensor) -> torch.Tensor:
        """(Gram + μI)⁻¹ · right, in the factor's precision, returned in that of ``right``."""
        return torch.cholesky_solve(right.to(self._factor.dtype), self._factor).to(right.dtype)

    def _cholesky(self) -> torch.Tensor:
        """Lower Cholesky factor of Gram + μI.

        In the keys' precision if it will do; else in float64, with a growing jitter if even that
        fails, and a warning. The squared ratio of the factor's diagonal bounds the condition
        number from below: times the rounding error, it says when float32 will not do.

        Raises:
            HorseError: the Gram matrix holds NaN or infinity, or stays singular.
        """
        gram = self._gram(self.keys.dtype)
        if not gram.isfinite().all():
            raise HorseError(f"the Gram matrix of the keys is not finite. {HALF_HINT}")
        factor, failed = torch.linalg.cholesky_ex(gram + self.mu * torch.eye(len(gram)).to(gram))
        diagonal = factor.diagonal()
        error = torch.finfo(gram.dtype).eps * (diagonal.max() / diagonal.min()).square()
        rough = torch.tensor(bool(failed or error >= 1e-3), dtype=torch.float32)
        if not parallel.total(rough):  # the rounding of several machines might differ
            return factor
        gram = self._gram(torch.float64)
        eye = torch.eye(len(gram)).to(gram)
        for jitter in (0, 1e-12, 1e-9, 1e-6):
            added = self.mu.double() + jitter * gram.diagonal().mean()
            factor, failed = torch.linalg.cholesky_ex(gram + added * eye)
            if not failed:
                extra = f" with {jitter:g} of its mean diagonal added" if jitter else ""
                warnings.warn(f"ridge: ill-conditioned, solved in float64{extra}", stacklevel=4)
                return factor
        raise HorseError("the ridge system stays singular in float64; raise lambda.")

    def _gram(self, dtype: torch.dtype) -> torch.Tensor:
        """Gram matrix in that precision; of many tokens chunk by chunk, so that no whole copy of
        the keys is made."""
        if self.dual:
            keys = self.keys.to(dtype)
            return keys @ keys.T
        chunks = (c.to(dtype) for c in self.keys.split(CHUNK))
        return parallel.total(sum(rows.T @ rows for rows in chunks))
