"""How the keys of an edit crowd: what its sweeps can do, and how long their steps may be."""

import math
import warnings
from dataclasses import dataclass

from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.ridge import Ridge

# What a row moves over what it would move alone. Below the first, an edit takes more sweeps. Below
# the second, whole residuals go too far in what facts have in common, and answers undo each other.
CROWDED, TOO_CROWDED = 0.7, 0.35
SWEEPS = 5.0  # that nearly all facts took where keys do not crowd


@dataclass(frozen=True)
class Crowding:
    """How the keys of all facts crowd in one edit module.

    Attributes:
        n_rows: how many keys there are.
        share: what part of its residual a row moves by itself, a mean from 0 to 1.
        alone: what part it would move without the others.
    """

    n_rows: int
    share: float
    alone: float

    @classmethod
    def of(cls, ridge: Ridge) -> "Crowding":
        """Return that of the keys of Eq. 2 (:meth:`Ridge.crowding`)."""
        return cls(ridge.n, *ridge.crowding())

    @property
    def ratio(self) -> float:
        """``share`` over ``alone``; 1 where the ridge term leaves nothing to compare."""
        return self.share / self.alone if min(self.share, self.alone) > 0 else 1.0

    def step(self, hparams: HORSEHyperParams) -> float:
        """Return the share of its residual that a row gets in a sweep: ``edit_step``, or by these.

        What facts have in common is moved whole in each sweep, and what one has of its own by
        ``share``. The more they crowd, the shorter the steps, so that the latter keeps up. A single
        sweep is whole.
        """
        if hparams.edit_sweeps == 1:
            return 1.0
        return hparams.edit_step or min(1.0, self.ratio / TOO_CROWDED)

    def warn(self, hparams: HORSEHyperParams):
        """Warn where the sweeps of an edit will not write all of its facts."""
        n, needed = hparams.edit_sweeps, math.ceil(SWEEPS / self.ratio)
        if self.ratio >= CROWDED or (self.ratio >= TOO_CROWDED and n >= needed):
            return
        if n == 1:
            more = "sweeps (token: subject, edit_sweeps)"
        elif self.ratio >= TOO_CROWDED:
            more = f"edit_sweeps: {needed}"
        else:  # a number was not measured
            more = "more edit_sweeps with a smaller edit_ridge"
        warnings.warn(
            f"{self.n_rows:,} answer tokens crowd the edit modules: each moves {self.share:.0%} of "
            f"what it asks for, and {self.alone:.0%} alone. With edit_sweeps: {n} some facts will "
            f"not hold. Try {more}, more modules in inner_params, or fewer facts at once",
            stacklevel=3,
        )
