"""Drift and perplexity of ordinary text, before and after an edit."""

import math

import pytest
import torch

from horse_plugin import HorseEditor, UsageError
from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
from horse_plugin.method import losses
from horse_plugin.model.backbone import Backbone
from tests import tiny

PIECES = [("a", tiny.words(0, 40)), ("b", tiny.words(7, 25)), ("a", tiny.words(3, 30))]


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])  # gemma2 caps its logits
def test_drift_and_perplexity_are_the_models_own(architecture):
    backbone = Backbone(tiny.model(architecture), tiny.bpe_tokenizer(), batch_tokens=100)
    ids = [backbone.tokenizer(text)["input_ids"] for _, text in PIECES]
    before = [log_probabilities(backbone.model, i) for i in ids]
    text = OrdinaryText(backbone, PIECES)
    editor = HorseEditor.from_backbone(backbone, tiny.hparams(strength=30.0, edit_ridge=0.1))
    editor.edit(tiny.records())
    after = [log_probabilities(backbone.model, i) for i in ids]
    drift = torch.cat(
        [(b.exp() * (b - a)).sum(-1) for b, a in zip(before, after, strict=True)]
    ).mean()
    for cost, now in ((text.before, before), (text.measure(), after)):
        nats = [
            -p.gather(1, torch.tensor(i[1:])[:, None])[:, 0] for p, i in zip(now, ids, strict=True)
        ]
        assert cost.perplexity == pytest.approx(torch.cat(nats).mean().exp().item(), rel=1e-4)
        of_b = cost.kinds["b"]["perplexity"]
        assert of_b == pytest.approx(nats[1].mean().exp().item(), rel=1e-4)
    assert text.before.drift == 0
    assert text.measure().drift == pytest.approx(drift.item(), rel=1e-3)
    copy = Backbone(backbone.model, backbone.tokenizer)
    assert text.measure(copy).drift == pytest.approx(drift.item(), rel=1e-3)
    editor.undo()
    assert text.measure().drift < 1e-8


def test_long_texts_are_read_in_pieces():
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    assert math.isfinite(OrdinaryText(backbone, [("a", tiny.words(0, 400))]).before.perplexity)
    assert len(OrdinaryText(backbone, heldout_pieces()).before.kinds) == 5


def test_text_without_two_tokens_is_refused():
    with pytest.raises(UsageError, match="less than two tokens"):
        OrdinaryText(Backbone(tiny.model(), tiny.bpe_tokenizer()), [("a", "")])


def test_a_cost_is_the_same_some_positions_at_a_time(monkeypatch):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    text = OrdinaryText(backbone, PIECES)
    backbone.weights.add({n: 0.1 * torch.randn(48, 32) for n in backbone.modules})
    at_once = text.measure()
    monkeypatch.setattr(losses, "AT_ONCE", 7 * 400)
    assert text.measure() == at_once and at_once.drift > 0
