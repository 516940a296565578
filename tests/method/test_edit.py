"""Eq. 4, Eq. 5 or 6, and Eq. 2 in one go, against the float64 oracle."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horse_plugin.method.residual import residual
from horse_plugin.method.ridge import Ridge
from horse_plugin.method.spread import SPREADS
from tests import oracle
from tests.numbers import arrays, close

ORACLES = {
    "orthogonal": oracle.orthogonal,
    "gram_schmidt": oracle.gram_schmidt,
    "uniform": lambda rs: rs,
    "decay": oracle.decay,
}


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 9),
    d_out=st.integers(1, 7),
    n_layers=st.integers(1, 5),
    kind=st.sampled_from(sorted(ORACLES)),
    zero=st.booleans(),
    duplicate=st.booleans(),
    lam=st.floats(-4, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_the_edit_agrees_with_the_oracle(n, d, d_out, n_layers, kind, zero, duplicate, lam, seed):
    """n=1, n<d, n=d, n>d; a layer whose gradient is zero; duplicate tokens."""
    keys, pseudo_keys, pseudo_grads = [], [], []
    for l in range(n_layers):
        h, ht, gt = arrays(seed + l, (n, d), (n, d), (n, d_out))
        if zero and l == n_layers // 2:
            gt = np.zeros_like(gt)
        if duplicate and n > 1:
            h[-1], ht[-1], gt[-1] = h[0], ht[0], gt[0]
        keys.append(h), pseudo_keys.append(ht), pseudo_grads.append(gt)
    eta = 0.01
    want = ORACLES[kind](
        [oracle.residual(*x, eta) for x in zip(keys, pseudo_keys, pseudo_grads, strict=True)]
    )
    got = [
        residual(*map(torch.tensor, x), eta)
        for x in zip(keys, pseudo_keys, pseudo_grads, strict=True)
    ]
    got = SPREADS[kind](got, keys, pseudo_grads, 1.0)
    for h, r_want, r_got in zip(keys, want, got, strict=True):
        close(r_got, r_want)
        close(Ridge(torch.tensor(h), np.exp(lam)).shift(r_got), oracle.shift(h, r_want, lam))
