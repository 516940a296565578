"""No test reaches for a model hub; the shipped text is short, except where a test asks for it."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from horse_plugin.assets import CALIBRATION, HELDOUT
from horse_plugin.evaluation.generation import LENGTH
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def short_text(tmp_path_factory):
    """Put three short pieces of each kind in the place of each shipped text, for speed."""
    tiny.shorten_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def kept_stats(tmp_path, tmp_path_factory):
    """Have ``tmp_path/stats`` be one folder of second moments for all tests of a run.

    On the default model they take longer than all else that such a test does.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in that of all
        folder = folder.parent
    (folder / "stats").mkdir(exist_ok=True)
    (tmp_path / "stats").symlink_to(folder / "stats")
    return tmp_path / "stats"


@pytest.fixture
def shipped_text(monkeypatch):
    """Put the shipped text back."""
    monkeypatch.setattr("horse_plugin.evaluation.generation.LENGTH", LENGTH)
    monkeypatch.setattr("horse_plugin.data.corpus.HELDOUT", HELDOUT)
    monkeypatch.setattr("horse_plugin.data.corpus.CALIBRATION", CALIBRATION)
