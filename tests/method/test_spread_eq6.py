"""Eq. 5 and Eq. 6: how residuals are spread over the layers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horse_plugin.method.spread import SPREADS
from tests import oracle
from tests.numbers import arrays, close


def test_the_released_projection_leaves_nothing_along_the_raw_gradient_below():
    rs, grads = ([torch.tensor(a) for a in arrays(seed, *[(5, 3)] * 4)] for seed in (0, 1))
    got = SPREADS["released"](rs, [], grads, 1.0)
    assert torch.equal(got[0], rs[0])
    for r, raw, below in zip(got[1:], rs[1:], grads, strict=False):
        close((r * below).sum(), 0.0)
        share = (raw * below).sum() / (below * below).sum()
        close(raw - r, share * below)


@given(n=st.integers(2, 9), strength=st.floats(0, 1.5), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_spread_strength_scales_the_projection(n, strength, seed):
    rs = arrays(seed, *[(n, 4)] * 3)
    got = SPREADS["orthogonal"]([torch.tensor(r) for r in rs], [], [], strength)
    for a, b in zip(got, oracle.orthogonal(rs, strength), strict=True):
        close(a, b)


def test_orthogonal_residuals_are_orthogonal_to_the_layer_below():
    rs = [torch.tensor(r) for r in arrays(0, *[(5, 4)] * 4)]
    for below, r in zip(rs, SPREADS["orthogonal"](rs, [], [], 1.0)[1:], strict=False):
        assert abs((below * r).sum()) < 1e-10
    done = SPREADS["gram_schmidt"](rs, [], [], 1.0)
    for i, a in enumerate(done):
        for b in done[:i]:
            assert abs((a * b).sum()) < 1e-10
