"""The hypernetwork (H, ∇G) → (H̃, ∇G̃), and all that is trained with it (Sec. 2.3).

Low-rank residual blocks in the manner of MALMEN (Tan et al. 2024) are shared by the edit modules of
one shape; scale, shift, η and λ belong to each module.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from horse_plugin.distributed import gather_rows, mean_of_rows
from horse_plugin.method.residual import capped, residual
from horse_plugin.method.spread import SPREADS

ROWS = 8192  # rows that the normaliser takes in at once, in float64
COEFFICIENTS = ("token", "edit_only", "none")
NORMALIZERS = ("feature", "scale")


class Normalizer(nn.Module):
    """Running mean and standard deviation of each feature over all rows so far (Welford, merged).

    Args:
        shape: the numbers of features of the keys and of the gradients.
        how: ``feature`` subtracts each feature's mean and divides by its standard deviation.
            ``scale`` divides all keys by their root mean square, and all gradients by theirs, so
            that directions stay as they are.
    """

    def __init__(self, shape: tuple[int, int], how: str = "feature"):
        super().__init__()
        self.shape, self.how, size = shape, how, sum(shape)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))  # Σ (x − mean)²

    def update(self, x: torch.Tensor):
        """Take in new rows, n×size."""
        self.merge(*self.moments(x))

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Return the number of the rows, their mean, and Σ (x − mean)², 3×size."""
        x = x.to(self.mean)
        mean = x.sum(0) / max(1, len(x))
        return torch.stack((torch.full_like(mean, len(x)), mean, (x - mean).square().sum(0)))

    @torch.no_grad()
    def merge(self, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor):
        """Take in rows of which only the moments are known."""
        n = count[0]
        delta, total = mean - self.mean, self.count + n
        part = n / total.clamp(min=1)
        self.m2 += m2 + delta.square() * (self.count * part)
        self.mean += delta * part
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "scale":
            squares = (self.mean.square() + self.m2 / self.count.clamp(min=1)).split(self.shape)
            scales = [s.mean().sqrt().expand(len(s)) for s in squares]
            scales = torch.cat(scales).to(x.dtype)
            return x / torch.where(scales > 0, scales, 1)
        std = (self.m2 / (self.count - 1).clamp(min=1)).sqrt()
        std = torch.where(std > 0, std, 1)  # a feature that never moved, such as a dead gradient
        return (x - self.mean.to(x.dtype)) / std.to(x.dtype)


