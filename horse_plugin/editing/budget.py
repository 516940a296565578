"""A budget for drift: the smallest ridge term that keeps to it, found by bisection.

The residuals stay, and only Eq. 2 is solved again. From the ridge term e^λ on, drift sinks as the
term grows, since ΔW shrinks to 0.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from horse_plugin.errors import HorseError

CLOSE = 1.1  # the ratio of two ridge terms between which no better one is sought
MOST = 2.0**40  # times the ridge term of the edit; what it leaves of an edit is rounding

Tensors = dict[str, torch.Tensor]


@dataclass
class Budget:
    """What an edit with a budget came to.

    Attributes:
        max_drift: the budget, in nats a token.
        edit_ridge: the share of e^λ that keeps to it.
        drift: KL(unedited ‖ edited) there, on the text that it was found on.
        trials: (share of e^λ, drift) of each ridge term that was tried on the model.
        efficacy: the share of answer tokens of the edit prompts predicted right, in percent.
        efficacy_without: the same without the budget.
    """

    max_drift: float
    edit_ridge: float
    drift: float
    trials: list[tuple[float, float]] = field(default_factory=list)
    efficacy: float | None = None
    efficacy_without: float | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    def sentence(self) -> str:
        """Return in one sentence what the budget cost."""
        if self.efficacy_without is None:
            return f"max_drift {self.max_drift:g}: kept without a larger ridge term."
        return (
            f"max_drift {self.max_drift:g}: took {self.edit_ridge:.3g} of the trained ridge term; "
            f"efficacy {self.efficacy:.1f}, without the budget {self.efficacy_without:.1f} at a "
            f"drift of {self.trials[0][1]:.3g}"
        )


def smallest_ridge(
    solve_at: Callable[[float], Tensors],
    predicted: Callable[[Tensors], float],
    drift_of: Callable[[Tensors], float],
    start: float,
    max_drift: float,
) -> tuple[Tensors, Budget]:
    """Return the edit's tensors under the smallest ridge term that keeps to the budget.

    Args:
        solve_at: share of e^λ → the tensors of the edit (Eq. 2).
        predicted: tensors → tr(ΔWᵀC̄ΔW), to which drift is nearly proportional; it gives the first
            guess without a pass of the model.
        drift_of: tensors → the drift of the model with them.
        start: the share that the edit would take without a budget; no smaller one is tried.
        max_drift: in nats a token, above 0.

    Raises:
        HorseError: no ridge term keeps to the budget, since the edits in force exceed it already.
    """
    trials = []

    def tried(share: float) -> tuple[Tensors, float]:
        tensors = solve_at(share)
        trials.append((share, drift_of(tensors)))
        return tensors, trials[-1][1]

    tensors, drift = tried(start)
    if drift <= max_drift:
        return tensors, Budget(max_drift, start, drift, trials)
    wanted, share = predicted(tensors) * max_drift / drift, start
    while share < MOST * start and predicted(solve_at(share)) > wanted:
        share *= 2
    low, high, kept = start, None, None
    while high is None or high / low > CLOSE:
        tensors, drift = tried(share)
        if drift <= max_drift:
            high, kept = share, (tensors, drift)
        elif share >= MOST * start:
            raise HorseError(
                f"max_drift {max_drift:g}: no ridge term keeps to it; the drift of the edits in "
                f"force is {drift:.3g} already. Raise it, or undo an edit."
            )
        else:
            low = share
        share = share * 2 if high is None else math.sqrt(low * high)
    return kept[0], Budget(max_drift, high, kept[1], trials)
