"""`horse init`: a YAML for any model that edits it as it stands, and facts to begin with."""

import json

import pytest
import yaml

from horse_plugin import HorseEditor, HORSEHyperParams, UsageError, load_records
from horse_plugin.editing.settings import EXAMPLE_FACTS, yaml_for
from tests import tiny


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_yaml_names_what_is_in_the_model_and_edits_it(tmp_path, architecture):
    tiny.model(architecture).save_pretrained(tmp_path / "my-model")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "my-model")
    text = yaml_for(str(tmp_path / "my-model"))
    assert "my-model" in text and "has no chat template" in text
    pattern = tiny.SECOND_PROJECTION.get(architecture, "model.layers.{}.mlp.down_proj")
    found = yaml.safe_load(text)["inner_params"]
    assert found == [pattern.format(6)]  # of eight blocks, where the answer reads the subject
    (tmp_path / "my.yaml").write_text(text)
    hparams = HORSEHyperParams.from_hparams(tmp_path / "my")
    hparams.stats_dir = str(tmp_path / "stats")
    editor = HorseEditor.from_hparams(hparams)
    assert list(editor.backbone.modules) == hparams.inner_params
    editor.edit(tiny.records())


def test_a_model_that_cannot_be_edited_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        yaml_for(str(tmp_path / "none"))


def test_the_facts_to_begin_with_are_whole_records():
    records = load_records(json.loads(EXAMPLE_FACTS))
    assert len(records) == 4
    assert all(r.subject in r.prompt and r.rephrases and r.unrelated for r in records)
