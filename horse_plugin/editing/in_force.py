"""An edit on top of others: what those in force write at the keys of their facts stays written.

With D, the sum of their shifts, the edit solves Eq. 2 for D + ΔW, over the keys of all facts:

    ΔW = (HᵀH + e^λ C̄)⁻¹ (Hᵀ(T − HD) − e^λ C̄ D)

The targets T of the new facts are HD + R. Those of the facts in force are what their own edit must
have asked for, so that Eq. 2 gave D. With keys that stay as they were, this is recursive least
squares, ΔW = (HᵀH + e^λ C̄)⁻¹HᵀR: one edit after the other ends where all at once end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from horse_plugin.method.ridge import Ridge
from horse_plugin.model.capture import Capture

SMALLEST = 1e-4  # of e^λ; what keys give less of, D cannot be traced back to


@dataclass
class InForce:
    """The edits under a new one.

    Attributes:
        shifts: D of each edit module, d×d'.
        mus: e^λ of each edit module; a budget charges ΔW more, and D as it was.
        asked: T of each edit module, n×d'; rows that are not of an edit in force are 0.
    """

    shifts: list[torch.Tensor]
    mus: torch.Tensor
    asked: list[torch.Tensor]

    @classmethod
    def of(
        cls,
        shifts: Sequence[torch.Tensor],
        captured: Capture,
        mus: torch.Tensor,
        roots: Sequence[torch.Tensor | None],
    ) -> "InForce":
        """Find T: HᵀT = (HᵀH + e^λ C̄)D for the rows of H that are of edits in force.

        T = HD + e^λ H(HᵀH)⁻¹C̄D solves it if D lies in the span of C̄⁻¹Hᵀ, as it does where these
        edits alone made it. It is computed in float64, with a little of C̄ added to HᵀH, since facts
        may share their keys.

        Args:
            shifts: D of each edit module, d×d'.
            captured: the first capture of the new edit.
            mus: e^λ of each edit module.
            roots: W with W Wᵀ = C̄⁻¹ for each edit module, or None for C̄ = I.
        """
        asked = []
        for shift, h, mu, root in zip(shifts, captured.keys, mus.double(), roots, strict=True):
            rows = captured.in_force.to(h.device)
            keys, d = h[rows].double(), shift.double()
            target = torch.zeros(len(h), d.shape[1], dtype=shift.dtype, device=h.device)
            ridge = Ridge(keys, SMALLEST * mu, None if root is None else root.double())
            target[rows] = (keys @ (d + ridge.anchored(d) / SMALLEST)).to(shift.dtype)
            asked.append(target)
        return cls(list(shifts), mus, asked)

    def residuals(self, captured: Capture) -> list[torch.Tensor]:
        """Return T − HD of each edit module at the rows of edits in force, n×d'; others are 0."""
        return [
            (target - h.to(d.dtype) @ d).masked_fill(~captured.in_force.to(h.device)[:, None], 0)
            for target, h, d in zip(self.asked, captured.keys, self.shifts, strict=True)
        ]
