"""The command line, run in the process of the test."""

import sys

import pytest

from horse_plugin.cli import main as cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in a folder: (exit code, what it printed, what it complained)."""

    def call(folder, line: str):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["horse", *line.split()])
        with pytest.raises(SystemExit) as left:
            cli.run()
        printed = capsys.readouterr()
        return left.value.code or 0, printed.out, printed.err

    return call
