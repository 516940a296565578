"""An edit on top of others: one of all facts, from the unedited weights, less what is there.

S, the shift of all facts that are to be in force, is solved as if nothing had been edited. With D,
the sum of the shifts in force, the edit is ΔW = S − D: one edit after the other ends where all at
once end, but for a rounding of the weights for each edit. Eq. 2 has it in one piece, with H and R'
of all facts,

    ΔW = (HᵀH + e^λ C̄)⁻¹ (Hᵀ(R' − HD) − e^λ C̄ D).

A budget raises the ridge term. In the inverse alone, it charges ΔW and leaves D as it is; if D is
to be written anew, it charges S.
"""

from dataclasses import dataclass

import torch

from horse_plugin.method.ridge import Ridge


@dataclass
class InForce:
    """The edits under a new one.

    Attributes:
        shifts: D of each edit module, d×d'.
        mus: e^λ of each edit module, without what a budget adds to it; None is with it.
    """

    shifts: list[torch.Tensor]
    mus: torch.Tensor | None

    def pulled(self, l: int, ridge: Ridge) -> torch.Tensor:
        """Return e^λ (HᵀH + μC̄)⁻¹C̄D of the l-th edit module, d×d', what ΔW takes off D.

        Args:
            ridge: Eq. 2 of all facts, under a ridge term μ of e^λ or more.
        """
        pulled = ridge.anchored(self.shifts[l].to(ridge.mu.dtype))
        return pulled if self.mus is None else self.mus[l] / ridge.mu * pulled
