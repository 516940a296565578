"""No test reaches for a model hub; the shipped text is short, except where a test asks for it."""

import json
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from horse_plugin.assets import CALIBRATION, HELDOUT
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def short_text(tmp_path_factory):
    """Put three short pieces of each kind in the place of each shipped text, for speed."""
    folder, patch = tmp_path_factory.mktemp("text"), pytest.MonkeyPatch()
    for name, start in (("HELDOUT", 0), ("CALIBRATION", 100)):
        kinds = ("prose", "questions", "chat", "code", "languages")
        pieces = [
            {"kind": kind, "text": tiny.words(start + 20 * i + j, 15)}
            for i in range(3)
            for j, kind in enumerate(kinds)
        ]
        (folder / f"{name}.json").write_text(json.dumps(pieces))
        patch.setattr(f"horse_plugin.data.corpus.{name}", folder / f"{name}.json")
    yield
    patch.undo()


@pytest.fixture
def shipped_text(monkeypatch):
    """Put the shipped text back."""
    monkeypatch.setattr("horse_plugin.data.corpus.HELDOUT", HELDOUT)
    monkeypatch.setattr("horse_plugin.data.corpus.CALIBRATION", CALIBRATION)
