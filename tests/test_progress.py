"""One line for a whole job, and nothing where nobody watches."""

import io

from horse_plugin import Evaluator, HorseEditor, checked_edit
from horse_plugin.model.backbone import Backbone
from horse_plugin.progress import Job
from tests import tiny


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_line_names_the_steps_and_the_whole():
    terminal = Terminal()
    with Job("edit", 10, ("capture", "evaluate"), terminal) as job:
        assert list(job.watch("capture", [("a", 3), ("b", 3)])) == ["a", "b"]
        assert list(job.watch("evaluate", [("c", 10)])) == ["c"]  # more than was thought
    said = terminal.getvalue()
    assert "edit, capture:   0%" in said and "edit, evaluate:  60%" in said and "left" in said
    assert "\n" not in said.strip("\n")


def test_where_nobody_watches_nothing_is_written(capsys):
    log = io.StringIO()
    with Job("edit", 10, (), log) as job:
        assert list(job.watch("capture", [("a", 3)])) == ["a"]
    backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(), progress=True)
    checked_edit(
        HorseEditor.from_backbone(backbone, tiny.hparams()), tiny.records(), "facts", max_rise=1e9
    )
    Evaluator(backbone, tiny.records()).evaluate()
    assert log.getvalue() == "" == capsys.readouterr().err
    assert backbone.job is None
