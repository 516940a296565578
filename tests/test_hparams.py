"""One YAML for training and editing, in EasyEdit's keys."""

import pytest

from horse_plugin import HORSEHyperParams, UsageError
from horse_plugin.model.backbone import Backbone
from tests import ROOT

SHIPPED_7B = ROOT / "hparams/HORSE/llama2-7b.yaml"
SHIPPED = sorted((ROOT / "hparams/HORSE").glob("*.yaml"))
MALMEN = """
alg_name: "MALMEN"
archive: ./results/models/MALMEN/gpt2-xl
device: 0
model_name: ./hugging_cache/gpt2-xl
model_class: GPT2LMHeadModel
tokenizer_class: GPT2TokenizerFast
tokenizer_name: ./hugging_cache/gpt2-xl
inner_params:
- transformer.h.47.mlp.c_proj.weight
dropout: 0.0
train_base: False
no_grad_layers: null
rank: 1920
n_blocks: 2
lr: 1e-6
meta_lr: 1e-5
loc_coef: 1
max_grad_norm: 1
token: mask
n_edits: 1
batch_size: 1
editor_batch_size: 1024
silent: False
max_iters: 10000
log_interval: 100
eval_log_interval: 100
final_eval: True
val_interval: 100
early_stop_patience: 1000
early_stop_key: "ES_val"
eval_only: False
debug: False
save: False
val_batch_size: 1
val_steps: 200
model_parallel: false
results_dir: ./results
"""


def read(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return HORSEHyperParams.from_hparams(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_load_with_and_without_suffix(path):
    hparams = HORSEHyperParams.from_hparams(path)
    assert hparams.alg_name == "HORSE"
    assert HORSEHyperParams.from_hparams(str(path.with_suffix(""))) == hparams


def test_a_malmen_file_becomes_a_horse_file_by_its_name(tmp_path):
    hparams = read(tmp_path, MALMEN.replace('"MALMEN"', '"HORSE"'))
    assert (hparams.lr, hparams.meta_lr, hparams.rank) == (1e-6, 1e-5, 1920)
    assert (hparams.spread, hparams.loc_loss, hparams.edit_coef) == ("orthogonal", "ce", 1)
    malmen = read(tmp_path, MALMEN)  # as published: no loss on the edit prompts themselves
    assert (malmen.spread, malmen.loc_loss, malmen.edit_coef) == ("uniform", "kl", 0)
    training = MALMEN.replace('alg_name: "MALMEN"', "alg: HORSE")  # EasyEdit's TRAINING files
    assert read(tmp_path, training) == hparams


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_name: m\nranks: 3", "unknown key 'ranks'. Did you mean rank?"),
        ("model_name: m\nedit_lr: 1e-4", "'edit_lr' is no key of ours. It is MEND's first step"),
        (
            "model_name: m\nlayers: [4, 5]",
            "'layers' is no key of ours. It is MEMIT's; ours is inner_params",
        ),
        ("model_name: m\nfp16: true", "'fp16' is no key of ours. Ours is dtype: fp16"),
        ("model_name: m\nrank: many", "rank: expected a whole number, got 'many'"),
        ("model_name: m\nrank: 2.5", "rank: expected a whole number"),
        ("model_name: m\nrank: true", "rank: expected a whole number"),
        ("model_name: m\nrank: 0", "rank: must be at least 1"),
        ("model_name: m\nmeta_lr: fast", "meta_lr: expected a number"),
        ("model_name: m\nmeta_lr: .nan", "meta_lr: expected a number"),
        ("model_name: m\nmodel_parallel: 1", "model_parallel: expected true/false"),
        ("model_name: m\ntrunk_bits: 8", "trunk_bits: 8 is not one of 4"),
        ("model_name: m\ninner_params: a.b", "inner_params: expected a list of names"),
        ("model_name: m\nspread: wide", "spread: 'wide' is not one of orthogonal"),
        ("model_name: m\nalg_name: ROME", "alg_name: 'ROME' is not one of"),
        ("model_name: 3", "model_name: expected text"),
        (
            "model_name: m\nsystem_prompt: Be brief.",
            "system_prompt: without a chat nothing says it",
        ),
        ("rank: 3", "model_name is missing"),
        ("- a\n- b", "expected `key: value` lines"),
        ("a: [", "not a readable YAML file"),
        ("", "expected `key: value` lines"),
        ("!!python/object/apply:os.getcwd []", "not a readable YAML file"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, text, says):
    with pytest.raises(UsageError, match=r"some\.yaml: ") as caught:
        read(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such hparams file"):
        HORSEHyperParams.from_hparams(tmp_path / "none.yaml")


def test_a_shipped_file_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("llama2-7b", "HORSE/llama2-7b.yaml", "hparams/HORSE/llama2-7b"):
        assert HORSEHyperParams.from_hparams(name).source.samefile(SHIPPED_7B)
    malmen = HORSEHyperParams.from_hparams("MALMEN/llama-smollm2-135m")
    assert malmen.alg_name == "MALMEN"
    (tmp_path / "llama2-7b.yaml").write_text("model_name: mine")
    assert HORSEHyperParams.from_hparams("llama2-7b").model_name == "mine"
    with pytest.raises(UsageError, match=r"Did you mean llama3-8b\?"):
        HORSEHyperParams.from_hparams("Llama-3-8b")


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    assert read(tmp_path, "model_name: m\nmeta_lr: 1e-5\nn_edits: 1e3").n_edits == 1000


@pytest.mark.parametrize("device", [0, "0", "cuda:0", "cpu", None])
def test_devices_are_taken_as_easyedit_takes_them(tmp_path, device):
    assert HORSEHyperParams(model_name="m", device=device).device == device


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("model_name: ~/model\narchive: ~/archive\npreserve: none")
    read = HORSEHyperParams.from_hparams("~/my")
    assert read.model_name == f"{tmp_path}/model" and read.archive == f"{tmp_path}/archive"
    with pytest.raises(UsageError, match=f"model_name: no such folder: {tmp_path}/model"):
        Backbone.load(read)
