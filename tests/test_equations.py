"""Residual, spread and ridge against the float64 oracle, on shapes and cases hypothesis finds."""

import warnings

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horse_plugin import HorseError
from horse_plugin.method.hypernetwork import HyperNetwork, Normalizer
from horse_plugin.method.residual import residual, spread
from horse_plugin.method.ridge import Ridge

ORACLES = {
    "orthogonal": oracle.orthogonal,
    "gram_schmidt": oracle.gram_schmidt,
    "uniform": lambda rs: rs,
    "decay": oracle.decay,
}


def close(a, b, tol=1e-8):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max(initial=0) <= tol * max(1.0, np.abs(b).max(initial=0))


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


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
    got = spread(
        [
            residual(*map(torch.tensor, x), eta)
            for x in zip(keys, pseudo_keys, pseudo_grads, strict=True)
        ],
        kind,
    )
    for h, r_want, r_got in zip(keys, want, got, strict=True):
        close(r_got, r_want)
        close(Ridge(torch.tensor(h), np.exp(lam)).shift(r_got), oracle.shift(h, r_want, lam))


@given(n=st.integers(2, 9), strength=st.floats(0, 1.5), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_spread_strength_scales_the_projection(n, strength, seed):
    rs = arrays(seed, *[(n, 4)] * 3)
    got = spread([torch.tensor(r) for r in rs], "orthogonal", strength)
    for a, b in zip(got, oracle.orthogonal(rs, strength), strict=True):
        close(a, b)


def test_orthogonal_residuals_are_orthogonal_to_the_layer_below():
    rs = [torch.tensor(r) for r in arrays(0, *[(5, 4)] * 4)]
    for below, r in zip(rs, spread(rs, "orthogonal")[1:], strict=False):
        assert abs((below * r).sum()) < 1e-10
    done = spread(rs, "gram_schmidt")
    for i, a in enumerate(done):
        for b in done[:i]:
            assert abs((a * b).sum()) < 1e-10


@given(
    n=st.integers(1, 14), d=st.integers(1, 14), d_out=st.integers(1, 5), seed=st.integers(0, 2**16)
)
@settings(deadline=None)
def test_dual_and_primal_agree(n, d, d_out, seed):
    h, r, g = map(torch.tensor, arrays(seed, (n, d), (n, d_out), (d, d_out)))
    here, other = Ridge(h, 0.5), Ridge(h, 0.5)
    other.dual = not here.dual
    gram = h @ h.T if other.dual else h.T @ h
    other._factor = torch.linalg.cholesky(gram + 0.5 * torch.eye(len(gram), dtype=h.dtype))
    close(here.shift(r), other.shift(r))
    close(here.residual_grad(g), other.residual_grad(g))
    close(here.lamda_grad(g, here.shift(r)), other.lamda_grad(g, here.shift(r)))


def test_factors_multiply_to_the_shift():
    h, r = map(torch.tensor, arrays(0, (3, 8), (3, 2)))
    ridge = Ridge(h, 1.0)
    assert ridge.dual
    close(h.T @ ridge.factors(r), ridge.shift(r))


def test_an_ill_conditioned_system_is_solved_in_float64_with_a_warning():
    h = torch.ones(6, 9) * 1e4  # six equal tokens: the Gram matrix has rank one
    with pytest.warns(UserWarning, match="float64"):
        ridge = Ridge(h, 1e-6)
    want = oracle.shift(h.double().numpy(), np.ones((6, 2)), np.log(1e-6))
    close(ridge.shift(torch.ones(6, 2)), want, 1e-3)


@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4])
def test_features_with_an_offset_do_not_spoil_the_solution(offset):
    """Hidden states of language models have a few huge features."""
    h, r = (torch.tensor(x, dtype=torch.float32) for x in arrays(0, (30, 100), (30, 4)))
    h[:, 0] += offset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = Ridge(h, 1.0).shift(r)
    want = torch.tensor(oracle.shift(h.double().numpy(), r.double().numpy(), 0.0))
    assert (got - want).norm() < 0.02 * want.norm()


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(HorseError, match="not finite"):
        Ridge(torch.tensor([[1.0, float("nan")]]), 1.0)


def test_network_agrees_with_the_oracle():
    torch.manual_seed(0)
    net = HyperNetwork([(5, 3), (5, 3)], rank=2, n_blocks=2).double()
    for p in net.groups.parameters():
        torch.nn.init.normal_(p)
    keys, grads = [torch.randn(7, 5).double() for _ in range(2)], [torch.randn(7, 3).double()] * 2
    net.update_normalizers(keys, grads)
    seen = np.concatenate([np.concatenate([h, g], 1) for h, g in zip(keys, grads, strict=True)])
    for l in range(2):
        group = net.groups["5x3"]
        blocks = [
            {
                "A": b.A,
                "B": b.B,
                "bias": b.bias,
                "scale": b.scale[l],
                "shift": b.shift[l],
            }
            for b in group.blocks
        ]
        blocks = [{k: v.detach().numpy() for k, v in b.items()} for b in blocks]
        want = oracle.network(
            keys[l].numpy(), grads[l].numpy(), seen.mean(0), seen.std(0, ddof=1), blocks
        )
        for a, b in zip(net(l, keys[l], grads[l]), want, strict=True):
            close(a.detach(), b)


