"""The examples run as they stand; the scripts on a tiny model, the notebook on the default one."""

import json
import runpy
from pathlib import Path

import pytest

from tests import ROOT, tiny

pytest.importorskip("easyeditor")

pytestmark = pytest.mark.easyedit

EXAMPLES = ROOT / "examples"


@pytest.fixture
def tiny_hparams(tmp_path, monkeypatch) -> str:
    """A YAML for a tiny model in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    tiny.model("llama").save_pretrained("gpt-tiny")
    tiny.bpe_tokenizer().save_pretrained("gpt-tiny")
    Path("tiny.yaml").write_text("model_name: gpt-tiny\nrank: 4\ndevice: cpu\ndtype: fp32\n")
    return "tiny"


def run(monkeypatch, name: str, *arguments: str):
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_scripts_train_and_edit(tiny_hparams, monkeypatch, capsys):
    settings = ("--hparams_dir", tiny_hparams)
    run(monkeypatch, "train_horse.py", *settings, "--n_edits", "50", "--max_iters", "1")
    archive = capsys.readouterr().out.strip().removeprefix("archive: ")
    edit = (*settings, "--archive", archive, "--ds_size", "8")
    run(monkeypatch, "run_horse_counterfact.py", *edit)
    assert "post rephrase_acc" in capsys.readouterr().out
    assert len(json.loads(Path("output/HORSE_counterfact.json").read_text())) == 8
    run(monkeypatch, "run_horse_zsre.py", *edit, "--batch_size", "4")
    assert "generalization" in capsys.readouterr().out


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient(
        nbformat.read(EXAMPLES / "horse.ipynb", as_version=4),
        timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
