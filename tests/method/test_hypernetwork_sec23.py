"""Sec. 2.3: the hypernetwork, its normaliser, and how η and λ start."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horse_plugin.method.hypernetwork import HyperNetwork, Normalizer, ResidualBlock
from horse_plugin.method.spread import SPREADS
from tests import oracle
from tests.numbers import arrays, close


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


def test_with_one_scale_directions_stay_as_they_are():
    net = HyperNetwork([(4, 2)], rank=3, n_blocks=2, normalizer="scale")
    keys, grads = torch.randn(9, 4) * 3 + 1, torch.randn(9, 2) * 1e-3
    net.update_normalizers([keys], [grads])
    h, g = net(0, keys, grads)
    torch.testing.assert_close(h, keys / keys.square().mean().sqrt())
    torch.testing.assert_close(g, grads / grads.square().mean().sqrt())
    one = HyperNetwork([(4, 2)], rank=3, n_blocks=2, normalizer="scale")
    one.update_normalizers([keys[:1]], [torch.zeros(1, 2)])  # a gradient of zero is no scale
    assert all(x.isfinite().all() for x in one(0, keys[:1], torch.zeros(1, 2)))


def test_a_cap_shortens_long_residuals_and_no_others():
    torch.manual_seed(0)
    free, net = (HyperNetwork([(4, 2)], 3, 1, normalizer="scale", has_cap=c) for c in (0, 1))
    net.load_state_dict(free.state_dict(), strict=False)
    keys, grads = [torch.randn(9, 4)], [torch.randn(9, 2)]
    grads[0][3] = 0
    for network in (free, net):
        network.update_normalizers(keys, grads)
        network.calibrate_eta(keys, grads, [2.0], 0.5)
    (want,) = free.residuals(keys, grads)
    torch.testing.assert_close(net.residuals(keys, grads)[0], want)  # none is set yet
    net.calibrate_cap([2.0], 0.4)
    (found,) = net.residuals(keys, grads)
    lengths = want.norm(dim=-1)
    assert (lengths > 0.8).any() and (lengths < 0.8).any()
    for row, wanted, length in zip(found, want, lengths, strict=True):
        torch.testing.assert_close(row, wanted * min(1, 0.8 / length.item()) if length else wanted)
    found.sum().backward()
    assert net.log_eta.grad.isfinite().all()


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_normalizer_sees_the_same_whatever_the_batches(sizes, seed):
    x = torch.tensor(arrays(seed, (sum(sizes), 3))[0])
    whole, parts = Normalizer((2, 1)), Normalizer((2, 1))
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
    net.calibrate_eta(keys, grads, [1.0, 2.0], 0.15)
    still, moved = net.residuals(keys, grads)
    assert (still == 0).all()
    assert moved.norm() > 0
    assert net.log_eta[0] == net.log_eta[1]


def test_without_any_residual_eta_stays_unset():
    net = HyperNetwork([(4, 2)], rank=3, n_blocks=1)
    keys, grads = [torch.randn(5, 4)], [torch.zeros(5, 2)]
    net.update_normalizers(keys, grads)
    net.calibrate_eta(keys, grads, [1.0], 0.15)
    assert not net.has_eta


@given(
    kind=st.sampled_from(sorted(SPREADS)),
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
    net.calibrate_eta(keys, grads, norms, strength)
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
    net.calibrate_eta(keys, grads, [1.0, 1.0], 0.1)
    for a, b in zip(net.residuals(keys, grads), net.residuals(keys, grads, rows=2), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spread", ["orthogonal", "uniform"])
def test_the_gradient_comes_chunk_by_chunk_and_is_that_of_the_whole(spread):
    keys, grads = ([torch.tensor(x) for x in a] for a in arrays(5, (3, 20, 6), (3, 20, 3)))
    torch.manual_seed(0)
    net = HyperNetwork([(6, 3)] * 3, rank=2, n_blocks=2, spread=spread).double()
    net.update_normalizers(keys, grads)
    net.calibrate_eta(keys, grads, [1.0] * 3, 0.1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sizes = []

    def found(backward):
        net.zero_grad()
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    def note(x):
        sizes.append(x.numel())
        return x

    def loss(residuals):
        return sum((r**3).sum() for r in residuals)

    def in_chunks():
        raw = [r.detach().requires_grad_() for r in net.raw_residuals(keys, grads)]
        loss(net.spread_out(raw, keys, grads)).backward()
        sizes.clear()
        net.backward([r.grad for r in raw], keys, grads, rows=4)

    want = found(lambda: loss(net.residuals(keys, grads)).backward())
    assert max(sizes) == 20 * 9  # all rows, as wide as keys and gradients
    for one, two in zip(found(in_chunks), want, strict=True):
        torch.testing.assert_close(one, two)
    assert max(sizes) == 4 * 9


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
        net.calibrate_eta(list(keys), list(grads), [1.0, 2.0], 0.15, rows)
        etas.append(net.log_eta)
    for other in etas[1:]:
        torch.testing.assert_close(other, etas[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("on", [False, True])
def test_products_are_in_tf32_inside_the_network_alone_and_if_asked(monkeypatch, on):
    """Forward and backward; a CPU has no TF32, so that only the switch is seen."""
    network, of_gpus, seen = HyperNetwork([(6, 4)], 2, 1), torch.backends.cuda.matmul, []
    network.tf32, before = on, of_gpus.fp32_precision
    torch.nn.init.zeros_(network.log_eta)
    forward = ResidualBlock.forward

    def watched(*args):
        y = forward(*args)
        seen.append(of_gpus.fp32_precision)
        if y.requires_grad:
            y.register_hook(lambda _: seen.append(of_gpus.fp32_precision))
        return y

    monkeypatch.setattr(ResidualBlock, "forward", watched)
    pair = [torch.randn(3, 6)], [torch.randn(3, 4)]
    with torch.no_grad():
        network.raw_residuals(*pair)
    network.backward([torch.ones(3, 4)], *pair)
    assert seen == ["tf32" if on else before] * 3 and of_gpus.fp32_precision == before != "tf32"
    assert torch.get_float32_matmul_precision() == "highest"
