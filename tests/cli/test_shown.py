"""Text of files is text: on the terminal, in tables, in reports, and in the names of files."""

import csv
import functools
import io
import json
import re
import types

import pytest
import torch
from rich.console import Console

from horse_plugin import HorseEditor, UsageError
from horse_plugin.cli import app, asking, changing, measuring, preparing, show, using
from horse_plugin.cli.console import PlainConsole
from horse_plugin.comparison import tables
from horse_plugin.comparison.output import write_output
from horse_plugin.data.records import EditRecord
from horse_plugin.errors import visible
from horse_plugin.evaluation.facts import READ, read_facts, save_facts
from horse_plugin.evaluation.report import Report, Section
from horse_plugin.evaluation.tables import Table
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.moments import moments_file
from horse_plugin.storage.files import file_name
from horse_plugin.training.trainer import Forecast
from tests import tiny

NASTY = "[/red][conceal]x[/conceal] :smile: \x1b[8m\x1b]0;t\x07\r\u202e\ud800\n<b>&$\\$ |`*_{}~^%#"
SHOWN = r"[/red][conceal]x[/conceal] :smile: \x1b[8m\x1b]0;t\x07\r\u202e\ud800\n<b>&$\$ |`*_{}~^%#"
WHOLE = NASTY.replace("\ud800", "")  # as files may hold it
COMMANDS = preparing, changing, using, measuring


def test_what_is_hidden_or_steers_a_terminal_is_escaped_and_nothing_else():
    assert visible(NASTY) == SHOWN
    for text in ("Zürich, Ōsaka 東京\u3000都", "می\u200cخواهم", "👩\u200d🔬", "a\u00a0b", ""):
        assert visible(text) == text
    assert visible("\u2028\u2029\u0085\U000e0041") == r"\u2028\u2029\x85\U000e0041"


@pytest.fixture
def printed(monkeypatch):
    """What is printed to a terminal of 400 columns."""
    file = io.StringIO()
    console = PlainConsole()
    console.file, console.width, console._force_terminal = file, 400, True
    for commands in COMMANDS:
        monkeypatch.setattr(commands, "console", console)
    return file


