"""A trunk in 4 bits under edited blocks that are as they were; its edits say so."""

import sys

import pytest
import torch
import transformers

from horse_plugin import HorseEditor, HORSEHyperParams
from horse_plugin.errors import UsageError
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.fingerprint import describe
from horse_plugin.model.loading import load_model
from horse_plugin.model.quantising import quantised_trunk
from tests import tiny

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # in blocks of 64 numbers


@pytest.fixture
def folder(tmp_path):
    """A model of widths that are quantised in blocks."""
    config = transformers.LlamaConfig(**tiny.CONFIGS["llama"]().to_dict() | WIDE)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def of(folder, **changes) -> HORSEHyperParams:
    return tiny.hparams(model_name=str(folder), strength=5.0, **changes)


def test_all_that_is_not_below_the_lowest_edited_block_is_left_out(monkeypatch):
    package = type(sys)("bitsandbytes")
    package.supported_torch_devices = {"cpu"}
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    for names, first in (([], 2), (["model.layers.5.mlp.down_proj"], 5)):
        hparams = tiny.hparams(inner_params=names)
        config = quantised_trunk(tiny.model().to("meta"), hparams, CPU, torch.float32)
        left_out = config.llm_int8_skip_modules
        assert {n.split(".")[2] for n in left_out[:-1]} == {str(i) for i in range(first, 8)}
        assert left_out[-1] == "lm_head" and len(left_out) == 1 + 7 * (8 - first)
    hparams = tiny.hparams(inner_params=["model.layers.0.mlp.down_proj"])
    with pytest.raises(UsageError, match="trunk_bits: the lowest block is edited"):
        quantised_trunk(tiny.model(), hparams, CPU, torch.float32)
    with pytest.raises(UsageError, match="trunk_bits: bitsandbytes does not know the device xla"):
        quantised_trunk(tiny.model(), hparams, torch.device("xla"), torch.float32)


def test_without_the_package_a_line_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"trunk_bits: .*bitsandbytes.*horse-plugin\[quantised\]"):
        load_model(of(folder, trunk_bits=4))


def test_a_quantised_trunk_is_edited_and_its_edits_say_so(folder):
    pytest.importorskip("bitsandbytes")
    editors = [HorseEditor.from_hparams(of(folder, trunk_bits=bits)) for bits in (4, None)]
    quantised, whole = (e.backbone for e in editors)
    parameters = dict(whole.model.named_parameters())
    for name, p in quantised.model.named_parameters():
        is_trunk_map = any(f".{i}.{part}." in name for i in (0, 1) for part in ("self_attn", "mlp"))
        assert (p.dtype == torch.uint8) == is_trunk_map, name
        assert is_trunk_map or torch.equal(p, parameters[name])
    before = quantised.weights.clones()
    delta = editors[0].edit(tiny.records(12))
    assert all(share > 0 for share in delta.about["moved"].values())
    assert delta.about["model"]["quantised"] == "2 blocks in Params4bit"
    assert "quantised" not in whole.fingerprint()
    with pytest.warns(UserWarning, match="2 blocks in Params4bit.* measure again"):
        editors[1].apply(delta)
    editors[0].undo()
    for name, weight in quantised.weights.clones().items():
        assert torch.equal(weight, before[name])
    there = Backbone.load(of(folder, trunk_bits=4)).fingerprint()
    assert there == delta.about["model"] and describe(there).endswith(", 2 blocks in Params4bit)")
