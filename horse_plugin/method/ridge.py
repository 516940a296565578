"""The ridge closed form ΔW = (HᵀH + e^λ C̄)⁻¹ Hᵀ R (Eq. 2), and its derivatives (Eq. 7).

C̄ is the metric of :mod:`horse_plugin.method.metric`; in the paper it is I. With W Wᵀ = C̄⁻¹ and
H' = HW the system to factorise is that of the paper, H'ᵀH' + e^λ I. It is solved by Cholesky, in
the dual form with few tokens and in the primal form with many.
"""

import functools
import warnings
from collections.abc import Callable

import torch

from horse_plugin.distributed import gather_rows, row_range, sum_over_ranks
from horse_plugin.errors import HALF_PRECISION_HINT, HorseError
from horse_plugin.method.finite import all_finite
from horse_plugin.method.metric import times_root, whitened

CHUNK = 8192  # rows of H in one product
COLUMNS = 1024  # of an inverse that is not kept
HALVES = (torch.bfloat16, torch.float16)
SUMS_IN_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")  # of products in half precision: torch 2.8
# Compute capabilities of GPUs for data centres: P100, V100, A100, H100 and H200, B200.
FAST_DOUBLES = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


class Ridge:
    """Solves with (HᵀH + μC̄)⁻¹ for the keys H of one edit module; the factorisation is done once.

    With fewer tokens than features the n×n dual is factorised, by the push-through identity
    (HᵀH + μC̄)⁻¹Hᵀ = C̄⁻¹Hᵀ(HC̄⁻¹Hᵀ + μI)⁻¹; otherwise the d×d primal. Of several processes each
    gives the rows of H and R that it holds, and gets those of ∂L/∂R: the dual gathers H and R, the
    primal sums HᵀH and HᵀR.

    Args:
        keys: H, n×d. In half precision it is computed with in float32, or in that of ``mu``.
        mu: μ = e^λ > 0, a number, or a tensor with one element where the solving is to be done.
        root: W, d×d upper triangular with W Wᵀ = C̄⁻¹; None is C̄ = I.

    Raises:
        HorseError: H is not finite, or the system stays singular in float64.
    """

    def __init__(self, keys: torch.Tensor, mu, root: torch.Tensor | None = None):
        dtype = torch.promote_types(keys.dtype, mu.dtype if torch.is_tensor(mu) else torch.float32)
        own = keys.to(mu.device) if torch.is_tensor(mu) else keys
        keys = own.to(dtype)
        self.mu = torch.as_tensor(mu, dtype=dtype, device=keys.device)
        self.root = None if root is None else root.to(keys)
        self.n, self._local_rows = row_range(len(keys))
        self.dual = self.n < keys.shape[1]
        self.keys = gather_rows(keys) if self.dual else keys  # H
        self._keys = self.keys if root is None else times_root(self.keys, self.root)  # H'
        self._added = self._keys if self.dual or root is not None else own  # the same numbers
        self._factor = self._cholesky(self._gram)

    @classmethod
    def of_sum(cls, gram: torch.Tensor, n: int, mu, root: torch.Tensor | None = None) -> "Ridge":
        """Return the primal of n keys whose sum HᵀH, d×d, is known; what needs H it has not.

        Args:
            mu, root: as in :class:`Ridge`.
        """
        ridge = cls.__new__(cls)
        ridge.mu, ridge.root = torch.as_tensor(mu).to(gram), None if root is None else root.to(gram)
        ridge.n, ridge.dual = n, False
        gram = gram if root is None else ridge.root.T @ gram @ ridge.root
        ridge._factor = ridge._cholesky(lambda dtype: gram.to(dtype, copy=True))
        return ridge

    def shift(self, residual: torch.Tensor) -> torch.Tensor:
        """Return ΔW = (HᵀH + μC̄)⁻¹HᵀR, d×d' (Eq. 2).

        Args:
            residual: R, n×d'.
        """
        if self.dual:
            return self._weighted_keys.T @ self._inverse(gather_rows(residual))
        return self._out(self._inverse(sum_over_ranks(self._keys.T @ residual)))

    def shift_of(self, right: torch.Tensor) -> torch.Tensor:
        """Return ΔW, d×d', from the sum HᵀR, d×d'."""
        return self._out(self._inverse(right if self.root is None else self.root.T @ right))

    def crowding(self) -> tuple[float, float]:
        """Return the share of its residual that a row moves by itself, and what it would alone.

        Both are means from 0 to 1. The first is the leverage tr H(HᵀH + μC̄)⁻¹Hᵀ/n, which falls as
        keys crowd in few directions; the second is m/(m + μ), where m is the mean of hC̄⁻¹hᵀ.
        """
        factor, size = self._factor, len(self._factor)
        traces = torch.zeros(2, dtype=factor.dtype, device=factor.device)  # of inverse and system
        for first in range(0, size, COLUMNS):
            columns = factor.new_zeros(size, min(COLUMNS, size - first))
            columns.diagonal(-first).fill_(1)
            inverse = torch.linalg.solve_triangular(factor, columns, upper=False)
            traces[0] += inverse.square().sum()
            traces[1] += factor[:, first : first + COLUMNS].square().sum()
        share = (size - self.mu * traces[0]) / self.n
        mean = (traces[1] - size * self.mu) / self.n  # of the Gram's diagonal
        return share.item(), (mean / (mean + self.mu)).item()

    def anchored(self, shift: torch.Tensor) -> torch.Tensor:
        """Return μ(HᵀH + μC̄)⁻¹C̄D, d×d': how far the ridge term pulls D back where it may.

        It is D − C̄⁻¹Hᵀ(HC̄⁻¹Hᵀ + μI)⁻¹HD in the dual, and μW(H'ᵀH' + μI)⁻¹W⁻¹D in the primal.

        Args:
            shift: D, d×d'.
        """
        if self.dual:
            return shift - self._weighted_keys.T @ self._inverse(self.keys @ shift)
        return self._out(self.mu * self._inverse(whitened(shift, self.root)))

    def smallest_form(self, residual: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ΔW as ``{"shift": ΔW}``, or as factors if they hold fewer numbers.

        The factors are ``{"keys": HC̄⁻¹, "factors": Z}``, n×d and n×d', with ΔW = C̄⁻¹HᵀZ.

        Args:
            residual: R, n×d'.
        """
        (n, d), d_out = self.keys.shape, residual.shape[1]
        if self.dual and n * (d + d_out) < d * d_out:
            factors = self._inverse(gather_rows(residual)).contiguous()  # as they are read again
            return {"keys": self._weighted_keys, "factors": factors}
        return {"shift": self.shift(residual)}

    def gradients(
        self, weight_grad: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ∂L/∂R, n×d', and ∂L/∂λ for μ = e^λ, a scalar (Eq. 7), of one solve.

        ∂L/∂R = H(HᵀH + μC̄)⁻¹g is the trace in Eq. 7, and ∂L/∂λ = −e^λ⟨C̄(HᵀH + μC̄)⁻¹g, ΔW⟩. In the
        dual, μC̄(HᵀH + μC̄)⁻¹g = g − Hᵀ(HC̄⁻¹Hᵀ + μI)⁻¹HC̄⁻¹g. In the primal, it is
        Lμ(H'ᵀH' + μI)⁻¹Wᵀg, and LᵀΔW = W⁻¹ΔW.

        Args:
            weight_grad: g = ∂L/∂W at the edited weight, d×d'.
            shift: ΔW, d×d'.
        """
        if self.dual:
            y = self._inverse(self._weighted_keys @ weight_grad)
            return y[self._local_rows], -((weight_grad - self.keys.T @ y) * shift).sum()
        y = self._inverse(weight_grad if self.root is None else self.root.T @ weight_grad)
        return self._keys @ y, -(self.mu * y * whitened(shift, self.root)).sum()

    @functools.cached_property
    def _weighted_keys(self) -> torch.Tensor:
        """HC̄⁻¹ = H'Wᵀ, n×d."""
        if self.root is None:
            return self.keys
        return times_root(self._keys, self.root, transposed=True)

    def _out(self, solution: torch.Tensor) -> torch.Tensor:
        """Return ΔW = W·ΔW' from the solution in the coordinates of the metric."""
        return solution if self.root is None else self.root @ solution

    def _inverse(self, right: torch.Tensor) -> torch.Tensor:
        """Return (Gram + μI)⁻¹ · right, solved in the factor's precision, in that of ``right``."""
        return torch.cholesky_solve(right.to(self._factor.dtype), self._factor).to(right.dtype)

    def _cholesky(self, gram_in: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        """Return the lower Cholesky factor of Gram + μI, from the Gram matrix in a precision.

        It is computed in the keys' precision if that will do and float64 is slower; else in
        float64, with a growing jitter if even that fails, and a warning. The squared ratio of the
        factor's diagonal bounds the condition number from below: times the rounding error, it says
        when float32 will not do.
        """
        if not sum_over_ranks(torch.tensor(float(doubles_are_fast(self.mu.device)))):
            gram = gram_in(self.mu.dtype)
            _check_finite(gram)
            gram.diagonal().add_(self.mu)
            factor, failed = torch.linalg.cholesky_ex(gram)
            diagonal = factor.diagonal()
            error = torch.finfo(gram.dtype).eps * (diagonal.max() / diagonal.min()).square()
            rough = torch.tensor(bool(failed or error >= 1e-3), dtype=torch.float32)
            if not sum_over_ranks(rough):  # the rounding of several machines might differ
                return factor
            warnings.warn("ridge: ill-conditioned, solved in float64", stacklevel=4)
            del gram, factor, diagonal
        gram = gram_in(torch.float64)
        _check_finite(gram)
        diagonal = gram.diagonal().clone()
        for jitter in (0, 1e-12, 1e-9, 1e-6):
            gram.diagonal().copy_(diagonal + self.mu.double() + jitter * diagonal.mean())
            factor, failed = torch.linalg.cholesky_ex(gram)
            if not failed:
                if jitter:
                    what = f"ridge: ill-conditioned, {jitter:g} of its mean diagonal added"
                    warnings.warn(what, stacklevel=4)
                return factor
        raise HorseError("the ridge system stays singular in float64; raise lambda.")

    def _gram(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the Gram matrix, n×n in the dual and d×d in the primal, in that precision.

        Many tokens are taken chunk by chunk, so that the keys are never copied as a whole.
        """
        rows = [self._added.T] if self.dual else self._added.split(CHUNK)
        size = rows[0].shape[1]
        gram = torch.zeros(size, size, dtype=dtype, device=self.mu.device)
        for part in rows:
            add_gram(gram, part)
        return gram if self.dual else sum_over_ranks(gram)


def add_gram(total: torch.Tensor, rows: torch.Tensor):
    """Add rowsᵀ·rows to a sum, d×d, in the sum's precision.

    A GPU multiplies rows in half precision exactly and sums the products in float32, several times
    as fast as it multiplies them in float32.
    """
    if rows.is_cuda and rows.dtype in HALVES and total.dtype == torch.float32 and SUMS_IN_FLOAT32:
        total += torch.mm(rows.T, rows, out_dtype=torch.float32)
    else:
        rows = rows.to(total.dtype)
        total.addmm_(rows.T, rows)


def _check_finite(gram: torch.Tensor):
    if not all_finite(gram):
        raise HorseError(f"the Gram matrix of the keys is not finite. {HALF_PRECISION_HINT}")


def doubles_are_fast(device: torch.device) -> bool:
    """Return whether a GPU computes in float64 nearly as fast as in float32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FAST_DOUBLES
