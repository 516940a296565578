"""benchmarks/reference.py, which speed is measured against, computes what the engine computes."""

import pytest
import torch

from benchmarks.reference import Reference
from horse_plugin import HorseEditor, HORSETrainer
from horse_plugin.data.prompts import tokenize
from horse_plugin.evaluation.metrics import predict
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from tests import tiny


@pytest.fixture
def backbone():
    return Backbone(tiny.model(dtype=torch.float64), tiny.bpe_tokenizer())


def fitted(backbone, records):
    """An untrained network as an edit of the records would fit it."""
    hparams = tiny.hparams(dtype=None)
    prompts = backbone.prepare(records, ["edit"]).flat()
    return HorseEditor.from_backbone(backbone, hparams).untrained_network(
        capture(backbone, prompts)
    )


def test_the_reference_edits_as_we_do_and_takes_it_back(backbone):
    records = tiny.records(40)
    hparams, network = tiny.hparams(), fitted(backbone, records)
    reference = Reference(backbone, network, hparams)
    before = [m.weight.clone() for m in reference.modules]
    theirs = reference.edit(records)
    reference.undo(theirs)
    for module, weight in zip(reference.modules, before, strict=True):
        torch.testing.assert_close(module.weight, weight)
    ours = HorseEditor.from_backbone(backbone, hparams, network).edit(records).shifts
    for shift, name in zip(theirs, backbone.modules, strict=True):
        assert shift.abs().max() > 1e-6
        torch.testing.assert_close(shift, ours[name])


def test_the_reference_trains_as_we_do(backbone):
    records = tiny.records(40)
    hparams = tiny.hparams(edits_per_step=40)
    trainer = HORSETrainer(hparams, records, records, "unused", backbone, progress=False)
    trainer.network.load_state_dict(fitted(backbone, records).state_dict())
    theirs = Reference(backbone, fitted(backbone, records), hparams)
    theirs.optimizer = torch.optim.SGD(theirs.network.parameters(), lr=1.0)
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=1.0)
    theirs.network.spread_strength.requires_grad_(False)
    trainer.train_step(trainer.batch(0))
    theirs.train_step(records)
    for (name, ours), other in zip(
        trainer.network.named_parameters(), theirs.network.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, other, msg=name)


def test_the_reference_predicts_as_we_do(backbone):
    queries = [q for r in tiny.records(40) for q in (r.edit, *r.unrelated)]
    found = Reference(backbone, fitted(backbone, tiny.records()), tiny.hparams()).predict(queries)
    prompts = tokenize(backbone.tokenizer, queries)
    ours_of = predict(backbone, prompts)
    for prompt, theirs in zip(prompts, found, strict=True):
        ours = ours_of[prompt]
        assert torch.equal(ours, theirs)
