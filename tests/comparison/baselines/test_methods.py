"""EasyEdit's own methods as rows of the comparison, on a tiny model.

On the EasyEdit that PyPI has, and on the checkout that EASYEDIT_HOME names, as test_easyedit.py.
"""

# ruff: noqa: E402  EasyEdit's imports follow the check that it is there

import io
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from tests import ROOT, tiny

easyeditor = pytest.importorskip("easyeditor")
from benchmarks import sweep
from horse_plugin import UsageError, load_records
from horse_plugin.comparison import runner
from horse_plugin.comparison.baselines import methods as baselines
from horse_plugin.comparison.baselines.targets import Targets
from horse_plugin.comparison.methods import METHODS
from horse_plugin.comparison.plan import DataSet, Plan
from horse_plugin.comparison.task import Task
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone

pytestmark = pytest.mark.easyedit

SHIPPED = ROOT / "hparams"
MODEL = "llama-tiny"
RATES = {"lr": 1e-2, "edit_lr": 0.1, "lr_lr": 1e-3}  # MEND's; a random model's gradients are small


@pytest.fixture(scope="module")
def yamls(tmp_path_factory):
    """A tiny model and the shipped YAMLs, with its layers in the place of the default model's."""
    path = tmp_path_factory.mktemp("methods")
    tiny.model().save_pretrained(path / MODEL)
    tiny.bpe_tokenizer().save_pretrained(path / MODEL)
    own = {"model_name": str(path / MODEL), "tokenizer_name": str(path / MODEL)}
    own |= {"v_num_grad_steps": 2, "v_loss_layer": 7, "num_steps": 2, "mom2_n_samples": 30}
    for file in SHIPPED.glob("*/llama-smollm2-135m.yaml"):
        keys = yaml.safe_load(file.read_text())
        keys |= {k: v for k, v in own.items() if k in keys}
        if keys.get("layers"):
            keys["layers"] = [2, 3][-len(keys["layers"]) :]
        if file.parent.name == "UltraEdit":
            keys["lr"] = 0.1  # a random model's gradients are small
        if file.parent.name == "MEND":
            keys |= {"batch_size": 2, "rank": 8} | RATES
        if "inner_params" in keys:
            keys["inner_params"] = [f"model.layers.{i}.mlp.down_proj" for i in (6, 7)]
            if file.parent.name == "MEND":  # which names weights, not modules
                keys["inner_params"] = [f"{name}.weight" for name in keys["inner_params"]]
        (path / file.parent.name).mkdir()
        (path / file.parent.name / "tiny.yaml").write_text(yaml.safe_dump(keys))
    settings = {
        "model_name": str(path / MODEL),
        "dtype": "fp32",
        "device": "cpu",
        "rank": 4,
        "n_edits": 6,
    }
    (path / "HORSE" / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def plan(yamls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes logs/ wherever it runs
    facts = [replace(r, subject=r.prompt.split()[3]) for r in tiny.records(12)]
    data = [DataSet("facts", facts[:4], facts[4:])]

    def make(*names):
        table = {name: METHODS[name] for name in names}
        return Plan(table, {"tiny": yamls / "HORSE/tiny.yaml"}, data, (4,), yamls, tmp_path / "out")

    return make


def task_of(plan, n) -> Task:
    """A task of the plan's first n records, with a model of its own."""
    hparams = HORSEHyperParams.from_hparams(plan.models["tiny"])
    data = plan.datasets[0]
    records = data.records[:n], data.train, data.val
    folders = plan.hparams_dir, plan.out
    return Task("tiny", data.name, Backbone.load(hparams), hparams, *records, *folders)


# What the EasyEdit on PyPI can no longer do with today's peft and transformers.
OUT_OF_DATE = {
    "LoRA": "AdaLoRA does not work when `total_step` is None",
    "MEMIT": "IndexError",
    "MEND": "MonkeyPatch",
}


def available(name) -> bool:
    spec = baselines.METHODS[name]
    return spec.name in baselines.ALG_DICT


@pytest.mark.parametrize("name", [n for n in baselines.METHODS if n != "MEND"])
def test_each_method_edits_a_copy_and_is_the_same_when_repeated(plan, name):
    first, second = plan("unedited", name), plan("unedited", name)
    second.out = second.out.with_name("again")
    (_, row), (_, again) = (runner.run(p, progress=False) for p in (first, second))
    if not available(name):
        assert f"this EasyEdit has no {name}" in row["reason"]
        return
    if not available("UltraEdit") and name in OUT_OF_DATE:
        assert OUT_OF_DATE[name] in row["reason"]
        return
    assert "reason" not in row, row["reason"]
    assert row["edit_seconds"] > 0
    assert row["locality"] < 100  # something was edited
    figures = ("efficacy", "generalization", "specificity", "locality")
    assert [row[f] for f in figures] == [again[f] for f in figures]
    log = first.out / "logs" / f"{name}-tiny-4-0.log"
    assert log.is_file()


def test_another_text_in_the_file_of_a_corpus_has_statistics_of_its_own(plan, tmp_path):
    asked, seen = plan("ROME"), set()
    asked.corpus = str(tmp_path / "corpus.txt")
    for text in ("Wool is sheared", "Bread is baked"):
        Path(asked.corpus).write_text(text)
        (row,) = runner.run(asked, progress=False)
        seen.add(row["settings"])
    assert len(seen) == len(list((asked.out / "stats").iterdir())) == 2


def test_easyedits_metrics_agree_with_ours_on_every_edited_model(plan):
    checked = plan("unedited", "FT", "HORSE, untrained")
    checked.check = 3
    for row in runner.run(checked, progress=False):
        assert row["check"]["records"] == 3
        assert row["check"]["easyedit"] == pytest.approx(row["check"]["ours"])
        assert row["check"]["ours"].keys() == {"efficacy", "generalization", "specificity"}


@pytest.mark.parametrize("how", [{"append_eos": True}, {"separator": ": "}])
def test_easyedit_is_left_out_with_a_word_where_prompts_are_not_plain(plan, yamls, tmp_path, how):
    asked = plan("unedited", "FT")
    asked.check = 3
    settings = yaml.safe_load((yamls / "HORSE/tiny.yaml").read_text()) | how
    asked.models["tiny"] = tmp_path / "tiny.yaml"
    asked.models["tiny"].write_text(yaml.safe_dump(settings))
    with pytest.warns(match="--check: EasyEdit measures plain prompts only"):
        unedited, ft = runner.run(asked, progress=False)
    assert "reason" not in unedited and unedited["check"] is None
    assert "EasyEdit's methods edit plain prompts" in ft["reason"]


@pytest.mark.skipif(not available("UltraEdit"), reason="its LoRA is out of date")
def test_lora_is_merged_also_in_the_modules_that_we_edit(plan, yamls):
    hparams = baselines.load_hparams("LoRA", yamls / "LoRA/tiny.yaml", torch.device("cpu"))
    hparams.target_modules = ["down_proj"]
    task = task_of(plan("LoRA"), 2)
    before = {k: v.clone() for k, v in task.backbone.model.state_dict().items()}
    (made, _), *_ = baselines.edits("LoRA", hparams, task.backbone, task.batches, 0, io.StringIO())
    after = made.model.state_dict()
    assert after.keys() == before.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(8)}


@pytest.mark.skipif(not available("UltraEdit"), reason="its MEMIT is out of date")
@pytest.mark.parametrize("name", ["MEMIT", "PMET", "EMMET", "AlphaEdit"])
def test_targets_found_once_serve_every_number_of_edits(plan, name):
    def edited(folder, n):
        one = plan(name)
        one.n_edits, one.out = (n,), one.out.with_name(folder)
        (result,) = METHODS[name](task := task_of(one, n))
        weights = result.backbone.model.state_dict()
        log = task.folder / "logs" / f"{name}-tiny-{n}-0.log"
        return weights, result.edit_seconds, log.read_text().count("Computing right vector")

    _, _, found = edited("kept", 3)
    again, seconds, more = edited("kept", 4)
    fresh, _, all_of_them = edited("fresh", 4)
    assert (found, more, all_of_them) == (3, 1, 4)
    assert seconds > 0
    assert all(torch.equal(again[k], fresh[k]) for k in fresh)


@pytest.mark.parametrize(
    ("knows", "side"), [({"objective_optimization": "target_new"}, "left"), ({}, "right")]
)
def test_ft_is_padded_as_its_objective_reads_the_prompts(knows, side):
    hparams = SimpleNamespace(**knows)
    spec, tokenizer = baselines.METHODS["FT"], tiny.bpe_tokenizer()
    tokenizer.unk_token = "?"
    padded = baselines._padding_as(spec, hparams, tokenizer)
    assert padded.padding_side == side
    assert padded.pad_token == (tokenizer.eos_token if knows else "?")


@pytest.mark.parametrize(
    ("name", "dtype", "inside"),
    [
        ("MEMIT", torch.bfloat16, "medium"),
        ("MEMIT", torch.float32, "highest"),
        ("AlphaEdit", torch.bfloat16, "highest"),  # which solves in float32
    ],
)
def test_products_round_on_a_bf16_model_where_a_method_bears_it(monkeypatch, name, dtype, inside):
    seen = []

    def apply(model, tokenizer, requests, hparams, copy):
        seen.append(torch.get_float32_matmul_precision())
        return model, {}

    monkeypatch.setitem(baselines.ALG_DICT, baselines.METHODS[name].name, apply)
    backbone = Backbone(tiny.model().to(dtype), tiny.bpe_tokenizer())
    hparams = SimpleNamespace(device="cpu")
    ((edited, _),) = baselines.edits(name, hparams, backbone, [tiny.records(2)], 0, io.StringIO())
    assert (seen, torch.get_float32_matmul_precision()) == ([inside], "highest")
    assert edited.model.dtype == dtype


def test_what_a_yaml_says_of_the_target_makes_other_files(yamls, tmp_path):
    hparams = baselines.load_hparams("MEMIT", yamls / "MEMIT/tiny.yaml", "cpu")

    def folder(method="MEMIT", **changes):
        return Targets(tmp_path, method, replace(hparams, **changes), "tiny", 0).folder

    assert folder(mom2_update_weight=1, layers=[1, 3]) == folder()
    others = [folder(v_lr=9.0), folder(layers=[1, 2]), folder(fact_token="last"), folder("PMET")]
    assert len({folder(), *others}) == 5


@pytest.mark.skipif(not available("UltraEdit"), reason="its MEMIT is out of date")
def test_memit_emmet_and_alphaedit_find_the_same_vectors(plan):
    """So that they may share them: each, in its own folder, finds what MEMIT finds, bit for bit."""

    def found(name):
        one = plan(name)
        one.out = one.out.with_name(name)
        task = task_of(one, 3)
        assert len(list(METHODS[name](task))) == 1
        files = sorted((task.folder / "targets").rglob("*.npz"))
        assert len(files) == 3
        return {str(f.relative_to(task.folder)): np.load(f)["v_star"].tolist() for f in files}

    assert found("MEMIT") == found("EMMET") == found("AlphaEdit")


def test_mend_trains_its_network_as_horse_is_trained_and_keeps_it(plan):
    mend = plan("unedited", "MEND")
    mend.datasets[0].train, mend.datasets[0].val = tiny.records(12), tiny.records(3)
    _, row = runner.run(mend, progress=False)
    if not available("UltraEdit"):
        assert OUT_OF_DATE["MEND"] in row["reason"]
        return
    assert "reason" not in row, row["reason"]
    assert row["budget"] == "2 steps of 6 records from 12"
    assert row["train_seconds"] > 0
    assert row["locality"] < 100
    (kept,) = (mend.out / "archives").iterdir()
    saved = torch.load(next(kept.glob("models/MEND/*")), weights_only=True)
    assert saved["step"] == 6  # batches of two, three to a step
    moved = (saved["model"]["edit_lrs"] - RATES["edit_lr"]).abs()
    assert (moved > 0).all()  # every one of them was trained
    assert (moved < 2.1 * RATES["lr_lr"]).all()  # in two steps, at their own rate


def test_mend_without_records_to_train_on_keeps_its_row(plan):
    (row,) = runner.run(plan("MEND"), progress=False)
    assert "MEND is trained: give training and validation records" in row["reason"]


def test_a_sweep_measures_each_setting_beside_the_yaml_as_it_is(yamls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = [{"prompt": r.prompt, "target_new": r.target_new} for r in tiny.records(6)]
    Path("facts.json").write_text(json.dumps(facts))
    options = f"--method FT --data facts.json --n-edits 4 --model tiny --hparams-dir {yamls}"
    settings = ["lr=0, num_steps=1", "lr=1.0e-1, layers=[3]"]
    swept = [part for text in settings for part in ("--set", text)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *options.split(), "--out", "out", *swept])
    sweep.main()
    rows = {r["method"]: r for r in json.loads(Path("out/results.json").read_text())}
    assert list(rows) == ["unedited", "FT, as it is", *settings]
    assert not any(r.get("reason") for r in rows.values())
    figures = ("efficacy", "generalization", "specificity")
    as_it_was = [rows["unedited"][f] for f in figures]
    assert [rows["lr=0, num_steps=1"][f] for f in figures] == as_it_was
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "--set", "rate=1"])
    with pytest.raises(SystemExit, match="FT's YAML has no rate"):
        sweep.main()


