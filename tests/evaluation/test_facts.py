"""Each fact's fate: figures that average to those of results.json, and what the model says."""

import csv
from dataclasses import replace

import pandas
import pytest
import torch

from horse_plugin import HorseEditor, Query, UsageError
from horse_plugin.editing.checked import checked_edit
from horse_plugin.evaluation.facts import read_facts, save_facts
from horse_plugin.evaluation.metrics import FIGURES
from tests import tiny


@pytest.fixture(scope="module")
def edited():
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(strength=5000.0))
    records = tiny.records()
    more = Query("the country of Lima is", "Paris")
    records[1] = replace(records[1], unrelated=(*records[1].unrelated, more), case_id="one")
    records[2] = replace(records[2], rephrases=(), unrelated=())
    delta, rows = checked_edit(editor, records, "facts", max_rise=1e9)
    return editor, delta, rows


def test_a_row_has_every_figure_of_its_record_and_the_rows_average_to_the_results(edited):
    _, delta, rows = edited
    frame = pandas.DataFrame(delta.facts)
    for figure in FIGURES:
        if rows[1][figure] is None:
            assert frame[figure].isna().all()
        else:
            assert frame[figure].mean() == pytest.approx(rows[1][figure])
    assert frame["holds"].sum() == delta.about["figures"]["held"][0]
    assert list(frame["record"]) == list(range(6)) and frame["case_id"][1] == "one"


def test_a_row_says_what_the_model_predicts_before_and_after(edited):
    editor, delta, _ = edited
    (prompt,) = editor.backbone.prepare(tiny.records()[:1], ["edit"]).flat()
    assert len(prompt.answer) == 1

    @torch.no_grad()
    def next_token():
        logits = editor.backbone.model(torch.tensor([prompt.ids[: prompt.start]])).logits
        return editor.backbone.tokenizer.decode(logits[0, -1].argmax()).strip()

    row = delta.facts[0]
    assert row["after"] == next_token()
    editor.undo()
    assert row["before"] == next_token() != row["after"]
    editor.apply(delta)
    assert "rephrase" in row and "rephrase" not in delta.facts[2]
    assert row["unrelated_wanted"] == tiny.records()[0].unrelated[0].answer


def test_rows_are_saved_with_the_edit_and_read_again(edited, tmp_path):
    _, delta, _ = edited
    delta.save(tmp_path / "edit")
    read = read_facts(tmp_path / "edit")
    assert [row["prompt"] for row in read] == [r.prompt for r in delta.records]
    assert [row["holds"] for row in read] == [str(row["holds"]) for row in delta.facts]
    save_facts(tmp_path / "odd.csv", [{"prompt": 'a "b", c\r\nd\re', "x": None}, {"y": 1}])
    with (tmp_path / "odd.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == [['a "b", c\r\nd\re', "", ""], ["", "", "1"]]
    with pytest.raises(UsageError, match=r"facts\.csv: not there"):
        read_facts(tmp_path)
