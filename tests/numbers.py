"""What the tests of the equations share: random matrices, and a comparison with the oracle."""

import numpy as np


def close(a, b, tol=1e-8):
    """Assert that b is a up to a share of its largest entry."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max(initial=0) <= tol * max(1.0, np.abs(b).max(initial=0))


def arrays(seed, *shapes):
    """Return standard normal matrices."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]
