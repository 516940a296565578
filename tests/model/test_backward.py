"""Gradients of the positions from a prompt's first key on are those of the whole backward pass."""

import pytest
import torch
import transformers

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


def captures_agree(backbone, plain):
    found, wanted = (capture(b, prompts()) for b in (backbone, plain))
    return all(
        torch.allclose(a, b, atol=1e-6, rtol=1e-4)
        for a, b in zip(found.grads, wanted.grads, strict=True)
    )


def test_others_may_write_into_what_a_linear_map_returns():
    model = tiny.model("gpt2")  # its maps return views
    model.transformer.h[5].attn.c_proj.register_forward_hook(lambda m, args, out: out.mul_(2))
    backbone = Backbone(model, None, batch_tokens=99)
    late, whole = both_captures(backbone, prompts())
    for found, wanted in zip(late.grads, whole.grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_model_that_clips_with_a_bias_has_late_gradients():
    sizes = {k: v for k, v in tiny._SIZES.items() if k != "head_dim"}
    config = transformers.OlmoConfig(**sizes, attention_bias=True, clip_qkv=0.01)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    late, whole = both_captures(Backbone(model, None, batch_tokens=99), prompts())
    for found, wanted in zip(late.grads, whole.grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_adapter_in_place_of_a_forward_pass_keeps_its_gradient():
    model, plain = tiny.model(), tiny.model()
    for m in (model, plain):
        torch.manual_seed(1)
        proj, more = m.model.layers[5].self_attn.o_proj, torch.nn.Linear(32, 32)
        proj.forward = lambda x, own=proj.forward, more=more: own(x) + more(x)
    backbone, whole = Backbone(model, None), Backbone(plain, None)
    assert backbone.late_backward
    whole.late_backward = False
    assert captures_agree(backbone, whole)


class ByName(torch.nn.Module):
    """A map that calls its own with a keyword."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(input=x)


def test_a_linear_map_may_be_called_with_a_keyword():
    model = tiny.model()
    attention = model.model.layers[5].self_attn
    attention.o_proj = ByName(attention.o_proj)
    assert captures_agree(Backbone(model, None), Backbone(tiny.model(), None))


class OneWay(torch.autograd.Function):
    """Computes forward, and cannot backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


def test_a_model_without_a_backward_pass_can_still_be_asked():
    model = tiny.model()
    model.model.layers[5].register_forward_hook(lambda m, args, out: OneWay.apply(out))
    backbone = Backbone(model, None)
    assert not backbone.late_backward
    (batch,) = batches(prompts(), 4096)
    assert backbone.logits(batch).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_another_order_of_positions_has_whole_backward_passes(dtype):
    model, plain = tiny.model(dtype=dtype), tiny.model(dtype=dtype)
    attention = model.model.layers[5].self_attn
    attention.o_proj = TokensFirst(attention.o_proj)
    backbone, whole = Backbone(model, None), Backbone(plain, None)
    assert not backbone.late_backward
    whole.late_backward = False
    assert captures_agree(backbone, whole)