class ResidualBlock(nn.Module):
    """y ← y + scale_l ⊙ gelu(yAB + bias) + shift_l. It starts as the identity, since B = 0.

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


class SharedBlocks(nn.Module):
    """The normaliser and the residual blocks of all edit modules of one shape (d, d')."""

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        n_blocks: int,
        n_modules: int,
        normalizer: str = "feature",
    ):
        super().__init__()
        self.shape = shape
        self.normalizer = Normalizer(shape, normalizer)
        self.blocks = nn.ModuleList(
            ResidualBlock(sum(shape), rank, n_modules) for _ in range(n_blocks)
        )

    def forward(self, keys, grads, module: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.normalizer(torch.cat((keys, grads), -1))
        for block in self.blocks:
            y = block(y, module)
        return y.split(self.shape, -1)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Have GPUs round what float32 products read to TF32, if on, for the length of a ``with``."""
    if not on:
        yield
        return
    of_gpus, name, value = torch.backends.cuda.matmul, "fp32_precision", "tf32"
    if not hasattr(of_gpus, name):  # torch before 2.9
        name, value = "allow_tf32", True
    before = getattr(of_gpus, name)
    try:
        setattr(of_gpus, name, value)
        yield
    finally:
        setattr(of_gpus, name, before)


class HyperNetwork(nn.Module):
    """Everything that HORSE learns, for the edit modules l = 1 … T.

    Args:
        shapes: (d, d') of each edit module; modules of one shape share their blocks.
        rank: the rank of A and B in each residual block.
        n_blocks: the number of residual blocks.
        spread: the name of a rule in :mod:`horse_plugin.method.spread`.
        spread_strength: the strength s of that rule; 1 is Eq. 6 as printed, 0 is no projection.
        coefficient: ``token`` is c_i of Eq. 4. For ablation, ``none`` puts −η in its place, and
            ``edit_only`` does so in the loss of Eq. 7 alone.
        normalizer: ``feature`` or ``scale``, see :class:`Normalizer`.
        has_cap: whether the rows of R_l are no longer than ``largest[l]``.

    Attributes:
        tf32: whether GPUs multiply in TF32 in the blocks, which is a setting and is not saved.
        largest: the greatest length of a row of R_l, if there is a cap; infinity until
            :meth:`calibrate_cap` sets it.
        log_eta: log η_l (Eq. 4). It is NaN until :meth:`calibrate_eta` or the caller sets it.
        lamda: λ_l. The ridge term is e^λ (Eq. 2); λ starts at 0 unless
            :meth:`calibrate_ridge` or the caller sets it.

    Raises:
        ValueError: there is no spread of that name.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        n_blocks: int,
        spread: str = "orthogonal",
        spread_strength: float = 1.0,
        coefficient: str = "token",
        normalizer: str = "feature",
        has_cap: bool = False,
    ):
        super().__init__()
        if spread not in SPREADS:
            raise ValueError(f"no spread is called {spread!r}")
        self.shapes, self.spread = [tuple(s) for s in shapes], spread
        self.coefficient, self.normalizer, self.has_cap = coefficient, normalizer, has_cap
        self.tf32 = False
        self.groups = nn.ModuleDict(
            {
                _group_name(shape): SharedBlocks(
                    shape, rank, n_blocks, self.shapes.count(shape), normalizer
                )
                for shape in dict.fromkeys(self.shapes)
            }
        )
        self.log_eta = nn.Parameter(torch.full((len(shapes),), torch.nan))
        self.lamda = nn.Parameter(torch.zeros(len(shapes)))
        self.spread_strength = nn.Parameter(torch.tensor(float(spread_strength)))
        if has_cap:
            self.register_buffer("largest", torch.full((len(shapes),), torch.inf))

    @property
    def has_eta(self) -> bool:
        """Whether η is set for every module."""
        return not self.log_eta.isnan().any()

    @property
    def has_statistics(self) -> bool:
        """Whether the normalisers have taken in any rows."""
        return all(group.normalizer.count > 0 for group in self.groups.values())

    def group_of(self, l: int) -> tuple[SharedBlocks, int]:
        """Return the shared blocks of module l, and the index of the module among their modules."""
        shape = self.shapes[l]
        return self.groups[_group_name(shape)], self.shapes[:l].count(shape)

    def update_normalizers(self, keys: list[torch.Tensor], grads: list[torch.Tensor]):
        """Take the rows of an edit into the normalisers; modules of one shape share theirs.

        Args:
            keys: H_1 … H_T, n×d each.
            grads: ∇G_1 … ∇G_T, n×d' each.
        """
        for l, (h, g) in enumerate(zip(keys, grads, strict=True)):
            normalizer, where = self.group_of(l)[0].normalizer, self.log_eta.device
            found = [normalizer.moments(torch.cat(c, -1).to(where)) for c in _chunks(h, g, ROWS)]
            for moments in gather_rows(torch.stack(found)):
                normalizer.merge(*moments)

    def forward(self, l: int, keys, grads) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (H̃_l, ∇G̃_l), n×d and n×d', from (H_l, ∇G_l)."""
        group, module = self.group_of(l)
        return group(keys.to(self.log_eta), grads.to(self.log_eta), module)

    def residuals(
        self,
        keys: list[torch.Tensor],
        grads: list[torch.Tensor],
        rows: int | None = None,
        in_loss: bool = False,
    ) -> list[torch.Tensor]:
        """Return R'_1 … R'_T, n×d' each: Eq. 4, then the spread (Eq. 5 or 6).

        Args:
            keys: H_1 … H_T, n×d each.
            grads: ∇G_1 … ∇G_T, n×d' each.
            rows: the number of rows in one pass of the network, for bounded memory; None is all.
            in_loss: whether to compute the residuals of the second term of Eq. 7, which differ
                from those of the edit where ``coefficient`` says so.
        """
        return self.spread_out(self.raw_residuals(keys, grads, rows, in_loss), keys, grads)

    def raw_residuals(
        self, keys, grads, rows: int | None = None, in_loss: bool = False
    ) -> list[torch.Tensor]:
        """Return R_1 … R_T of Eq. 4, before the spread; its arguments are :meth:`residuals`'."""
        found = []
        for l in range(len(self.shapes)):
            chunks = _chunks(keys[l], grads[l], rows)
            with tf32(self.tf32):
                found.append(torch.cat([self._residual(l, h, g, in_loss) for h, g in chunks]))
        return found

    def backward(
        self,
        raw_grads: list[torch.Tensor],
        keys: list[torch.Tensor],
        grads: list[torch.Tensor],
        rows: int | None = None,
        in_loss: bool = False,
    ):
        """Carry ∂L/∂R_1 … ∂L/∂R_T, before the spread, into the gradients of the parameters.

        Each chunk of each module runs through the network again, so that the graph of one is in
        memory at a time.

        Args:
            raw_grads: ∂L/∂R_l, n×d' each.
            keys, grads, rows, in_loss: as in :meth:`residuals`.
        """
        for l in reversed(range(len(self.shapes))):  # in the order of a graph of all
            chunks = list(_chunks(keys[l], grads[l], rows))
            of_chunks = raw_grads[l].split([len(h) for h, _ in chunks])
            for (h, g), r in reversed(list(zip(chunks, of_chunks, strict=True))):
                with tf32(self.tf32):
                    self._residual(l, h, g, in_loss).backward(r)

    def spread_out(self, raw, keys, grads) -> list[torch.Tensor]:
        """Return R'_1 … R'_T from R_1 … R_T by the network's spread."""
        return SPREADS[self.spread](raw, keys, grads, self.spread_strength)

    def _residual(self, l: int, keys, grads, in_loss: bool) -> torch.Tensor:
        constant = self.coefficient == "none" or (in_loss and self.coefficient == "edit_only")
        keys, eta = keys.to(self.log_eta), self.log_eta[l].exp()
        pseudo_keys, pseudo_grads = self(l, keys, grads)
        r = -eta * pseudo_grads if constant else residual(keys, pseudo_keys, pseudo_grads, eta)
        return capped(r, self.largest[l]) if self.has_cap else r

    @torch.no_grad()
    def calibrate_eta(
        self, keys, grads, value_norms: Sequence[float], strength: float, rows: int | None = None
    ):
        """Set η_l so that the mean row norm of R'_l is ``strength`` times ``value_norms[l]``.

        η starts free of the model's scale this way. R'_l is proportional to η_l for every spread
        (Eq. 6 does not depend on the length of R_{l−1}), so one pass is enough; a cap must not be
        set yet. A module whose
        gradient is zero takes the mean log η of the others; if all are zero, η stays NaN.

        Args:
            keys, grads, rows: as in :meth:`residuals`.
            value_norms: the mean row norm of each module's output at the answer tokens.
            strength: the wanted ratio.
        """
        self.log_eta.zero_()
        residuals = self.residuals(keys, grads, rows)
        norms = mean_of_rows(torch.stack([r.norm(dim=-1) for r in residuals], -1))
        log_eta = (strength * torch.as_tensor(value_norms).to(norms) / norms).log()
        moved = norms > 0
        self.log_eta.copy_(torch.where(moved, log_eta, log_eta[moved].mean()))

    @torch.no_grad()
    def calibrate_cap(self, value_norms: Sequence[float], cap: float):
        """Limit the rows of R_l to ``cap`` times ``value_norms[l]``.

        Args:
            value_norms: the mean row norm of each module's output where keys are read.
            cap: the largest ratio.
        """
        self.largest.copy_(cap * torch.as_tensor(value_norms).to(self.largest))

    @torch.no_grad()
    def calibrate_ridge(self, keys: list[torch.Tensor], share: float):
        """Set λ_l so that e^λ is ``share`` times the squared norm of a typical key of the module.

        With about as many answer tokens as features, H is nearly square and its smallest singular
        values nearly 0: a ridge term below them lets single keys ask for huge weights. A typical
        key has the median feature's mean square in each of its d features, since a few features
        can be larger than all others together. Keys that are zero leave e^λ at 1.

        Args:
            keys: H_1 … H_T, n×d each.
        """
        keys = (h.to(self.lamda) for h in keys)
        squares = [h.shape[1] * mean_of_rows(h.square()).median() for h in keys]
        squares = torch.stack(squares).to(self.lamda)
        self.lamda.copy_(torch.where(squares > 0, (share * squares).log(), 0))


def _group_name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _chunks(keys, grads, rows: int | None):
    rows = rows or max(len(keys), 1)
    return zip(keys.split(rows), grads.split(rows), strict=True)
