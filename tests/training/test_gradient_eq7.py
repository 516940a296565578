"""Eq. 7 gives *the* gradient: autograd through the whole differentiable edit says the same."""

import pytest
import torch
import torch.nn.functional as F

from horse_plugin.data.prompts import Prompt
from horse_plugin.editing.solve import new_network, residuals_of
from horse_plugin.editing.sweeps import sweeps
from horse_plugin.method.metric import inverse_root, metric_of
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.training.objective import LOSS_ON, TRAINED_ON, Objective
from tests import tiny
from tests.fast import fast

# Llama computes its norms and rotations in float32 whatever the model's dtype; GPT-2 does not.
TOLERANCE = {"llama": 1e-4, "gpt2": 1e-8}


def differentiable_loss(backbone, network, captures, prompts, hparams, ordinary=(), metrics=None):
    """The loss of the edited model as one graph: plain solve, functional call, full logits."""
    model, weights = backbone.model, {}
    captures = captures if isinstance(captures, tuple) else (captures,)
    swept = [residuals_of(network, c, hparams) for c in captures]
    for l, (name, module) in enumerate(backbone.modules.items()):
        h, r = captures[-1].keys[l], torch.stack([rs[l] for rs in swept]).sum(0)
        metric = torch.eye(h.shape[1], dtype=h.dtype) if metrics is None else metrics[l]
        ridge = h.T @ h + network.lamda[l].exp() * metric
        shift = torch.linalg.solve(ridge, h.T @ r)
        weight = module.weight.detach()
        weights[f"{name}.weight"] = weight + (
            shift.T if isinstance(module, torch.nn.Linear) else shift
        )
    total = 0
    loss_on = {"edit": "ce", "rephrase": "ce", "unrelated": hparams.loc_loss, "ordinary": "kl"}
    for kind, coef in coefs_of(hparams).items():
        losses = []
        for p in ordinary if kind == "ordinary" else prompts.flat(kind):
            ids, loss = torch.tensor([p.inputs]), 0
            logits = torch.func.functional_call(model, weights, (ids,)).logits[0, p.start - 1 :]
            if "kl" in loss_on[kind]:
                with torch.no_grad():
                    before = model(ids).logits[0, p.start - 1 :].log_softmax(-1)
                loss = (before.exp() * (before - logits.log_softmax(-1))).sum(-1)
            if "ce" in loss_on[kind]:
                loss = loss + F.cross_entropy(logits, torch.tensor(p.answer), reduction="none")
            losses.append(loss)
        if losses:
            total = total + coef * torch.cat(losses).mean()
    return total


def alone(network, captured, hparams):
    """What ``backward`` takes for an edit of one sweep."""
    with torch.no_grad():
        return (captured,), residuals_of(network, captured, hparams)


def coefs_of(hparams):
    weights = hparams.edit_coef, hparams.gen_coef, hparams.loc_coef, hparams.keep_coef
    return dict(zip(LOSS_ON, weights, strict=True))


def case(architecture, **changes):
    hparams = tiny.hparams(edit_coef=0.7, gen_coef=1.3, loc_coef=0.9, batch_tokens=40, **changes)
    model = tiny.model(architecture, torch.float64)
    backbone = Backbone(model, tiny.bpe_tokenizer(), batch_tokens=40)
    records = tiny.records()
    prompts = backbone.prepare(records, TRAINED_ON)
    network = new_network(backbone, hparams)
    for p in network.groups.parameters():  # away from the identity
        p.data.add_(torch.randn_like(p), alpha=0.3)
    network.lamda.data.uniform_(-1, 1)
    captured = capture(backbone, prompts.flat("edit"))
    network.update_normalizers(captured.keys, captured.grads)
    network.calibrate_eta(captured.keys, captured.grads, captured.value_norms, 0.3)
    return hparams, backbone, network, captured, prompts


@pytest.mark.parametrize("loc_loss", ["ce", "kl"])
@pytest.mark.parametrize("spread", ["orthogonal", "gram_schmidt", "released", "uniform", "decay"])
@pytest.mark.parametrize("architecture", fast(["llama", "gpt2"], ["llama"]))
def test_the_training_gradient_is_the_gradient(architecture, spread, loc_loss):
    hparams, backbone, network, captured, prompts = case(
        architecture, spread=spread, spread_strength=0.8, loc_loss=loc_loss
    )
    want_loss = differentiable_loss(backbone, network, captured, prompts, hparams)
    names = [n for n, _ in network.named_parameters()]
    want = torch.autograd.grad(want_loss, list(network.parameters()), allow_unused=True)

    losses = Objective(backbone, prompts, hparams).backward(
        network, *alone(network, captured, hparams)
    )
    assert losses.pop("ordinary") is None
    assert weighted(losses, hparams) == pytest.approx(want_loss.item())
    for name, p, g in zip(names, network.parameters(), want, strict=True):
        if g is None:  # the spread's strength, where the spread has none
            assert name == "spread_strength" and spread in ("uniform", "decay")
            continue
        assert g.abs().max() > 0, name
        error = (p.grad - g).abs().max() / g.abs().max()
        assert error < TOLERANCE[architecture], (name, error)


