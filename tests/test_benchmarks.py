"""The scripts in benchmarks/ run from end to end, small and on the CPU; what they time is ours."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu


def test_the_gpu_script_without_a_gpu_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "no CUDA GPU" in line
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_runs_on_anything(monkeypatch, capsys, tmp_path):
    config = tiny.CONFIGS["llama"]()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    tiny.bpe_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "facts.json").write_text(
        json.dumps([{"prompt": r.prompt, "target_new": r.target_new} for r in tiny.records(30)])
    )
    line = "gpu.py --device cpu --config {0} --tokenizer {0} --data {0}/facts.json --times 2"
    argv = f"{line} --n-edits 40 60 --out {{0}}/gpu.json".format(tmp_path).split()
    monkeypatch.setattr(sys, "argv", argv)
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [e["bench"]["n_edits"] for e in found["edits"]] == [40, 60]
    for e in found["edits"]:
        assert len(e["turns"]) == 2
        for turn in e["turns"]:
            assert all(turn[who]["seconds"] > 0 for who in ("ours", "reference"))
    said = capsys.readouterr().out
    assert "| 40 | 2 |" in said and "| 60 | 2 |" in said and "| trace |" in said


def test_facts_that_are_asked_for_again_are_other_prompts():
    records = tiny.records(10)
    more = gpu.enough(records, 25)
    assert more[:10] == records
    assert len({r.prompt for r in more}) == 25
    assert gpu.enough(records, 3) == records[:3]


@pytest.mark.parametrize("minutes", [-1, 60])
def test_turns_end_with_the_time_but_not_before_the_first(minutes):
    class Nothing:
        def edit(self):
            pass

        edit_reference = edit

    assert len(gpu.turns(Nothing(), 3, 60 * minutes + gpu.time.perf_counter())) == max(
        1, 3 * (minutes > 0)
    )
