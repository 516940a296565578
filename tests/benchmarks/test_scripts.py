"""The scripts in benchmarks/ run from end to end, small and on the CPU; what they time is ours."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks import gpu, scaling
from tests import tiny

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
    found = call(gpu, folder, "--times 2 --n-edits 40 60")
    assert [e["bench"]["n_edits"] for e in found["edits"]] == [40, 60]
    for e in found["edits"]:
        assert len(e["turns"]) == 2
        for turn in e["turns"]:
            assert all(turn[who]["seconds"] > 0 for who in ("ours", "reference"))
    said = capsys.readouterr().out
    assert "| 40 | 2 |" in said and "| 60 | 2 |" in said and "| capture |" in said


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
