"""What the tests of the equations share: random matrices, and comparisons."""

import numpy as np
import torch


def close(a, b, tol=1e-8):
    """Assert that b is a up to a share of its largest entry."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max(initial=0) <= tol * max(1.0, np.abs(b).max(initial=0))


def arrays(seed, *shapes):
    """Return standard normal matrices."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def weights(editor):
    """Return copies of the weights of an editor's edit modules."""
    return [m.weight.detach().clone() for m in editor.backbone.modules.values()]


def assert_same_edit(one, other, tolerance):
    """The weights of both editors are the same, by a share of the greatest shift."""
    for found, want, before in zip(
        weights(one), weights(other), other.original_weights.values(), strict=True
    ):
        moved = (want - before).abs().max()
        torch.testing.assert_close(found, want, rtol=0, atol=tolerance * moved)
