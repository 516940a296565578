"""Second-moment statistics of any text, as EasyEdit's MEMIT family reads them."""

import json
from pathlib import Path

import pytest
import torch

from horse_plugin.comparison.baselines import stats
from horse_plugin.model.backbone import Backbone
from tests import tiny


def test_second_moments_equal_the_keys_of_all_tokens_one_text_at_a_time():
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), batch_tokens=16)
    layers = [f"model.layers.{i}.mlp.down_proj" for i in (1, 3)]
    texts = ["the capital of Norway is Oslo", "Lima", "who plays the piano in Kyoto city ?"]
    found = stats.moments_of_texts(backbone, layers, texts)
    for name in layers:
        keys = []
        hook = backbone.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, keys=keys: keys.append(args[0][0])
        )
        for text in texts:
            backbone.model(**backbone.tokenizer(text, return_tensors="pt"))
        hook.remove()
        keys = torch.cat(keys)
        total, count = found[name]
        assert count == len(keys)
        assert torch.allclose(total, keys.T @ keys, rtol=1e-4, atol=1e-6)


def test_statistics_in_the_users_folder_are_made_once(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    tiny.files(tmp_path)
    asks = {"model_name": str(tmp_path / "model"), "layers": [2], "stats_dir": "~/s"}
    asks |= {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "mom2_dataset": "corpus"}
    asks |= {"mom2_dtype": "float32", "mom2_n_samples": 9}
    asks |= {"P_loc": "~/P.pt", "nullspace_threshold": 0.02}
    yaml = tmp_path / "alphaedit.yaml"
    yaml.write_text(json.dumps(asks))
    made = stats.statistics_of_yamls([yaml], tiny.records())
    assert len(made) == 2 and all(path.is_file() for path in made)
    assert stats.statistics_of_yamls([yaml], tiny.records()) == []


@pytest.mark.parametrize("name", ["MEMIT", "PMET", "AlphaEdit"])
def test_a_shipped_yaml_is_found_by_its_name(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(stats.Backbone, "load", lambda hparams: None)
    monkeypatch.setattr(stats, "prepare", lambda hparams, *_: asked.append(hparams) or [])
    stats.statistics_of_yamls([Path(f"{name}/llama-smollm2-135m")], "shipped", tmp_path)
    (hparams,) = asked
    assert hparams.stats_dir == str(tmp_path) and "model.layers.8." in stats.modules_of(hparams)[0]


def test_the_null_space_holds_what_the_text_does_not_use(tmp_path):
    keys = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 8)
    stats.write_null_space(tmp_path / "P.pt", {"l": (keys.T @ keys, 50)}, 1e-3)
    (P,) = torch.load(tmp_path / "P.pt")
    assert torch.allclose(P, torch.diag(torch.tensor([0.0] * 3 + [1.0] * 5)), atol=1e-6)
