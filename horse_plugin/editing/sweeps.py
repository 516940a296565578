"""Residuals gathered in sweeps: keys and gradients read again in the model with what is written."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from horse_plugin.data.prompts import Prompt
from horse_plugin.distributed import sum_over_ranks
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.solve import Roots, edit_residuals, solve
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Capture, capture


@torch.no_grad()
def sweeps(
    backbone: Backbone,
    network: HyperNetwork,
    prompts: Sequence[Prompt],
    captured: Capture,
    hparams: HORSEHyperParams,
    roots: Roots,
) -> Iterator[tuple[Capture, list[torch.Tensor]]]:
    """Yield, at most ``edit_sweeps`` times, a capture and the sum of the residuals up to it.

    One step along a gradient at the subject writes few answers, however long it is. So the keys and
    gradients are read again in the model with the shifts that all residuals so far make (Eq. 2),
    and theirs are added. Answers that hold by then get nothing more, and are left out of the next
    capture. Once none is left, and before the last sweep, all are read again: one answer may undo
    another. The sweeps end early when all answers hold.

    Args:
        prompts: the edit prompts and the contrasts.
        captured: their capture on the model as it is now, the first to be yielded.
        roots: as in :func:`horse_plugin.editing.solve.calibrate`.

    Yields:
        The capture, and Σ R'_1 … Σ R'_T over the sweeps so far, n×d' each.
    """
    total = edit_residuals(backbone, network, captured, hparams)
    yield captured, total
    left, n = None, hparams.edit_sweeps  # how many rows do not hold yet
    with backbone.trunk_cache.for_a_while():
        if n > 1:
            backbone.cache_trunk_states(prompts, progress=False)
        for sweep in range(1, n):
            some = bool(left) and sweep < n - 1
            tensors = solve(backbone, network, captured, total, hparams, roots)
            with backbone.weights.shifted(EditDelta(tensors, []).shifts):
                captured = capture(backbone, prompts, captured, skip_held=some)
            captured = replace(captured, still=captured.still | captured.holds)
            left = sum_over_ranks((~captured.holds).sum()).item()
            if not left and not some:
                return
            more = edit_residuals(backbone, network, captured, hparams)
            total = [r + m for r, m in zip(total, more, strict=True)]
            yield captured, total
