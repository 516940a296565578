"""The harness's model ``horse``: its tasks run on the edited model."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.tasks import TaskManager

from horse_plugin import HorseEditor
from horse_plugin.comparison.harness import HorseLM
from tests import ROOT, tiny

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: " {{{{target_new}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an edit of it, and a task of the harness on the facts of the edit."""
    path = tmp_path_factory.mktemp("harness")
    tiny.files(path)
    settings = json.loads((path / "tiny.yaml").read_text()) | {"strength": 3.0}
    settings |= {"ridge": 0.01, "edit_sweeps": 8}
    (path / "tiny.yaml").write_text(json.dumps(settings))
    HorseEditor.from_hparams(str(path / "tiny.yaml")).edit(str(path / "val.json")).save(path / "e")
    lines = [json.dumps(fact) for fact in json.loads((path / "val.json").read_text())]
    (path / "facts.jsonl").write_text("\n".join(lines))
    (path / "tasks").mkdir()
    (path / "tasks/capitals.yaml").write_text(TASK.format(file=path / "facts.jsonl"))
    return path


@pytest.mark.slow
def test_a_task_runs_on_the_model_before_and_after_an_edit(folder):
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def found(**args):
        results = lm_eval.simple_evaluate(
            model="horse",
            model_args={"hparams": str(folder / "tiny.yaml"), **args},
            tasks=["capitals"],
            task_manager=manager,
            bootstrap_iters=0,
        )["results"]["capitals"]
        return results["acc,none"], results["perplexity,none"]

    (acc_before, before), (acc_after, after) = found(), found(delta=str(folder / "e"))
    assert acc_after > acc_before and after < before


def test_the_edits_in_force_are_those_of_the_folder(folder):
    lm = HorseLM(str(folder / "tiny.yaml"), str(folder / "e"), batch_size=2)
    assert [len(d.records) for d in lm.editor.history] == [6]


@pytest.mark.slow
def test_the_harness_s_own_command_line_knows_the_model(folder):
    command = [sys.executable, "-m", "horse_plugin.comparison.harness", "run", "--model", "horse"]
    command += ["--model_args", f"hparams={folder}/tiny.yaml,delta={folder}/e"]
    command += ["--tasks", "capitals", "--include_path", str(folder / "tasks")]
    command += ["--output_path", str(folder / "out.json")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "|capitals|" in done.stdout, done.stderr