def test_a_prompt_without_its_subject_is_edited_at_its_last_token():
    (record,) = load_records([{"prompt": "who is {} a {}", "target_new": "b", "subject": "a"}])
    spec = baselines.METHODS["MEMIT"]
    request = baselines._request(record, 0, spec)
    assert (request["prompt"], request["subject"]) == ("{}", record.prompt)
    record = replace(record, prompt="the a is")
    assert baselines._request(record, 0, spec)["prompt"] == "the {} is"
    assert baselines._request(record, 0, baselines.METHODS["PMET"])["target_new"] == (" b")


def test_a_yaml_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("alg_name: FT\n")
    with pytest.raises(UsageError, match=r"x\.yaml: not hparams of EasyEdit's FT"):
        baselines.load_hparams("FT", tmp_path / "x.yaml", "cpu")


class Malice:
    """Its pickle makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.skipif(not hasattr(easyeditor.BaseEditor, "normal_edit"), reason="other hparams")
def test_an_archive_of_mend_runs_no_code(yamls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "more": Malice()}, "mend.pt")
    hparams = baselines.load_hparams("MEND", yamls / "MEND/tiny.yaml", "cpu")
    hparams.archive = "mend.pt"
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        list(baselines.edits("MEND", hparams, backbone, [tiny.records(1)], 0, io.StringIO()))
    assert not Path("attacked").exists()
    torch.load("mend.pt", weights_only=False)
    assert Path("attacked").exists()  # it would have
