"""Sweeps: what holds gets no more, and the end comes early."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from horse_plugin.editing import sweeps as module
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.solve import residuals_of
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
    """The sweeps of an edit with another limit of what holds, and how many captures they took."""
    monkeypatch.setattr(capture_module, "HOLDS", probability)
    prompts = editor.backbone.prepare(tiny.records(), ["edit"]).to_capture()
    first, ran = capture(editor.backbone, prompts), []

    def counted(*args):
        ran.append(args)
        return capture(*args)

    monkeypatch.setattr(module, "capture", counted)
    network = editor.untrained_network(first)
    parts = editor.backbone, network, first, editor.hparams, editor.roots
    return list(sweeps(*parts)), len(ran), first


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
    found, n_captures, _ = swept(editor, monkeypatch, 1.1)
    assert len(found) == 5 and n_captures == 4


def test_all_hold_after_one_sweep(editor, monkeypatch):
    found, n_captures, _ = swept(editor, monkeypatch, 1e-9)
    assert len(found) == 1 and n_captures == 1  # the capture that says so


def between(editor, monkeypatch):
    """A probability that some answers have, and others have not."""
    _, _, first = swept(editor, monkeypatch, 1.1)
    return math.exp(-first.losses.sort().values[1].item())


def test_what_holds_gets_no_more(editor, monkeypatch):
    found, _, _ = swept(editor, monkeypatch, between(editor, monkeypatch))
    for (_, before), (captured, after) in itertools.pairwise(found):
        assert captured.holds.any()
        for r, total in zip(before, after, strict=True):
            assert torch.equal(r[captured.holds], total[captured.holds])
            assert not torch.equal(r[~captured.holds], total[~captured.holds])


def test_the_end_comes_when_few_are_left_and_a_sweep_gains_little(editor, monkeypatch):
    everything, limit = len(swept(editor, monkeypatch, 1.1)[0]), between(editor, monkeypatch)
    monkeypatch.setattr(module, "FEW", 1.0)
    monkeypatch.setattr(module, "edit_residuals", lambda b, n, c, h: [0 * g for g in c.grads])
    found, n_captures, _ = swept(editor, monkeypatch, limit)
    assert len(found) == n_captures == 2 < everything


@pytest.mark.parametrize("block", [3, 8192])
def test_an_edit_asks_for_the_probability_that_it_is_told(editor, monkeypatch, block):
    facts, limit = tiny.records(), between(editor, monkeypatch)

    def shift(probability, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(capture_module, "HOLDS", probability)
            hparams = replace(editor.hparams, edit_block=block, **changes)
            one = HorseEditor.from_backbone(editor.backbone, hparams)
            (shift, *_) = one.edit(facts).shifts.values()
            one.undo()
        return shift

    told = shift(0.9, edit_holds=limit)
    assert torch.equal(told, shift(limit))
    assert not torch.equal(told, shift(0.9))


def test_a_token_that_costs_little_asks_for_little(editor):
    captured = editor.capture(tiny.records())
    network, row = editor.untrained_network(captured), torch.arange(len(captured.losses)) == 0
    captured.losses = torch.where(row, 0.3, captured.losses.clamp(min=2.0))
    whole = residuals_of(network, captured, editor.hparams)
    some = residuals_of(network, captured, replace(editor.hparams, full_loss=1.5))
    for a, b in zip(whole, some, strict=True):
        torch.testing.assert_close(b[row], 0.2 * a[row])
        assert torch.equal(b[~row], a[~row])


def test_only_what_fell_of_what_held_runs_backward():
    """Keys are those of a whole capture everywhere, gradients where an answer does not hold."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    prompts = backbone.prepare(tiny.records(), ["edit"]).to_capture()
    whole = capture(backbone, prompts)
    assert not whole.holds.any()
    again = capture(backbone, prompts, replace(whole, holds=torch.ones_like(whole.holds)))
    for name in ("keys", "grads"):
        for a, b in zip(getattr(whole, name), getattr(again, name), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "HOLDS", math.exp(-whole.losses.sort().values[1].item()))
        first = capture(backbone, prompts)
        second = capture(backbone, prompts, first)
    assert torch.equal(first.holds, second.holds) and first.holds.any()
    for before, after, all_of in zip(first.grads, second.grads, whole.grads, strict=True):
        assert (before[first.holds] != 0).any()  # nobody knew yet
        assert (after[first.holds] == 0).all()
        torch.testing.assert_close(after[~first.holds], all_of[~first.holds])


def test_rows_where_nothing_is_asked_have_no_part_in_eq_6(editor):
    captured = editor.capture(tiny.records())
    network = editor.untrained_network(captured)
    still = torch.arange(len(captured.losses)) % 2 == 0
    found = residuals_of(network, replace(captured, still=still), editor.hparams)
    alone = network.residuals(
        [h[~still] for h in captured.keys], [g[~still] for g in captured.grads]
    )
    for r, of_asked in zip(found, alone, strict=True):
        assert (r[still] == 0).all()
        torch.testing.assert_close(r[~still], of_asked)


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