def test_an_untrained_network_standardises_and_nothing_else():
    net = HyperNetwork([(4, 2)], rank=3, n_blocks=2)
    x = torch.randn(9, 6) * 3 + 1
    net.update_normalizers([x[:, :4]], [x[:, 4:]])
    h, g = net(0, x[:, :4], x[:, 4:])
    want = (x - x.mean(0)) / x.std(0)
    torch.testing.assert_close(torch.cat((h, g), -1), want)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_normalizer_sees_the_same_whatever_the_batches(sizes, seed):
    x = torch.tensor(arrays(seed, (sum(sizes), 3))[0])
    whole, parts = Normalizer(3), Normalizer(3)
    whole.update(x)
    for part in x.split(sizes):
        parts.update(part)
    close(parts.mean, whole.mean)
    close(parts.m2, whole.m2)


def test_a_module_whose_gradient_is_zero_stays_finite():
    net = HyperNetwork([(4, 2)] * 2, rank=3, n_blocks=1)
    signs = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])  # of mean zero
    keys, grads = [torch.randn(4, 4)] * 2, [torch.zeros(4, 2), signs]
    net.update_normalizers(keys, grads)
    net.calibrate(keys, grads, [1.0, 2.0], 0.15)
    still, moved = net.residuals(keys, grads)
    assert (still == 0).all()
    assert moved.norm() > 0
    assert net.log_eta[0] == net.log_eta[1]


def test_without_any_residual_eta_stays_unset():
    net = HyperNetwork([(4, 2)], rank=3, n_blocks=1)
    keys, grads = [torch.randn(5, 4)], [torch.zeros(5, 2)]
    net.update_normalizers(keys, grads)
    net.calibrate(keys, grads, [1.0], 0.15)
    assert not net.calibrated


@given(
    kind=st.sampled_from(sorted(ORACLES)),
    strength=st.floats(0.01, 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**10),
)
@settings(deadline=None, max_examples=40)
def test_calibration_reaches_the_strength_for_every_spread(kind, strength, share, seed):
    torch.manual_seed(seed)
    net = HyperNetwork(
        [(6, 3)] * 3, rank=2, n_blocks=1, spread=kind, spread_strength=share
    ).double()
    keys = [torch.randn(8, 6).double() for _ in range(3)]
    grads = [torch.randn(8, 3).double() for _ in range(3)]
    norms = [2.0, 5.0, 0.3]
    net.update_normalizers(keys, grads)
    net.calibrate(keys, grads, norms, strength)
    for r, norm in zip(net.residuals(keys, grads), norms, strict=True):
        assert r.norm(dim=-1).mean().item() == pytest.approx(strength * norm)


def test_the_ridge_term_starts_at_a_share_of_a_typical_keys_squared_norm():
    keys, _ = arrays(4, (23, 6), (1, 1))
    keys[:, 2] *= 1e4  # one huge feature, such as transformers have, is not typical
    net = HyperNetwork([(6, 3)] * 3, rank=2, n_blocks=1).double()
    net.calibrate_ridge([torch.tensor(k) for k in (keys, 10 * keys, 0 * keys)], 0.1)
    by_size = np.sort((keys**2).mean(0))
    typical = 6 * by_size[2]  # torch takes the lower of the two in the middle
    want = [0.1 * typical, 10 * typical, 1]
    torch.testing.assert_close(net.lamda.exp(), torch.tensor(want).double())


def test_residuals_do_not_depend_on_the_chunking():
    net = HyperNetwork([(6, 3)] * 2, rank=2, n_blocks=1)
    keys, grads = [torch.randn(7, 6)] * 2, [torch.randn(7, 3)] * 2
    net.update_normalizers(keys, grads)
    net.calibrate(keys, grads, [1.0, 1.0], 0.1)
    for a, b in zip(net.residuals(keys, grads), net.residuals(keys, grads, rows=2), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spoilt", [False, True])
def test_many_tokens_in_chunks_give_the_same_weights(monkeypatch, spoilt):
    """Also in the float64 fallback, which the spoilt keys need."""
    keys, r = (torch.tensor(a, dtype=torch.float32) for a in arrays(0, (40, 6), (40, 3)))
    if spoilt:
        keys[:, 0] *= 1e5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = Ridge(keys, 1.0).shift(r)
        monkeypatch.setattr("horse_plugin.method.ridge.CHUNK", 7)
        torch.testing.assert_close(Ridge(keys, 1.0).shift(r), whole)


def test_the_normaliser_takes_in_chunks_as_it_does_the_whole(monkeypatch):
    keys, grads = (torch.tensor(a, dtype=torch.float32) for a in arrays(1, (40, 6), (40, 3)))
    whole, chunked = (HyperNetwork([(6, 3)], 2, 1) for _ in range(2))
    whole.update_normalizers([keys], [grads])
    monkeypatch.setattr("horse_plugin.method.hypernetwork.ROWS", 7)
    chunked.update_normalizers([keys], [grads])
    for name, value in whole.groups["6x3"].normalizer.state_dict().items():
        torch.testing.assert_close(chunked.groups["6x3"].normalizer.state_dict()[name], value)


def test_eta_is_the_same_whatever_the_chunks():
    keys, grads = (torch.tensor(x) for x in arrays(3, (2, 23, 6), (2, 23, 3)))
    etas = []
    for rows in (None, 5, 23):
        torch.manual_seed(0)
        net = HyperNetwork([(6, 3), (6, 3)], 2, 1).double()
        net.update_normalizers(list(keys), list(grads))
        net.calibrate(list(keys), list(grads), [1.0, 2.0], 0.15, rows)
        etas.append(net.log_eta)
    for other in etas[1:]:
        torch.testing.assert_close(other, etas[0], rtol=0, atol=1e-12)
