"""The scripts in benchmarks/ run from end to end, small and on the CPU; what they time is ours."""

import json
import subprocess
import sys
import textwrap
from argparse import Namespace

import pytest
import torch

from benchmarks import gpu, scaling
from tests import ROOT, tiny

pytestmark = pytest.mark.slow


def test_the_gpu_script_without_a_gpu_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert "no CUDA GPU" in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny config, a tokenizer and facts; the options that name them."""
    folder = tmp_path_factory.mktemp("benchmarks")
    config = tiny.CONFIGS["llama"]()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)
    facts = [{"prompt": r.prompt, "target_new": r.target_new} for r in tiny.records(30)]
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def call(script, folder, options: str) -> dict:
    files = f"--device cpu --config {folder} --tokenizer {folder} --data {folder}/facts.json"
    out = folder / "found.json"
    argv = [script.__file__, *f"{files} --out {out} {options}".split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        script.main()
    return json.loads(out.read_text())


def test_the_gpu_script_runs_on_anything(folder, capsys):
    found = call(gpu, folder, "--times 2 --n-edits 40 60 --n-train 50")
    done = [(w["work"], w["facts"]) for w in found["work"]]
    assert done == [("edit", 40), ("training step", 50), ("edit", 60)]
    for w in found["work"]:
        assert len(w["turns"]) == 2
        for turn in w["turns"]:
            assert all(turn[who]["seconds"] > 0 for who in ("ours", "reference"))
            assert 0 < turn["reference"]["file_seconds"] < turn["reference"]["seconds"]
    said = capsys.readouterr().out
    assert "| edit | 40 | 2 |" in said and "| training step | 50 | 2 |" in said
    assert "| capture |" in said


def test_the_gpu_script_needs_torch_and_transformers_alone(folder, tmp_path):
    """Nothing of ours is installed there; what transformers brings with it is."""
    code = """
        import importlib.metadata, runpy, sys
        for name in {missing}:
            sys.modules[name] = None
        sys.argv = ["gpu.py", *"{options}".split()]
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    """
    missing = "accelerate datasets gguf jinja2 matplotlib peft easyeditor lm_eval".split()
    options = f"--device cpu --config {folder} --tokenizer {folder} --data {folder}/facts.json "
    options += f"--times 1 --n-edits 40 --n-train --out {tmp_path}/gpu.json"
    code = textwrap.dedent(code).format(missing=missing, options=options)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["work"]


def test_facts_that_are_asked_for_again_are_other_prompts():
    records = tiny.records(10)
    more = gpu.enough(records, 25)
    assert more[:10] == records
    assert len({r.prompt for r in more}) == 25
    assert gpu.enough(records, 3) == records[:3]


def test_what_begins_after_the_time_is_left_out_and_turns_end_with_it(folder):
    found = call(gpu, folder, "--times 3 --n-edits 40 --n-train --minutes -1")
    assert not found["work"]


def test_the_scaling_script_measures_fits_and_extrapolates(folder, capsys, monkeypatch):
    measure = scaling.measure

    def quicker(args, n, width=None, depth=None, processes=1):
        """Only what needs processes of its own gets them."""
        if processes > 1:
            return measure(args, n, processes=processes)
        return scaling.point(Namespace(**vars(args) | {"alone": n, "width": width, "depth": depth}))

    monkeypatch.setattr(scaling, "measure", quicker)
    options = "--n-edits 10 40 80 --widths 64 --depths 9 --processes 2 --model-edits 20 --times 1"
    found = call(scaling, folder, options)
    assert [p["n_edits"] for p in found["edits"]] == [10, 40, 80]
    (wide,), (deep,), (two,) = found["width"], found["depth"], found["processes"]
    assert (wide["width"], deep["depth"], two["processes"]) == (64, 9, 2)
    assert two["n_answer_tokens"] == wide["n_answer_tokens"]
    assert "| 1,000,000, extrapolated |" in capsys.readouterr().out
    monkeypatch.setattr(scaling.subprocess, "run", None)  # a second run measures no point again
    assert call(scaling, folder, options)["processes"] == found["processes"]


def test_the_fit_finds_the_constants_that_made_the_points():
    shapes = [[48, 32]] * 6

    def point(n):
        solve = 1e-9 * sum(scaling.solve_operations(2 * n, *s) for s in shapes)
        stages = [{"name": "trace", "seconds": 1.0}, {"name": "solve", "seconds": solve}]
        times = {"seconds": 0.5 + 0.01 * n + solve, "peak_memory_mb": 300 + 0.2 * n}
        counts = {"n_edits": n, "n_answer_tokens": 2 * n, "shapes": shapes}
        return times | counts | {"bench": {"stages": stages}}

    laws = scaling.fit([point(n) for n in (5, 10, 100, 1000)])
    wanted = point(1_000_000)
    for name, value in scaling.extrapolate(laws, 1_000_000).items():
        assert value == pytest.approx(wanted[name], rel=1e-6)
