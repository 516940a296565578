"""Losses per answer token: the values of torch's own, and what they take in memory."""

import pytest
import torch
import torch.nn.functional as F

from horse_plugin.method import losses
from tests.peak import Peak


def of_torch(logits, labels):
    return F.cross_entropy(logits.float(), labels, reduction="none")


def of_ours(logits, labels):
    return losses.cross_entropy(logits, labels, None, torch.float32)


def with_gradient(loss, logits, labels, weights):
    logits = logits.clone().requires_grad_()
    nats = loss(logits, labels)
    (nats * weights).sum().backward()
    return nats.detach(), logits.grad


def equation(logits, labels, weights):
    """−log p of the labels and its gradient, w(p − 1) at a label and wp elsewhere, in float64."""
    p = logits.double().softmax(-1)
    nats = -p.gather(1, labels[:, None])[:, 0].log()
    return nats, weights[:, None] * (p - F.one_hot(labels, logits.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_cross_entropy_in_chunks_has_the_bits_of_the_whole(n, dtype, monkeypatch):
    torch.manual_seed(0)
    parts = torch.randn(n, 400).to(dtype), torch.arange(n), torch.rand(n)
    whole, by_torch = (with_gradient(loss, *parts) for loss in (of_ours, of_torch))
    monkeypatch.setattr(losses, "AT_ONCE", 7 * 400)
    found = with_gradient(of_ours, *parts)
    assert all(torch.equal(f, w) for f, w in zip(found, whole, strict=True))
    assert torch.equal(found[0], by_torch[0])
    if n:  # the gradient is as near to the equation as torch's own, but for one rounding
        errors = [(g - equation(*parts)[1]).abs().max() for _, g in (found, by_torch)]
        assert errors[0] <= errors[1].clamp(min=torch.finfo(torch.float32).eps / 2)


def test_cross_entropy_takes_little_more_than_the_gradient(monkeypatch):
    monkeypatch.setattr(losses, "AT_ONCE", 10 * 400)
    logits, labels = torch.randn(1000, 400).bfloat16().requires_grad_(), torch.arange(1000) % 400
    taken = []
    for loss in (of_ours, of_torch):
        with Peak() as peak:
            loss(logits, labels).sum().backward()
        taken.append(peak.most / logits.nbytes)
        logits.grad = None
    assert taken[0] < 1.2 and taken[1] > 4
