"""Two processes (gloo, CPU) give what one gives: deltas, archives, figures; and write once."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from horse_plugin import Evaluator, HorseEditor, HORSEHyperParams, HORSETrainer, distributed
from horse_plugin.editing.chain import read_edits
from horse_plugin.errors import HorseError
from horse_plugin.hparams import SPREADS
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.files import PART
from tests import processes, tiny

pytestmark = pytest.mark.slow

N_EDITS = (1, 12, 60)  # fewer than the processes, than the keys are wide, and more
TRAINED = {
    "orthogonal": {"edits_per_step": 12, "train_spread": True},
    "uniform, kl": {"edits_per_step": 12, "spread": "uniform", "loc_loss": "kl"},
    "primal": {"edits_per_step": 60, "ridge": 0.1},
}


def edit(spread: str, n: int) -> dict:
    hparams = tiny.hparams(spread=spread, editor_batch_size=7)
    if n == 1:  # too few tokens for statistics of their own
        hparams.archive = None
        hparams.lr = 1e-3
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams)
    return editor.edit(tiny.records(n)).shifts


def swept() -> dict:
    """An edit in sweeps with its keys at subjects, of which two are one, and with contrasts."""
    settings = {"token": "subject", "edit_sweeps": 4, "normalizer": "scale", "residual_cap": 0.5}
    names = [f"model.layers.{i}.mlp.down_proj" for i in (4, 6)]
    hparams = tiny.hparams(inner_params=names, ridge=0.1, **settings)
    records = tiny.records(12)
    records[5] = replace(records[5], subject=records[4].subject, prompt=records[4].prompt)
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams).edit(records).shifts


def train(out, settings: dict) -> dict:
    """The network and what was measured, after three steps."""
    hparams = tiny.hparams(max_epochs=3, val_interval=1, **settings)
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer(), trunk_cache_gb=0.1)
    records = tiny.records(hparams.edits_per_step + 12)
    data = records[: hparams.edits_per_step], records[hparams.edits_per_step :]
    trainer = HORSETrainer(hparams, *data, out, backbone, progress=False)
    trainer.run()
    return {"network": trainer.network.state_dict(), "history": trainer.history}


def failure() -> str:
    """What an edit says that fails in the last process alone."""
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())
    if distributed.rank() == distributed.world_size() - 1:

        def fails(batch):
            raise HorseError("record 3: is to blame")

        editor.backbone.trunk = fails
    with pytest.raises(HorseError) as failed:
        editor.edit(tiny.records(12))
    return str(failed.value)


def work(folder) -> dict:
    evaluator = Evaluator(
        Backbone(tiny.model(), tiny.bpe_tokenizer(), trunk_cache_gb=0.1), tiny.records(20)
    )
    return {
        "edits": {(kind, n): edit(kind, n) for kind in SPREADS for n in N_EDITS},
        "swept": swept(),
        "trained": {name: train(folder / name, changes) for name, changes in TRAINED.items()},
        "figures": evaluator.evaluate().records,
        "failure": failure(),
    }


def work_as_one(folder, rank: int, size: int):
    join = {"init_method": f"file://{folder}/join", "rank": rank, "world_size": size}
    dist.init_process_group("gloo", **join)
    torch.save(work(folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process finds, and each of two."""
    folder = tmp_path_factory.mktemp("two")
    two = [processes.start(work_as_one, folder, rank, 2) for rank in range(2)]
    alone = work(tmp_path_factory.mktemp("one"))
    for process in two:
        process.join(300)
        assert process.exitcode == 0
    return alone, *(torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2))


def close(one: dict, other: dict):
    """To 1e-5 of each tensor's largest entry."""
    assert one.keys() == other.keys()
    for name, t in one.items():
        atol = 1e-5 * max(1.0, t.abs().max().item()) if t.numel() else 0
        torch.testing.assert_close(other[name], t, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("n", N_EDITS)
@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_make_the_delta_of_one(both, spread, n):
    alone, *two = (found["edits"][spread, n] for found in both)
    # Of the whole edit's largest entry: Gram-Schmidt leaves only rounding of a residual that lies
    # in the span of those below it, as the last layer's does for a single token.
    largest = max(shift.abs().max() for shift in alone.values())
    for shifts in two:
        for name, shift in alone.items():
            assert shift.abs().max() > 0
            assert (shifts[name] - shift).abs().max() / largest < 1e-5, name


def test_two_processes_sweep_as_one(both):
    alone, *two = (found["swept"] for found in both)
    for shifts in two:
        close(alone, shifts)


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_the_archive_of_one(both, name):
    alone, *two = (found["trained"][name] for found in both)
    for trained in two:
        close(alone["network"], trained["network"])
        for here, there in zip(alone["history"], trained["history"], strict=True):
            one, other = (
                {k: v for k, v in h["validation"].items() if v is not None} for h in (here, there)
            )
            assert other == pytest.approx(one, rel=1e-5, abs=1e-5)  # drift is rounding, nearly
            assert there["edit"] == pytest.approx(here["edit"], rel=1e-5)
    for a, b in zip(*(t["network"].values() for t in two), strict=True):
        assert torch.equal(a, b)


def test_two_processes_measure_what_one_does(both):
    alone, *two = (found["figures"] for found in both)
    assert two == [alone, alone]


def test_what_fails_in_one_process_fails_in_both(both):
    assert [found["failure"] for found in both] == ["record 3: is to blame"] * 3


def test_prompts_are_shared_out_once(monkeypatch):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    prompts = backbone.prepare(tiny.records(60), ["edit"]).flat()
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    shares = distributed.shard(prompts)
    assert sorted(i for share in shares for i in share) == list(range(60))
    assert all(len(share) > 5 for share in shares)
    assert distributed.shard(prompts[5:])[0] == [i - 5 for i in shares[0] if i >= 5]


def test_torchrun_trains_edits_and_evaluates_and_writes_once(tmp_path):
    tiny.files(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def horse(line: str) -> str:
        run = subprocess.run(
            [*launcher, "--no-python", sys.executable, "-c", RUN, *line.split()],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    said = horse("train --hparams tiny --train train.json --val val.json --out archive")
    assert said.count("Archive:") == 1
    said = horse("edit --hparams tiny --archive archive --data val.json --onto edits")
    assert said.count("Edit:") == 1
    (delta,) = read_edits(tmp_path / "edits")
    _, measured = json.loads((tmp_path / "edits/001/results.json").read_text())
    hparams = HORSEHyperParams.from_hparams(tmp_path / "tiny")
    hparams.archive = str(tmp_path / "archive")
    editor = HorseEditor.from_hparams(hparams)
    close(editor.edit(delta.records).shifts, delta.shifts)
    figures = Evaluator(editor.backbone, delta.records).evaluate().summary()
    for name in ("efficacy", "generalization", "specificity"):
        assert figures[name] == measured[name]
    assert not list(tmp_path.rglob(f"*{PART}"))


RUN = "from horse_plugin.cli.main import run; run()"
