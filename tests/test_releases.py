"""What release 0.1.0 wrote still loads, applies and trains on: ``data_of_releases/0.1.0``.

It was written by that release on a Llama of three blocks: the model, an archive and a checkpoint,
an edit with that archive, and a chain of three edits, the second of them undone.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from horse_plugin import Chain, EditDelta, HorseEditor, HORSEHyperParams, HORSETrainer
from horse_plugin.training.checkpoint import CHECKPOINT, read
from tests import ROOT, tiny

RELEASE = ROOT / "tests/data_of_releases/0.1.0"
# As its YAML said them: two keys have better names by now.
KEYS = {"rank": 1, "n_edits": 4, "dtype": "fp32", "device": "cpu", "max_epochs": 1}
KEYS |= {"val_interval": 2, "val_steps": 4, "model_name": str(RELEASE / "model")}
# That release had no metric but the paper's, and chose by the paper's mean.
KEYS |= {"preserve": "none", "val_score": "paper"}
KEYS |= {"inner_params": [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]}


@pytest.fixture
def hparams():
    return HORSEHyperParams.from_dict(KEYS | {"archive": str(RELEASE / "archive")})


def test_a_chain_of_release_0_1_is_put_into_its_model(hparams):
    chain = Chain.at(RELEASE / "chain")
    assert [bool(e["undone"]) for e in chain.entries] == [False, True, False]
    editor = HorseEditor.from_hparams(hparams)
    editor.apply_chain(chain.deltas())
    saved = load_file(RELEASE / "chain_weights.safetensors")
    for name, module in editor.backbone.modules.items():
        assert torch.equal(module.weight, saved[name])
    editor.undo("first")
    assert [d.name for d in editor.history] == ["third"]


def test_an_archive_of_release_0_1_makes_the_edit_that_it_made(hparams):
    saved = EditDelta.load(RELEASE / "edit")
    editor = HorseEditor.from_hparams(hparams)
    made = editor.edit(saved.records)
    for name, shift in saved.shifts.items():  # another CPU may round otherwise
        torch.testing.assert_close(made.shift(name), shift, rtol=1e-4, atol=1e-7)
    editor.undo()
    editor.apply(saved)


def test_a_run_of_release_0_1_can_be_resumed(hparams, tmp_path):
    shutil.copy(RELEASE / "archive" / CHECKPOINT, tmp_path)
    records = [replace(r, subject=None) for r in tiny.records(18)]  # as they were then
    hparams.archive, hparams.max_epochs = None, 2
    trainer = HORSETrainer(hparams, records[:12], records[12:], tmp_path, None, True, False)
    assert trainer.step == 3
    _, about = read(tmp_path / CHECKPOINT, trainer.backbone, hparams, trainer._data)
    assert about["versions"]["horse_plugin"] == "0.1.0"
    trainer.run()
    assert trainer.step == 6
