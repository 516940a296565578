"""The default model and real facts: an edit that works, on a machine without a hub."""

import os
import re
from types import SimpleNamespace

import pytest
import torch

from horse_plugin import Evaluator, HorseEditor, HORSEHyperParams, load_records
from horse_plugin.assets import FACTS
from horse_plugin.assets.default_model import default_model
from horse_plugin.comparison import demo
from horse_plugin.comparison.again import report_of
from horse_plugin.comparison.demo import run_demo
from horse_plugin.model.backbone import Backbone
from tests import SHARED_DATA, tiny

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def backbone():
    torch.set_num_threads(os.cpu_count())
    return Backbone.load(settings())


def settings(**changes):
    return HORSEHyperParams(model_name="llama-smollm2-135m", device="cpu", **changes)


def test_the_default_model_is_plain_and_untied(backbone):
    model = backbone.model
    assert model.config.model_type == "llama"
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert list(backbone.modules) == [f"model.layers.{i}.mlp.down_proj" for i in range(24, 30)]


def test_a_default_model_is_made_without_a_word_in_a_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HORSE_CACHE", str(tmp_path))
    assert (default_model() / "config.json").is_file()
    assert capfd.readouterr() == ("", "")


def test_it_knows_facts(backbone):
    tok = backbone.tokenizer
    ids = tok("The mother tongue of Danielle Darrieux is", return_tensors="pt").input_ids
    assert tok.decode(backbone.model(ids).logits[0, -1].argmax()).strip() == "French"


def test_fifty_facts_are_edited_at_once_and_taken_back(backbone):
    """Untrained and without the spread; training is the demo's affair."""
    records = load_records(FACTS / "edit.json", 50)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    evaluator = Evaluator(backbone, records)
    assert evaluator.evaluate().mean("efficacy") < 40
    hparams = settings(spread="uniform", strength=0.15)
    editor = HorseEditor.from_backbone(backbone, hparams)
    editor.edit(records)
    assert evaluator.evaluate().mean("efficacy") > 90
    editor.undo()
    for k, v in backbone.model.state_dict().items():
        assert torch.equal(v, before[k]), k


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_counterfact_and_zsre_are_read_whole():
    assert len(load_records(SHARED_DATA / "counterfact-edit.json")) == 8000
    with pytest.warns(UserWarning, match="without an answer"):
        assert len(load_records(SHARED_DATA / "zsre_mend_train.json")) == 998
    assert len(load_records(SHARED_DATA / "zsre_mend_eval.json")) == 500


def test_the_embedded_facts_are_split_by_subject():
    subjects = {}
    for split in ("train", "val", "edit"):
        records = load_records(FACTS / f"{split}.json")
        subjects[split] = {r.subject for r in records}
        assert all(r.rephrases and r.unrelated for r in records)
    assert not subjects["train"] & subjects["val"]
    assert not subjects["train"] & subjects["edit"]
    assert not subjects["val"] & subjects["edit"]


def test_the_demo_from_end_to_end(tmp_path):
    """Few steps and few facts: the real command has more of both."""
    hparams = settings(edits_per_step=20, max_iters=2, val_interval=2, val_edits=50, rank=16)
    outcome = run_demo(tmp_path / "demo", hparams, n_edits=20, command="horse demo --out d")
    assert [r["method"] for r in outcome.rows] == ["unedited", "HORSE, untrained", "HORSE, trained"]
    assert len(outcome.examples) == 10
    made = sorted(p.name for p in (tmp_path / "demo").iterdir())
    assert made == ["archive", "edit", "report.html", "results.json", "stats"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "of 20 facts hold" in page and "Each fact" in page and "horse demo --out d" in page
    assert report_of(tmp_path / "demo").html() == page  # drawn again
    assert not re.search(r'(src|href)="http', page)  # nothing is fetched


@pytest.mark.parametrize(("took", "steps"), [(0.1, 12), (7.0, 12), (15.0, 5), (300.0, 5)])
def test_a_slow_first_step_shortens_the_training(tmp_path, monkeypatch, took, steps):
    hparams = tiny.hparams(edits_per_step=3, max_epochs=4, val_interval=12)
    tiny_backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), hparams)
    data = tiny.records(9), tiny.records(3)
    t = demo.BriefTrainer(hparams, *data, tmp_path, tiny_backbone, progress=False)
    t.seconds = demo.SECONDS
    clock = iter([0.0, took])
    fake = SimpleNamespace(perf_counter=lambda: next(clock, took))
    monkeypatch.setattr(demo, "time", fake)
    t.run()
    assert t.step == t.best["step"] == steps  # validated at its end
    left_out = " So the edit without training was left out." if steps == 5 else ""
    assert t.said == f"Trained for {steps} of at most 12 steps; the first took {took} s.{left_out}"
    assert t.is_slow == (steps == 5)


def test_a_slow_machine_has_no_untrained_edit(tmp_path):
    settings = {"edits_per_step": 3, "max_iters": 2, "val_interval": 2, "val_edits": 3}
    tiny.files(tmp_path)
    hparams = tiny.hparams(model_name=str(tmp_path / "model"), keep_coef=0.0, **settings)
    outcome = demo._run_demo(tmp_path, hparams, 3, 0.0, None)
    assert [r["method"] for r in outcome.rows] == ["unedited", "HORSE, trained"]
    assert "of 3 facts hold" in (tmp_path / "report.html").read_text()


def test_a_demo_runs_again_in_the_users_folder(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    tiny.files(tmp_path)
    settings = {"edits_per_step": 3, "max_iters": 1, "val_interval": 1, "val_edits": 3}
    hparams = tiny.hparams(model_name=str(tmp_path / "model"), keep_coef=0.0, **settings)
    for _ in range(2):
        run_demo("~/d", hparams, 3)
    assert (tmp_path / "d/edit/delta.safetensors").is_file()
