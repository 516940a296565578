"""One line for a whole job, and nothing where nobody watches."""

import io
import re
import sys

from horse_plugin import Evaluator, HorseEditor, checked_edit
from horse_plugin.model.backbone import Backbone
from horse_plugin.progress import Job
from tests import tiny


class Terminal(io.StringIO):
    def isatty(self):
        return True


def percentages(said: str) -> list[int]:
    return [int(found) for found in re.findall(r"(\d+)%", said)]


def test_one_line_names_the_steps_and_the_whole():
    terminal = Terminal()
    with Job("edit", {"capture": 6, "evaluate": 4}, terminal) as job:
        assert list(job.watch("capture", [("a", 3), ("b", 3)])) == ["a", "b"]
        assert list(job.watch("evaluate", [("c", 10)])) == ["c"]  # more than was thought
    said = terminal.getvalue()
    assert "edit, capture:   0%" in said and "edit, evaluate:  38%" in said and "left" in said
    assert "\n" not in said.strip("\n")


def test_what_was_planned_and_not_done_is_left_out():
    terminal = Terminal()
    with Job("edit", {"capture": 8, "evaluate": 2}, terminal) as job:
        list(job.watch("capture", [("a", 2)]))
        job.finish("capture")
        list(job.watch("evaluate", [("c", 2)]))
    assert percentages(terminal.getvalue())[-1] in (50, 100)
    assert 20 not in percentages(terminal.getvalue())


def test_the_line_of_an_edit_plans_every_step(monkeypatch, tmp_path):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    settings = {"preserve": "shipped", "preserve_tokens": 256, "stats_dir": str(tmp_path)}
    hparams = tiny.hparams(**settings)
    backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), hparams, progress=True)
    editor = HorseEditor.from_backbone(backbone, hparams)
    checked_edit(editor, tiny.records(), "facts", max_rise=1e9)
    said = terminal.getvalue()
    steps = ["capture", "statistics", "ordinary text", "evaluate", "writing"]
    assert all(f"edit, {step}:" in said for step in steps)
    found = percentages(said)
    assert found == sorted(found)


def test_where_nobody_watches_nothing_is_written(capsys):
    log = io.StringIO()
    with Job("edit", {"capture": 10}, log) as job:
        assert list(job.watch("capture", [("a", 3)])) == ["a"]
    backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(), progress=True)
    checked_edit(
        HorseEditor.from_backbone(backbone, tiny.hparams()), tiny.records(), "facts", max_rise=1e9
    )
    Evaluator(backbone, tiny.records()).evaluate()
    assert log.getvalue() == "" == capsys.readouterr().err
    assert backbone.job is None
