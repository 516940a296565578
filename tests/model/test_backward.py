"""Gradients of the positions from a prompt's first key on are those of the whole backward pass."""

import pytest
import torch

from horse_plugin.data.batches import batches
from horse_plugin.data.prompts import Prompt
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from tests import tiny
from tests.model.test_backbone import prompts


def both_captures(backbone, made):
    """The capture of prompts, and one whose backward passes leave no position out."""
    assert backbone.late_backward
    late = capture(backbone, made)
    backbone.late_backward = False
    return late, capture(backbone, made)


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_a_capture_has_the_gradients_of_the_whole_backward_pass(architecture):
    late, whole = both_captures(
        Backbone(tiny.model(architecture), None, batch_tokens=40), prompts()
    )
    for found, wanted in zip(late.grads, whole.grads, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.any(-1).all()


def test_gradients_where_the_subject_ends_are_those_of_the_whole_backward_pass():
    made = [Prompt(p.ids, p.start, subject=p.start // 2) for p in prompts()]
    names = [f"model.layers.{i}.mlp.down_proj" for i in (2, 4, 6)]
    late, whole = both_captures(Backbone(tiny.model(), None, names, token="subject"), made)
    for found, wanted in zip(late.grads, whole.grads, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.any(-1).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_linear_maps_have_gradients_at_late_positions_only(architecture):
    backbone = Backbone(tiny.model(architecture), None, batch_tokens=99)
    (batch,) = batches(prompts()[:3], 99)
    states = backbone.trunk(batch).requires_grad_()
    of_products = []

    def seen(module, grad_input, grad_output):
        if grad_input[0].shape[:2] == batch.ids.shape:
            of_products.append(grad_input[0].detach().flatten(0, -2).any(-1).nonzero()[:, 0])

    attention = [m for n, m in backbone.blocks[4].named_modules() if n.endswith("_proj")]
    assert attention
    for module in attention:
        module.register_full_backward_hook(seen)
    with backbone.late_gradients(batch):
        logits = backbone.top(batch, states.clone())
    logits.logsumexp(-1).sum().backward()
    late = batch.late()
    first = [p.start - 1 for p in batch.prompts]
    width = batch.ids.shape[1]
    assert late.tolist() == [
        i * width + at for i, p in enumerate(batch.prompts) for at in range(first[i], len(p.inputs))
    ]
    assert of_products and all(torch.equal(rows, late) for rows in of_products)


class TokensFirst(torch.nn.Module):
    """A map that is given its positions in another order, tokens first."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_a_model_with_another_order_of_positions_has_whole_backward_passes():
    model, plain = tiny.model(), tiny.model()
    attention = model.model.layers[5].self_attn
    attention.o_proj = TokensFirst(attention.o_proj)
    backbone = Backbone(model, None, batch_tokens=99)
    assert not backbone.late_backward
    found, wanted = (capture(b, prompts()) for b in (backbone, Backbone(plain, None)))
    for a, b in zip(found.grads, wanted.grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
