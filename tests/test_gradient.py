"""Eq. 7 gives *the* gradient: autograd through the whole differentiable edit says the same."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from horse_plugin.data.prompts import Prompt, tokenize
from horse_plugin.editing.editor import new_network
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import trace
from horse_plugin.training.objective import KINDS, Objective, backward

# Llama computes its norms and rotations in float32 whatever the model's dtype; GPT-2 does not.
TOLERANCE = {"llama": 1e-4, "gpt2": 1e-8}


def differentiable_loss(backbone, network, traced, prompts, hparams):
    """The loss of the edited model as one graph: plain solve, functional call, full logits."""
    model, weights = backbone.model, {}
    residuals = network.residuals(traced.keys, traced.grads)
    for l, (name, module) in enumerate(backbone.modules.items()):
        h, r = traced.keys[l], residuals[l]
        ridge = h.T @ h + network.lamda[l].exp() * torch.eye(h.shape[1], dtype=h.dtype)
        shift = torch.linalg.solve(ridge, h.T @ r)
        weight = module.weight.detach()
        weights[f"{name}.weight"] = weight + (
            shift.T if isinstance(module, torch.nn.Linear) else shift
        )
    total = 0
    coefs = (hparams.edit_coef, hparams.gen_coef, hparams.loc_coef)
    for kind, coef in zip(KINDS, coefs, strict=True):
        losses = []
        for p in prompts[kind]:
            ids = torch.tensor([p.inputs])
            logits = torch.func.functional_call(model, weights, (ids,)).logits[0, p.start - 1 :]
            if kind == "unrelated" and hparams.loc_loss == "kl":
                with torch.no_grad():
                    before = model(ids).logits[0, p.start - 1 :].log_softmax(-1)
                losses.append((before.exp() * (before - logits.log_softmax(-1))).sum(-1))
            else:
                losses.append(F.cross_entropy(logits, torch.tensor(p.answer), reduction="none"))
        total = total + coef * torch.cat(losses).mean()
    return total


def case(architecture, **changes):
    hparams = tiny.hparams(edit_coef=0.7, gen_coef=1.3, loc_coef=0.9, batch_tokens=40, **changes)
    model = tiny.model(architecture, torch.float64)
    backbone = Backbone(model, tiny.bpe_tokenizer())
    records = tiny.records()
    tok = backbone.tokenizer
    prompts = {
        "edit": tokenize(tok, [r.edit for r in records]),
        "rephrase": tokenize(tok, [q for r in records for q in r.equivalent]),
        "unrelated": tokenize(tok, [q for r in records for q in r.unrelated]),
    }
    network = new_network(backbone, hparams)
    for p in network.groups.parameters():  # away from the identity
        p.data.add_(torch.randn_like(p), alpha=0.3)
    network.lamda.data.uniform_(-1, 1)
    traced = trace(backbone, prompts["edit"], 40)
    network.update_normalizers(traced.keys, traced.grads)
    network.calibrate(traced.keys, traced.grads, traced.value_norms, 0.3)
    return hparams, backbone, network, traced, prompts


@pytest.mark.parametrize("loc_loss", ["ce", "kl"])
@pytest.mark.parametrize("spread", ["orthogonal", "gram_schmidt", "uniform", "decay"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_training_gradient_is_the_gradient(architecture, spread, loc_loss):
    hparams, backbone, network, traced, prompts = case(
        architecture, spread=spread, spread_strength=0.8, loc_loss=loc_loss
    )
    want_loss = differentiable_loss(backbone, network, traced, prompts, hparams)
    names = [n for n, _ in network.named_parameters()]
    want = torch.autograd.grad(want_loss, list(network.parameters()), allow_unused=True)

    objective = Objective(backbone, prompts, hparams)

    def shifts_to_gradients(shifts):
        with backbone.shifted(dict(zip(backbone.modules, shifts, strict=True))):
            return objective.gradients()

    losses = backward(network, traced, shifts_to_gradients)
    coefs = (hparams.edit_coef, hparams.gen_coef, hparams.loc_coef)
    assert sum(c * losses[k] for k, c in zip(KINDS, coefs, strict=True)) == pytest.approx(
        want_loss.item()
    )
    for name, p, g in zip(names, network.parameters(), want, strict=True):
        if g is None:  # the spread's strength, where the spread has none
            assert name == "spread_strength" and spread in ("uniform", "decay")
            continue
        assert g.abs().max() > 0, name
        error = (p.grad - g).abs().max() / g.abs().max()
        assert error < TOLERANCE[architecture], (name, error)


def test_more_tokens_than_features_uses_the_primal_and_agrees():
    hparams, backbone, network, _, prompts = case("llama")
    many = [Prompt(p.ids, max(1, len(p.ids) - 9)) for p in prompts["edit"] + prompts["unrelated"]]
    traced = trace(backbone, many, 40)
    assert len(traced.keys[0]) > traced.keys[0].shape[1]
    want = differentiable_loss(backbone, network, traced, prompts, hparams)
    want = torch.autograd.grad(want, [network.lamda, network.log_eta])
    objective = Objective(backbone, prompts, hparams)

    def shifts_to_gradients(shifts):
        with backbone.shifted(dict(zip(backbone.modules, shifts, strict=True))):
            return objective.gradients()

    backward(network, traced, shifts_to_gradients)
    torch.testing.assert_close(network.lamda.grad, want[0], atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(network.log_eta.grad, want[1], atol=1e-12, rtol=1e-6)
