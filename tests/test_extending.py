"""``docs/extending.md`` runs as it stands: a spread, a loss, a format and a row from outside."""

import re

import pytest
import torch

from horse_plugin import EditRecord, HorseEditor, HORSETrainer, ablate, compare, load_records
from horse_plugin.comparison.methods import ABLATIONS, METHODS
from horse_plugin.comparison.plan import DataSet
from horse_plugin.data.formats import FORMATS
from horse_plugin.method.losses import LOSSES
from horse_plugin.method.spread import SPREADS
from tests import ROOT, tiny

TABLES = (SPREADS, LOSSES, FORMATS, METHODS, ABLATIONS)


@pytest.fixture(autouse=True)
def page():
    """Run the page's examples, and take what they register out again."""
    before = [dict(table) for table in TABLES]
    text = (ROOT / "docs/extending.md").read_text()
    names = {"__name__": "page"}
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(example, names)
    yield names
    for table, was in zip(TABLES, before, strict=True):
        table.clear()
        table.update(was)


def test_a_spread_from_outside_edits(page):
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(spread="from_above"))
    captured = editor.capture(tiny.records())
    network = editor.untrained_network(captured)
    residuals = network.residuals(captured.keys, captured.grads)
    raw = network._residual(5, captured.keys[5], captured.grads[5], False)
    share = (residuals[4] * raw).sum().abs() / (residuals[4].norm() * raw.norm())
    assert torch.equal(residuals[5], raw) and share < 1e-5
    assert editor.edit(tiny.records()).tensors


def test_a_loss_from_outside_trains(page, tmp_path):
    data = tiny.records(18)
    hparams = tiny.hparams(loc_loss="reverse_kl", max_iters=2, val_interval=2)
    backbone = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams).backbone
    trainer = HORSETrainer(hparams, data[:12], data[12:], tmp_path, backbone, progress=False)
    trainer.run()
    assert 0 < trainer.history[-1]["unrelated"] < 1
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_a_format_from_outside_is_read(page):
    (record,) = load_records([{"subject": "Oslo", "relation": "is in", "object": "Norway"}])
    assert record == EditRecord("Oslo is in", "Norway", subject="Oslo")
    (flat,) = load_records([{"prompt": "Oslo is in", "target_new": "Norway"}])
    assert flat.prompt == "Oslo is in"  # the others are read as before


@pytest.mark.slow
def test_rows_from_outside_are_measured_and_stand_in_the_tables(page, tmp_path):
    tiny.files(tmp_path)
    (tmp_path / "HORSE").mkdir()
    (tmp_path / "tiny.yaml").rename(tmp_path / "HORSE/tiny.yaml")
    facts = tiny.records(18)
    data = [DataSet("facts", facts[:4], facts[6:12], facts[12:])]
    options = {"models": ["tiny"], "n_edits": (4,), "hparams_dir": tmp_path}
    rows = compare(tmp_path / "c", ["unedited", "halved"], datasets=data, **options)
    assert [r.get("reason") for r in rows] == [None, None]
    assert "| halved |" in (tmp_path / "c/table.md").read_text()
    rows = ablate(
        tmp_path / "a", tmp_path / "HORSE/tiny.yaml", data, (4,), rows=["Eq. 6 from above"]
    )
    assert "reason" not in rows[1]
    assert "| Eq. 6 from above |" in (tmp_path / "a/table.md").read_text()