def weighted(losses, hparams):
    return sum(coefs_of(hparams)[kind] * loss for kind, loss in losses.items())


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("loc_loss", ["ce", "ce+kl"])
@pytest.mark.parametrize("architecture", fast(["llama", "gpt2"], ["gpt2"]))
def test_with_a_metric_and_ordinary_text_it_is_the_gradient_too(architecture, loc_loss, many):
    hparams, backbone, network, captured, prompts = case(
        architecture, loc_loss=loc_loss, keep_coef=0.6, preserve="shipped"
    )
    ordinary = [Prompt(p.ids, 1) for p in prompts.flat("unrelated")]
    if many:  # more tokens than features: the primal
        prompts_of = prompts.flat("edit", "unrelated")
        captured = capture(backbone, [Prompt(p.ids, max(1, len(p.ids) - 9)) for p in prompts_of])
    metrics = []
    for h in captured.keys:
        k = torch.randn(200, h.shape[1], dtype=h.dtype) * torch.linspace(0.1, 3, h.shape[1])
        metrics.append(metric_of(k.T @ k, 0.01))
    roots = [inverse_root(metric) for metric in metrics]
    want_loss = differentiable_loss(
        backbone, network, captured, prompts, hparams, ordinary, metrics
    )
    want = torch.autograd.grad(want_loss, list(network.parameters()))
    losses = Objective(backbone, prompts, hparams, ordinary, roots).backward(
        network, *alone(network, captured, hparams)
    )
    assert losses["ordinary"] > 0
    assert weighted(losses, hparams) == pytest.approx(want_loss.item())
    for (name, p), g in zip(network.named_parameters(), want, strict=True):
        error = (p.grad - g).abs().max() / g.abs().max()
        assert error < TOLERANCE[architecture], (name, error)


@pytest.mark.parametrize("cap", [None, 0.2])
def test_of_several_sweeps_each_adds_its_residuals(cap):
    hparams, backbone, network, captured, prompts = case(
        "gpt2", edit_sweeps=3, normalizer="scale", residual_cap=cap
    )
    if cap:
        network.calibrate_cap(captured.value_norms, cap)
    roots = [None] * len(backbone.modules)
    parts = captured, hparams, roots
    captures, totals = zip(*sweeps(backbone, network, *parts), strict=True)
    assert len(captures) == 3
    assert not torch.equal(captures[1].grads[0], captures[2].grads[0])
    want_loss = differentiable_loss(backbone, network, captures, prompts, hparams)
    want = torch.autograd.grad(want_loss, list(network.parameters()))
    losses = Objective(backbone, prompts, hparams).backward(network, captures, totals[-1])
    assert losses.pop("ordinary") is None
    assert weighted(losses, hparams) == pytest.approx(want_loss.item())
    for (name, p), g in zip(network.named_parameters(), want, strict=True):
        assert (p.grad - g).abs().max() < 1e-8 * g.abs().max(), name


def test_half_precision_loses_no_gradient_of_ordinary_text():
    """A token's share of the loss, divided among a thousand, is less than fp16 can hold."""

    def gradients(dtype):
        model = tiny.model("llama", torch.float16).to(dtype)
        hparams = tiny.hparams(edit_coef=1e-9, gen_coef=0.0, loc_coef=0.0, keep_coef=1.0)
        backbone = Backbone.of(model, tiny.bpe_tokenizer(), hparams)
        draw = torch.Generator().manual_seed(1)
        text = [torch.randint(3, 399, (65,), generator=draw).tolist() for _ in range(8)]
        prompts = backbone.prepare(tiny.records(2), TRAINED_ON)
        objective = Objective(backbone, prompts, hparams, [Prompt(tuple(ids), 1) for ids in text])
        for module in backbone.modules.values():
            shift = 0.01 * torch.randn(module.weight.shape, generator=draw)
            module.weight.data += shift.half()
            module.weight.data = module.weight.data.half().to(dtype)
        return objective.weight_gradients()[1]

    for found, wanted in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_more_tokens_than_features_uses_the_primal_and_agrees():
    hparams, backbone, network, _, prompts = case("llama")
    many = [Prompt(p.ids, max(1, len(p.ids) - 9)) for p in prompts.flat("edit", "unrelated")]
    captured = capture(backbone, many)
    assert len(captured.keys[0]) > captured.keys[0].shape[1]
    want = differentiable_loss(backbone, network, captured, prompts, hparams)
    want = torch.autograd.grad(want, [network.lamda, network.log_eta])
    Objective(backbone, prompts, hparams).backward(network, *alone(network, captured, hparams))
    torch.testing.assert_close(network.lamda.grad, want[0], atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(network.log_eta.grad, want[1], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("coefficient", ["token", "edit_only", "none"])
def test_without_c_i_of_eq_4_the_residual_is_eta_times_the_gradient(coefficient):
    hparams = tiny.hparams(coefficient=coefficient, spread="uniform", lr=0.5)
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    network = new_network(backbone, hparams)
    captured = capture(backbone, backbone.prepare(tiny.records(), ["edit"]).flat())
    network.update_normalizers(captured.keys, captured.grads)
    edit = network.residuals(captured.keys, captured.grads)[0]
    loss = network.residuals(captured.keys, captured.grads, in_loss=True)[0]
    pseudo = network(0, captured.keys[0], captured.grads[0])[1]
    assert torch.allclose(edit, -0.5 * pseudo) == (coefficient == "none")
    assert torch.allclose(loss, -0.5 * pseudo) == (coefficient != "token")
    edits = backbone.prepare(tiny.records(), TRAINED_ON)
    Objective(backbone, edits, hparams).backward(network, *alone(network, captured, hparams))
    assert network.log_eta.grad.abs().sum() > 0
