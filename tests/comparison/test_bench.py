"""`horse bench`: every stage measured, the model left alone, random weights for any config."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from horse_plugin.cli.main import app
from horse_plugin.comparison.bench import bench, device_name, weight_counts
from horse_plugin.evaluation.results import STATUS, peak_memory_mb, reset_peak_memory, timed
from horse_plugin.model.backbone import Backbone
from tests import tiny

STAGES = "tokenise trunk capture network residual and spread solve apply"


@pytest.mark.slow
@pytest.mark.parametrize("sweeps", [1, 3])
def test_every_stage_is_measured_and_the_model_left_as_it_was(sweeps):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), trunk_cache_gb=1)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    records = tiny.records(20)
    found = bench(backbone, tiny.hparams(edits_per_step=20, edit_sweeps=sweeps), records)
    wanted = STAGES if sweeps == 1 else STAGES.replace("solve", "further sweeps solve")
    assert " ".join(s["name"] for s in found["stages"]) == wanted
    for stage in found["stages"]:
        assert stage["seconds"] > 0 and stage["peak_memory_mb"] > 0
        assert stage["name"] in ("tokenise", "further sweeps") or stage["floor_seconds"] > 0
    assert [s["name"] for s in found["others"]] == [
        "metric",
        "evaluation before",
        "evaluation after",
        "training step",
    ]
    prompts = backbone.prepare(records, ["edit"]).flat()
    assert found["n_answer_tokens"] == sum(len(p.answer) for p in prompts)
    for name, weight in backbone.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_memory_and_time_are_of_all_gpus(monkeypatch):
    peaks, waited = [3 * 2**20, 5 * 2**20], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[gpu])
    assert peak_memory_mb() == 8
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    devices = [torch.device("cuda", 0), torch.device("cpu"), torch.device("cuda", 1)]
    assert timed(lambda: 7, *devices)[1] == 7 and waited == devices[::2]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {gpu.index}")
    assert device_name(devices[2]) == "GPU 1"


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="the system has no /proc")
def test_the_peak_is_a_programs_own_and_not_its_parents():
    held = torch.ones(2**26)  # 256 MB
    code = "from horse_plugin.evaluation.results import *; import sys; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held[-1] == 1
    before = peak_memory_mb()
    more = torch.ones(2**27)
    assert peak_memory_mb() > before + 400 and more[-1] == 1
    assert float(child.stdout) < before


def test_floors_count_the_operations():
    """A block of the tiny Llama: q, k, v, o of 32×(32+16+16+32), three of 32×48 in the MLP."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    mlp = 3 * 32 * 48
    block = 32 * 96 + mlp
    assert weight_counts(backbone) == {
        "trunk": 2 * block,
        "top": 6 * block - mlp,
        "above": 5 * block - mlp,
        "last": mlp,
        "head": 400 * 32,
    }


@pytest.mark.slow
def test_a_config_alone_is_enough(tmp_path):
    config = tiny.CONFIGS["llama"]()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    out = tmp_path / "bench.json"
    args = ["bench", "--config", str(tmp_path), "--n-edits", "12", "--out", str(out)]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0
    (found,) = json.loads(out.read_text())
    assert found["n_edits"] == 12
    assert "residual and spread" in result.output


def test_a_run_on_the_cpu_leaves_the_gpus_of_the_machine_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reset_peak_memory()
    assert peak_memory_mb() > 1  # of the process
