"""Eq. 2: the ridge closed form, dual and primal, well and ill conditioned."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horse_plugin import HorseError
from horse_plugin.method.metric import inverse_root, metric_of
from horse_plugin.method.ridge import SUMS_IN_FLOAT32, Ridge, doubles_are_fast
from tests import oracle
from tests.numbers import arrays, close


@given(
    n=st.integers(1, 14),
    d=st.integers(1, 14),
    d_out=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    preserve=st.booleans(),
)
@settings(deadline=None)
def test_dual_and_primal_agree(n, d, d_out, seed, preserve):
    h, r, g, x = map(torch.tensor, arrays(seed, (n, d), (n, d_out), (d, d_out), (5, d)))
    root = inverse_root(metric_of(x.T @ x, 0.1)) if preserve else None
    here, other = Ridge(h, 0.5, root), Ridge(h, 0.5, root)
    other.dual = not here.dual
    h = h @ root if preserve else h
    gram = h @ h.T if other.dual else h.T @ h
    other._factor = torch.linalg.cholesky(gram + 0.5 * torch.eye(len(gram), dtype=h.dtype))
    close(here.shift(r), other.shift(r))
    shift = here.shift(r)
    for one, two in zip(here.gradients(g, shift), other.gradients(g, shift), strict=True):
        close(one, two)


@pytest.mark.parametrize("n", [4, 30])
def test_the_metric_is_that_of_the_equations(n):
    h, r, g, x = arrays(1, (n, 12), (n, 5), (12, 5), (9, 12))
    want_metric = oracle.metric(x, 0.05)
    metric = metric_of(torch.tensor(x.T @ x), 0.05)
    close(metric, want_metric)
    ridge = Ridge(torch.tensor(h), np.exp(0.3), inverse_root(metric))
    assert ridge.dual == (n < 12)
    shift = ridge.shift(torch.tensor(r))
    close(shift, oracle.shift(h, r, 0.3, want_metric))
    form = ridge.smallest_form(torch.tensor(r))
    close(form["shift"] if "shift" in form else form["keys"].T @ form["factors"], shift)
    inverse = np.linalg.inv(h.T @ h + np.exp(0.3) * want_metric)
    residual_grad, lamda_grad = ridge.gradients(torch.tensor(g), shift)
    close(residual_grad, h @ inverse @ g)
    close(lamda_grad, -np.exp(0.3) * np.sum((want_metric @ inverse @ g) * shift.numpy()))


@pytest.mark.parametrize("n", [4, 30])
def test_a_row_moves_its_leverage_of_its_residual(n):
    h, x = arrays(1, (n, 12), (9, 12))
    metric = oracle.metric(x, 0.05)
    hat = h @ np.linalg.inv(h.T @ h + 0.7 * metric) @ h.T
    alone = np.trace(h @ np.linalg.inv(metric) @ h.T) / n
    ridge = Ridge(torch.tensor(h), 0.7, inverse_root(torch.tensor(metric)))
    close(ridge.crowding(), (np.trace(hat) / n, alone / (alone + 0.7)))


def test_directions_that_ordinary_text_uses_are_spared():
    """Two facts that share a common direction move it less than the paper's ridge does."""
    common, h = torch.eye(8)[0], torch.eye(8)[1:3] + torch.eye(8)[0]
    text = 5 * torch.randn(100, 1) * common + 0.1 * torch.randn(100, 8)
    root = inverse_root(metric_of(text.T @ text, 0.01)).float()
    paper, spared = (Ridge(h, 0.1, w).shift(torch.ones(2, 3)) for w in (None, root))
    assert (common @ spared).norm() < 0.05 * (common @ paper).norm()
    assert (h @ spared - 1).norm() < (h @ torch.zeros(8, 3) - 1).norm() / 2


def test_a_metric_of_text_without_keys_is_refused():
    with pytest.raises(HorseError, match="zero or not finite"):
        metric_of(torch.zeros(3, 3), 0.1)


def test_few_tokens_give_factors_that_multiply_to_the_shift():
    h, r = map(torch.tensor, arrays(0, (3, 48), (3, 32)))
    ridge = Ridge(h, 1.0)
    assert ridge.dual
    form = ridge.smallest_form(r)
    close(form["keys"].T @ form["factors"], ridge.shift(r))
    many = Ridge(torch.randn(30, 48), 1.0).smallest_form(torch.randn(30, 32))
    assert set(form) == {"keys", "factors"} and set(many) == {"shift"}


def test_an_ill_conditioned_system_is_solved_in_float64_with_a_warning():
    h = torch.ones(6, 9) * 1e4  # six equal tokens: the Gram matrix has rank one
    with pytest.warns(UserWarning, match="float64"):
        ridge = Ridge(h, 1e-6)
    want = oracle.shift(h.double().numpy(), np.ones((6, 2)), np.log(1e-6))
    close(ridge.shift(torch.ones(6, 2)), want, 1e-3)


def test_where_float64_is_fast_it_comes_first(monkeypatch, recwarn):
    where = "horse_plugin.method.ridge.torch.cuda.get_device_capability"
    monkeypatch.setattr(where, lambda device: (9, 0) if device.index == 0 else (8, 9))
    fast = [doubles_are_fast(torch.device(*of)) for of in (("cuda", 0), ("cuda", 1), ("cpu",))]
    assert fast == [True, False, False]
    monkeypatch.setattr("horse_plugin.method.ridge.doubles_are_fast", lambda device: True)
    h = torch.ones(6, 9) * 1e4
    want = oracle.shift(h.double().numpy(), np.ones((6, 2)), np.log(1e-6))
    close(Ridge(h, 1e-6).shift(torch.ones(6, 2)), want, 1e-3)
    assert not recwarn


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


@pytest.mark.parametrize("n", [30, 5])
def test_keys_in_half_precision_give_the_bits_of_the_same_in_float32(n):
    keys, r = (torch.tensor(a, dtype=torch.float32) for a in arrays(0, (n, 6), (n, 3)))
    half = keys.bfloat16()
    found, wanted = Ridge(half, 1.0), Ridge(half.float(), 1.0)
    assert torch.equal(found.shift(r), wanted.shift(r)) and found.shift(r).dtype == torch.float32


def test_a_gpu_sums_products_of_half_precision_in_float32():
    """The call as torch has it; what it computes is for a GPU to say."""
    if not SUMS_IN_FLOAT32:
        pytest.skip("torch before 2.8")
    keys = torch.empty(5, 3, dtype=torch.bfloat16, device="meta")
    gram = torch.mm(keys.T, keys, out_dtype=torch.float32)
    assert gram.shape == (3, 3) and gram.dtype == torch.float32
