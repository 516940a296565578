"""The archive that comes with the package: for the default model, and for no other."""

import pytest
import torch

from horse_plugin import HorseEditor, UsageError, default_hparams
from horse_plugin.assets import TRAINED
from horse_plugin.editing.archive import ARCHIVE, read_network
from horse_plugin.editing.settings import EXAMPLE_FACTS, yaml_for
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.storage.tensors import load_tensors
from tests import tiny


def test_the_shipped_archive_is_small_and_says_how_it_was_trained():
    _, preserve, about = read_network("shipped")
    assert (TRAINED / ARCHIVE).stat().st_size < 5e6
    assert preserve.text and preserve.unrelated and about["step"] == 40
    assert not [v for v in about["hparams"].values() if str(v).startswith("/")]
    default = default_hparams()
    trained = HORSEHyperParams.from_dict(about["hparams"])
    changed = {k for k, v in default.to_dict().items() if getattr(trained, k) != v}
    assert changed == {"archive", "seed"}


def test_the_shipped_archive_holds_matrices_in_bf16_and_all_else_in_full():
    tensors, _ = load_tensors(TRAINED / ARCHIVE)
    low = {name.rpartition(".")[2] for name, t in tensors.items() if t.dtype is torch.bfloat16}
    assert low == {"A", "B"}


def test_the_shipped_archive_is_refused_for_another_model():
    with pytest.raises(UsageError, match="made for llama-smollm2-135m"):
        HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(archive="shipped"))


def test_settings_for_another_model_name_no_archive(tmp_path):
    tiny.files(tmp_path)
    (tmp_path / "made.yaml").write_text(yaml_for(str(tmp_path / "model")))
    assert HORSEHyperParams.from_hparams(tmp_path / "made").archive is None


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["fp32", None])
def test_an_edit_with_the_default_settings_is_trained(tmp_path, kept_stats, dtype):
    (tmp_path / "facts.json").write_text(EXAMPLE_FACTS)
    hparams = default_hparams()
    hparams.dtype, hparams.stats_dir = dtype, str(kept_stats)
    editor = HorseEditor.from_hparams(hparams)
    assert editor.network is not None
    editor.edit(str(tmp_path / "facts.json"))
    norway, france = editor.ask(["The capital of Norway is", "The capital of France is"], 8)
    assert "Bergen" in norway and "Paris" in france
