"""Residuals gathered in sweeps: keys and gradients read again in the model with what is written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from horse_plugin.distributed import sum_over_ranks
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.solve import Roots, edit_residuals, solve
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Capture, capture

FEW = 0.2  # share of the rows that are few
LITTLE = 0.1  # share of the nats they lacked before that is little gained by whole residuals


@torch.no_grad()
def sweeps(
    backbone: Backbone,
    network: HyperNetwork,
    captured: Capture,
    hparams: HORSEHyperParams,
    roots: Roots,
    step: float = 1.0,
) -> Iterator[tuple[Capture, list[torch.Tensor]]]:
    """Yield, at most ``edit_sweeps`` times, a capture and the sum of the residuals up to it.

    One step along a gradient at the subject writes few answers, however long it is. So the keys and
    gradients are read again in the model with the shifts that all residuals so far make (Eq. 2),
    and theirs are added. Answers that hold by then get nothing more. All are read, since one answer
    may undo another, and since a module's keys change with those below it. The sweeps end early
    when all answers hold, or when few are left and a sweep gains little on them.

    Args:
        captured: the capture of the edit prompts and the contrasts on the model as it is now, the
            first to be yielded.
        roots: as in :func:`horse_plugin.editing.solve.calibrate`.
        step: the share of its residual that a row gets in a sweep
            (:meth:`horse_plugin.editing.crowding.Crowding.step`).

    Yields:
        The capture, and Σ R'_1 … Σ R'_T over the sweeps so far, n×d' each.
    """
    total = [step * r for r in edit_residuals(backbone, network, captured, hparams)]
    yield captured, total
    lacking, n = math.inf, hparams.edit_sweeps
    with backbone.trunk_cache.for_a_while():
        if n > 1:
            backbone.cache_trunk_states(captured.prompts, progress=False)
        for _ in range(1, n):
            tensors = solve(backbone, network, captured, total, hparams, roots)
            with backbone.weights.shifted(EditDelta(tensors, []).lazy_shifts()):
                captured = capture(backbone, captured.prompts, captured, hparams.edit_holds)
            captured = replace(captured, still=captured.still | captured.holds)
            counts, before = sum_over_ranks(counts_of(captured)).tolist(), lacking
            if is_over(counts, before, step):
                return
            lacking = counts[-1]
            more = edit_residuals(backbone, network, captured, hparams)
            total = [r + step * m for r, m in zip(total, more, strict=True)]
            yield captured, total


def counts_of(captured: Capture) -> torch.Tensor:
    """Return how many rows do not hold, how many there are, and the nats that the former lack."""
    left = ~captured.holds
    return torch.stack([left.sum(), torch.tensor(len(left)), captured.losses[left].sum()])


def is_over(counts: Sequence[float], before: float, step: float) -> bool:
    """Return whether all answers hold, or few are left and a sweep gained little on them.

    Args:
        counts: as :func:`counts_of` has them.
        before: the nats that were lacking a sweep ago.
        step: as in :func:`sweeps`; half a residual need gain half as much.
    """
    n_left, n_rows, lacking = counts
    return not n_left or (n_left <= FEW * n_rows and lacking > (1 - step * LITTLE) * before)
