"""The README's first example runs as it stands, and says what it is said to say."""

import re
import shlex
import sys
import textwrap

import pytest

from horse_plugin.cli import main as cli
from horse_plugin.editing.settings import EXAMPLE_FACTS
from tests import ROOT

SECTION = (ROOT / "README.md").read_text().partition("## A first edit")[2].partition("\n## ")[0]
INDENTED = r"(?:^ {4}.*\n(?:\n(?= {4}))?)+"
BLOCKS = map(textwrap.dedent, re.findall(INDENTED, SECTION, re.M))
FACTS, SHELL, PYTHON = BLOCKS


def test_the_facts_are_those_that_horse_init_writes():
    assert FACTS == EXAMPLE_FACTS


@pytest.mark.real_model
@pytest.mark.usefixtures("shipped_text", "kept_stats")
def test_the_commands_edit_ask_and_undo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "facts.json").write_text(FACTS)
    printed = []
    for line in re.findall(r"^\$ (.+)$", SHELL, re.M):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as left:
            cli.run()
        printed.append(capsys.readouterr().out)
        assert not left.value.code, line
    edited, asked, undone, again = printed
    # Whether two or three unrelated answers of four stay is a matter of the last bits.
    assert "4 of 4 facts hold" in edited and "The model is" in " ".join(edited.split())
    assert "damaged" not in edited
    assert all(word in asked for word in ("Oslo", "Bergen", "Paris"))
    assert "Undone: 001." in undone
    assert "Oslo" in again and "Bergen" not in again


@pytest.mark.real_model
@pytest.mark.usefixtures("shipped_text", "kept_stats")
def test_the_lines_of_python_edit_save_and_undo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.json").write_text(FACTS)
    names = {}
    exec(PYTHON, names)
    assert "Bergen" in capsys.readouterr().out
    assert [d.name for d in names["editor"].history] == [names["delta"].name]
