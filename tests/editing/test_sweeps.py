"""Sweeps: what holds is left out, all is read again before the end, and the end comes early."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from horse_plugin.editing import sweeps as module
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.sweeps import sweeps
from horse_plugin.model import capture as capture_module
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from tests import tiny


@pytest.fixture
def editor():
    hparams = tiny.hparams(edit_sweeps=5, normalizer="scale", residual_cap=0.5)
    return HorseEditor.from_backbone(Backbone(tiny.model(), tiny.bpe_tokenizer()), hparams)


def swept(editor, monkeypatch, probability):
    """The sweeps of an edit with another limit of what holds, and which prompts each ran."""
    monkeypatch.setattr(capture_module, "HOLDS", probability)
    prompts = editor.backbone.prepare(tiny.records(), ["edit"]).to_capture()
    first, ran = capture(editor.backbone, prompts), []

    def counted(backbone, prompts, earlier, skip_held):
        ran.append(int((~earlier.holds).sum()) if skip_held else len(first.holds))
        return capture(backbone, prompts, earlier, skip_held)

    monkeypatch.setattr(module, "capture", counted)
    network = editor.untrained_network(first)
    parts = editor.backbone, network, prompts, first, editor.hparams, editor.roots
    return list(sweeps(*parts)), ran, first


def test_prompts_that_hold_are_not_run_again():
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    prompts = backbone.prepare(tiny.records(), ["edit"]).to_capture()
    first = capture(backbone, prompts)
    held = first.record_of_row == 1
    read = []
    run, trunk = backbone.top, backbone.trunk
    backbone.trunk = lambda batch: (read.extend(batch.prompts), trunk(batch))[1]
    again = capture(backbone, prompts, replace(first, holds=held), skip_held=True)
    assert backbone.top == run and sorted(map(prompts.index, read)) == [0, 2, 3, 4, 5]
    for l in range(len(first.keys)):
        torch.testing.assert_close(again.keys[l], first.keys[l])
        torch.testing.assert_close(again.grads[l][~held], first.grads[l][~held])
        assert (again.grads[l][held] == 0).all()
    assert again.predicted.keys() == first.predicted.keys()
    assert again.value_norms == first.value_norms
    assert again.holds.tolist() == held.tolist()


def test_an_answer_holds_if_each_of_its_tokens_does(monkeypatch):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    prompts = backbone.prepare(tiny.records(), ["edit"]).to_capture()
    least = []
    for p in prompts:
        logits = backbone.model(torch.tensor([p.inputs])).logits[0, p.start - 1 :].softmax(-1)
        least.append(logits.gather(1, torch.tensor(p.answer)[:, None]).min().item())
    monkeypatch.setattr(capture_module, "HOLDS", sorted(least)[3] * 0.999)
    captured = capture(backbone, prompts)
    wanted = [least[i] >= capture_module.HOLDS for i in captured.record_of_row.tolist()]
    assert captured.holds.tolist() == wanted
    assert 0 < sum(wanted) < len(wanted)


def test_none_holds(editor, monkeypatch):
    found, ran, first = swept(editor, monkeypatch, 1.1)
    assert len(found) == 5
    assert ran == [len(first.holds)] * 4


def test_all_hold_after_one_sweep(editor, monkeypatch):
    found, ran, first = swept(editor, monkeypatch, 1e-9)
    assert len(found) == 1  # and the check that all hold
    assert ran == [len(first.holds)]


def test_what_holds_adds_nothing_and_all_are_read_before_the_end(editor, monkeypatch):
    _, _, first = swept(editor, monkeypatch, 1.1)
    prompts = list(first.predicted)
    with torch.no_grad():
        logits = [editor.backbone.model(torch.tensor([p.inputs])).logits[0, -1] for p in prompts]
    likely = sorted(
        x.softmax(-1)[p.answer[-1]].item() for x, p in zip(logits, prompts, strict=True)
    )
    found, ran, first = swept(editor, monkeypatch, likely[-2])
    everything = len(first.holds)
    assert ran[0] == ran[-1] == everything
    assert any(n < everything for n in ran[1:-1])
    for (_, before), (captured, after) in itertools.pairwise(found):
        assert captured.holds.any()
        for r, total in zip(before, after, strict=True):
            assert torch.equal(r[captured.holds], total[captured.holds])
            assert not torch.equal(r[~captured.holds], total[~captured.holds])


def test_what_follows_an_answer_counts_once_it_is_less_likely():
    """Against plain forward and backward passes: its loss above what it may cost, and no more."""
    model, tokenizer = tiny.model(), tiny.bpe_tokenizer()
    backbone = Backbone(model, tokenizer)
    edits = backbone.prepare(tiny.records(), ["edit"])
    prompts = edits.to_capture(ends=True)
    plain, first = capture(backbone, edits.flat()), capture(backbone, prompts)
    ends = torch.tensor([i == n - 1 for n in (len(p.keys_at) for p in prompts) for i in range(n)])
    assert torch.equal(first.still, ends)  # nothing is lost yet
    assert list(first.predicted) == list(plain.predicted)
    for with_end, without in zip(first.grads, plain.grads, strict=True):
        torch.testing.assert_close(with_end[~ends], without)
        assert (with_end[ends] == 0).all()

    followed, allowed = first.followed
    for p, token, most in zip(prompts, followed.tolist(), allowed.tolist(), strict=True):
        said = model(torch.tensor([p.ids])).logits[0, -1].log_softmax(-1)
        assert token == said.argmax().item()
        assert most == pytest.approx(-said.max().item() + math.log(2), rel=1e-4)

    less = allowed - 1.0  # as if it had been likelier by far
    again = capture(backbone, prompts, replace(first, followed=(followed, less)))
    module = next(iter(backbone.modules.values()))
    p, rows = prompts[0], again.record_of_row == 0
    kept = []
    hook = module.register_forward_hook(lambda m, a, out: kept.append(out.requires_grad_()) or out)
    logits = model(torch.tensor([p.ids])).logits[0, p.start - 1 :]
    hook.remove()
    losses = -logits.log_softmax(-1).gather(1, torch.tensor([*p.answer, followed[0]])[:, None])
    loss = losses[:-1].sum() + (losses[-1] - less[0]).relu().sum()
    (grad,) = torch.autograd.grad(loss, kept)
    torch.testing.assert_close(again.grads[0][rows], grad[0, p.start - 1 :], atol=1e-5, rtol=1e-4)
    assert not again.still.any() and not again.holds.any()
