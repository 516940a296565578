"""The hypernetwork: (H, ∇G) to (H̃, ∇G̃), and from there to spread residuals (Sec. 2.3).

Low-rank residual blocks in the manner of MALMEN (Tan et al. 2024), shared by the edit modules of
one shape; scale, shift, η and λ are each module's own. Tensors only, float32 unless cast.
"""

from collections.abc import Sequence

import torch
from torch import nn

from horse_plugin import distributed as parallel
from horse_plugin.method.residual import residual, spread

ROWS = 8192  # tokens that the normaliser takes in at once, in float64


class Normalizer(nn.Module):
    """Running mean and standard deviation of each feature over all rows seen (Welford, merged)."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))  # Σ (x − mean)²

    def update(self, x: torch.Tensor):
        """Take in n×size new rows."""
        self.merge(*self.moments(x))

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """3×size: how many rows, their mean, and Σ (x − mean)²."""
        x = x.to(self.mean)
        mean = x.sum(0) / max(1, len(x))
        return torch.stack((torch.full_like(mean, len(x)), mean, (x - mean).square().sum(0)))

    @torch.no_grad()
    def merge(self, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor):
        """Take in rows of which only the moments are known; none are no rows."""
        n = count[0]
        delta, total = mean - self.mean, self.count + n
        part = n / total.clamp(min=1)
        self.m2 += m2 + delta.square() * (self.count * part)
        self.mean += delta * part
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        std = (self.m2 / (self.count - 1).clamp(min=1)).sqrt()
        std = torch.where(std > 0, std, 1)  # a feature that never moved, such as a dead gradient
        return (x - self.mean.to(x.dtype)) / std.to(x.dtype)


class Block(nn.Module):
    """y ← y + scale_l ⊙ gelu(yAB + bias) + shift_l; the identity at the start, since B = 0.

    GELU has slope 1/2 at 0. The clamp of the released code sits exactly on its kink there, and
    whether it ever trains depends on what the installed torch takes for the gradient.
    """

    def __init__(self, size: int, rank: int, n_modules: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(size, rank) / size**0.5)
        self.B = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(n_modules, size))
        self.shift = nn.Parameter(torch.zeros(n_modules, size))

    def forward(self, y: torch.Tensor, module: int) -> torch.Tensor:
        update = nn.functional.gelu(y @ self.A @ self.B + self.bias)
        return y + self.scale[module] * update + self.shift[module]


class Blocks(nn.Module):
    """Normaliser and residual blocks of all edit modules of one shape (d, d')."""

    def __init__(self, shape: tuple[int, int], rank: int, n_blocks: int, n_modules: int):
        super().__init__()
        self.shape = shape
        self.normalizer = Normalizer(sum(shape))
        self.blocks = nn.ModuleList(Block(sum(shape), rank, n_modules) for _ in range(n_blocks))

    def forward(self, keys, grads, module: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.normalizer(torch.cat((keys, grads), -1))
        for block in self.blocks:
            y = block(y, module)
        return y.split(self.shape, -1)


class HyperNetwork(nn.Module):
    """Everything that HORSE learns, for edit modules l = 1 … T from the lowest to the highest.

    Args:
        shapes: (d, d') of each edit module; modules of one shape share their blocks.
        rank, n_blocks: of the residual blocks.
        spread: how residuals are spread over layers, see :mod:`horse_plugin.method.residual`.
        spread_strength: 1 is Eq. 6 as printed, 0 is no projection.
        coefficient: ``token`` is c_i of Eq. 4. For ablation, ``none`` puts −η in its place, and
            ``edit_only`` does so in the loss of Eq. 7 alone.

    Attributes:
        log_eta: log η_l (Eq. 4). NaN until :meth:`calibrate` or the caller sets it.
        lamda: λ_l; the ridge term is e^λ, so 0 makes it 1 (Eq. 2), as it starts unless
            :meth:`calibrate_ridge` or the caller sets it.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        n_blocks: int,
        spread: str = "orthogonal",
        spread_strength: float = 1.0,
        coefficient: str = "token",
    ):
        super().__init__()
        self.shapes, self.spread = [tuple(s) for s in shapes], spread
        self.coefficient = coefficient
        self.groups = nn.ModuleDict(
            {
                _name(shape): Blocks(shape, rank, n_blocks, self.shapes.count(shape))
                for shape in dict.fromkeys(self.shapes)
            }
        )
        self.log_eta = nn.Parameter(torch.full((len(shapes),), torch.nan))
        self.lamda = nn.Parameter(torch.zeros(len(shapes)))
        self.spread_strength = nn.Parameter(torch.tensor(float(spread_strength)))

    @property
    def calibrated(self) -> bool:
        return not self.log_eta.isnan().any()

    @property
    def seen(self) -> bool:
        """Whether the normalisers have met any data."""
        return all(group.normalizer.count > 0 for group in self.groups.values())

    def _place(self, l: int) -> tuple[Blocks, int]:
        """The group of module l and its position in the group."""
        shape = self.shapes[l]
        return self.groups[_name(shape)], self.shapes[:l].count(shape)

    def update_normalizers(self, keys: list[torch.Tensor], grads: list[torch.Tensor]):
        """Take in a batch; modules of one shape share their statistics, as in MALMEN."""
        for l, (h, g) in enumerate(zip(keys, grads, strict=True)):
            normalizer = self._place(l)[0].normalizer
            found = [normalizer.moments(torch.cat(c, -1)) for c in _chunks(h, g, ROWS)]
            for moments in parallel.gather(torch.stack(found)):
                normalizer.merge(*moments)

    def forward(self, l: int, keys, grads) -> tuple[torch.Tensor, torch.Tensor]:
        """(H_l, ∇G_l) → (H̃_l, ∇G̃_l): n×d and n×d'."""
        group, module = self._place(l)
        return group(keys, grads, module)

    def residuals(
        self,
        keys: list[torch.Tensor],
        grads: list[torch.Tensor],
        rows: int | None = None,
        in_loss: bool = False,
    ):
        """R'_1 … R'_T, each n×d' (Eq. 4, then Eq. 5 or 6), from H_l and ∇G_l of every module.

        Args:
            rows: tokens in one pass of the network, for bounded memory; all by default.
            in_loss: as the second term of Eq. 7 has them; other than in the edit where
                ``coefficient`` says so.
        """
        constant = self.coefficient == "none" or (in_loss and self.coefficient == "edit_only")
        raw = [
            torch.cat(
                [self._residual(l, h, g, constant) for h, g in _chunks(keys[l], grads[l], rows)]
            )
            for l in range(len(self.shapes))
        ]
        return spread(raw, self.spread, self.spread_strength)

    def _residual(self, l: int, keys, grads, constant: bool) -> torch.Tensor:
        eta, (pseudo_keys, pseudo_grads) = self.log_eta[l].exp(), self(l, keys, grads)
        if constant:
            return -eta * pseudo_grads
        return residual(keys, pseudo_keys, pseudo_grads, eta)

    @torch.no_grad()
    def calibrate(
        self, keys, grads, value_norms: Sequence[float], strength: float, rows: int | None = None
    ):
        """Set η_l so that the mean row norm of R'_l is ``strength`` times ``value_norms[l]``.

        η starts free of the model's scale this way. R'_l is proportional to η_l for every spread
        (Eq. 6 does not see the length of R_{l−1}), so one pass is enough. A module whose gradient
        is zero takes the mean log η of the others; if all are zero, η stays NaN. ``rows`` is as in
        :meth:`residuals`.
        """
        self.log_eta.zero_()
        residuals = self.residuals(keys, grads, rows)
        norms = parallel.mean(torch.stack([r.norm(dim=-1) for r in residuals], -1))
        log_eta = (strength * torch.as_tensor(value_norms).to(norms) / norms).log()
        moved = norms > 0
        self.log_eta.copy_(torch.where(moved, log_eta, log_eta[moved].mean()))

    @torch.no_grad()
    def calibrate_ridge(self, keys: list[torch.Tensor], share: float):
        """Set λ_l so that e^λ is ``share`` times the squared norm of a typical key of the module.

        With about as many answer tokens as features, H is nearly square and its smallest singular
        values nearly 0: a ridge term below them lets single keys ask for huge weights. A typical
        key has the median feature's mean square in each of its d features, since a few features
        can be larger than all others together. Keys that are zero leave e^λ at 1.
        """
        squares = [h.shape[1] * parallel.mean(h.square()).median() for h in keys]
        squares = torch.stack(squares).to(self.lamda)
        self.lamda.copy_(torch.where(squares > 0, (share * squares).log(), 0))


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _chunks(keys, grads, rows: int | None):
    rows = rows or max(len(keys), 1)
    return zip(keys.split(rows), grads.split(rows), strict=True)