def plain(text: str) -> str:
    """The text without the styles that rich gave it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_gigabytes_of_a_forecast_are_10_to_the_9_bytes(monkeypatch):
    monkeypatch.setattr(show, "free_bytes", lambda device: 24 * 2**30)
    found = Forecast(2, 1, 60.0, 1.0, peak_memory_mb=16 * 2**10)
    said = show.forecast(found, torch.device("cpu"))
    assert said.endswith("about 17.2 GB, the model included; 25.8 GB are free now.")


@pytest.fixture
def horse(run, tmp_path):
    return functools.partial(run, tmp_path)


def edit(n=3, **about):
    records = [EditRecord(f"fact {i} of {WHOLE} is", f"{i} {WHOLE}") for i in range(n)]
    delta = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()).edit(tiny.records(2))
    delta.records = records
    delta.about |= about
    return delta


def test_show_shows_markup_and_escapes_as_they_are_written(tmp_path, horse, printed):
    text = WHOLE
    figures = {"before": {}, "after": {"efficacy": 1.0}}
    examples = [{"kind": text, "prompt": text, "before": text, "after": text}]
    delta = edit(made=text, figures=figures | {"examples": examples})
    delta.about["model"]["name"] = text
    delta.about["versions"] = {text: text}
    delta.save(tmp_path / "e")
    assert horse("show e")[0] == 0
    shown = plain(printed.getvalue())
    assert not any(c in shown for c in "\x1b\x07\r\u202e")
    assert shown.count(visible(WHOLE)) >= 3 + 3 + 3 + 4


def test_show_pages_through_all_facts(tmp_path, horse, printed):
    edit(25).save(tmp_path / "e")
    seen = []
    for line in ("show e", "show e --skip 10 --facts 12", "show e --skip 22"):
        assert horse(line)[0] == 0
        seen += re.findall(r"fact (\d+) of", printed.getvalue())
        assert re.search(r"Facts \d+ to \d+ of 25", plain(printed.getvalue()))
        printed.seek(0), printed.truncate()
    assert seen == [str(i) for i in range(25)]
    assert horse("show e --skip 30")[0] == 0
    assert "None of 25 facts comes after 30 others." in plain(printed.getvalue())


def test_an_error_or_a_warning_steers_no_terminal(tmp_path, horse):
    name = "\x1b]0;pwned\x07\x1b[2Jx"
    delta = edit()
    delta.about["model"] |= {"name": name, "n_blocks": 9}
    delta.save(tmp_path / "e")
    tiny.files(tmp_path)
    code, _, err = horse("eval --hparams tiny --data val.json --delta e")
    assert code == 2 and visible(name) in err and "\x1b" not in err


def row(method="HORSE", dataset="facts", n=3, **more):
    figures = dict.fromkeys(("efficacy", "generalization", "specificity"), 50.0)
    figures |= {"drift": 0.1, "perplexity": 3.0, "locality": 1.0, "edit_seconds": 1.0}
    about = {"method": method, "dataset": dataset, "model": f"m/{dataset}", "n_edits": n, "seed": 0}
    return about | figures | {"train_seconds": None, "peak_memory_mb": 1.0} | more


@pytest.mark.slow
@pytest.mark.parametrize("name", [WHOLE, "<img src=x onerror=alert(1)>"])
def test_a_report_shows_names_as_text(tmp_path, name):
    rows = [row(m, name, n, budget=name) for n in (3, 6) for m in ("unedited", "HORSE", name)]
    write_output(tmp_path / "out", [*rows, row("FT", name, reason=name)])
    page = (tmp_path / "out" / "report.html").read_text()
    assert name not in page and "<img" not in page and "<b>&$" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert all(p.is_file() for p in (tmp_path / "out").iterdir())


def test_a_table_is_escaped_in_every_format():
    table = Table([NASTY, "b"], [[NASTY, (NASTY, "best")]], NASTY, [(NASTY, 1)], [NASTY])
    latex = table.latex()
    assert not re.search(r"(?<!\\)[%#_]", latex.replace(r"\multicolumn{1}{c}", ""))
    assert r"\textbackslash{}x1b[8m" in latex and r"\$\textbackslash{}\$" in latex
    markdown = table.markdown().splitlines()
    assert len(markdown) == 7  # caption, two empty lines, three of the table, a note
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in markdown[2:5])
    assert "<b>" not in table.markdown() and r"\[conceal\]" in table.markdown()
    fact = dict.fromkeys(READ, NASTY) | {"generalization": "", "locality": ""}
    sections = [Section(NASTY, NASTY, tables=[table])]
    page = Report(NASTY, NASTY, None, sections, [fact], NASTY, {NASTY: NASTY}).html()
    assert "<b>&" not in page.replace("<b>[", "[")
    for text in (latex, table.markdown(), page):
        assert r"\x1b" in text.replace(r"\textbackslash{}", "\\").replace("\\\\", "\\")
        assert "\x1b" not in text


def test_a_spreadsheet_computes_nothing():
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=2", " =3", "a=b"]
    rows = [row(dataset=text, **{"=key": 1}) for text in texts]
    read = list(csv.reader(io.StringIO(tables.to_csv(rows))))
    cells = [cell for line in read for cell in line if re.fullmatch(r"\W*[=+@-].*", cell)]
    assert len(cells) == 5 + 1 and all(cell.startswith("'") for cell in cells)
    assert [line[read[0].index("drift")] for line in read[1:]] == ["0.1"] * len(texts)
    assert "-0.5" in tables.to_csv([row(drift=-0.5)])  # a number is a number


def test_facts_compute_nothing_in_a_spreadsheet_and_are_read_as_they_were(tmp_path):
    texts = ["=1+1", "+1", "-1", "@x", "\t=1", " =3", "'=4", "''-5", "'t is", "a=b", "a\r\nb"]
    save_facts(tmp_path / "facts.csv", [dict.fromkeys(READ, text) for text in texts])
    assert read_facts(tmp_path) == [dict.fromkeys(READ, text) for text in texts]
    _, *lines = csv.reader(io.StringIO((tmp_path / "facts.csv").read_text(), newline=""))
    assert not any(re.match(r"\s*[=+@-]", cell) for line in lines for cell in line)
    (tmp_path / "facts.csv").write_text("prompt,wanted\na,b\n")
    with pytest.raises(UsageError, match=r"facts\.csv: lacks a column of after, before"):
        read_facts(tmp_path)


def test_what_a_model_writes_steers_no_terminal(capsys):
    tokenizer = tiny.bpe_tokenizer()

    def ask(prompt, n_tokens, before, streamer):
        for text in (prompt, f"{WHOLE} x"):
            streamer.put(torch.tensor(tokenizer(text).input_ids))
        streamer.end()

    editor = types.SimpleNamespace(ask=ask, backbone=types.SimpleNamespace(tokenizer=tokenizer))
    asking.answer(editor, ["the capital"], False, 9)
    written = capsys.readouterr().out
    assert "the capital" not in written and "\\x1b[8m" in written and "\n<b>" in written
    assert not any(c in written for c in "\x1b\x07\r\u202e")


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc", ".hidden", "a\0b", "a\nb", "~"])
def test_no_name_is_a_way_out_of_a_folder(tmp_path, name):
    made = file_name(name)
    assert (tmp_path / made).resolve().parent == tmp_path and not made.startswith(".")
    assert len({file_name(n) for n in (name, f"{name}x")}) == 2
    assert file_name("Llama-2.7b (π) v1,5") == "Llama-2.7b (π) v1,5"


def test_a_models_name_is_no_way_out_of_a_folder():
    hparams = HORSEHyperParams("models/..", results_dir="r")
    assert ".." not in hparams.archive_folder.parts
    backbone = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()).backbone
    backbone.model.config.name_or_path = "models/.."
    assert ".." not in moments_file("stats", backbone, "m", "data", 3).parts
    for names in (("../../data", "float32"), ("data", "../x")):
        with pytest.raises(UsageError, match="mom2_dataset and mom2_dtype hold no /"):
            moments_file("stats", backbone, "m", names[0], 3, names[1])
    assert json.dumps(str(moments_file("s", backbone, "m", "d", 3)))


def test_a_console_of_ours_is_the_only_one():
    assert isinstance(app.console, PlainConsole) and issubclass(PlainConsole, Console)
    assert all(commands.console is app.console for commands in COMMANDS)
    assert asking.console is app.console
