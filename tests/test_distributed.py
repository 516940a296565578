"""Two processes (gloo, CPU) give what one gives: deltas, archives, figures; and write once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from horse_plugin import Evaluator, HorseEditor, HORSEHyperParams, HORSETrainer, distributed
from horse_plugin.editing.chain import read_edits
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation.metrics import ALL_FIGURES
from horse_plugin.hparams import SPREADS
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import load_model
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


def failure(error: Exception, kind: type[Exception]) -> str:
    """What an edit says that fails in the last process alone.

    Args:
        kind: of error, there.
    """
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())
    if distributed.rank() == distributed.world_size() - 1:

        def fails(batch):
            raise error

        editor.backbone.trunk = fails
    with pytest.raises((HorseError, kind)) as failed:
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
        "failure": failure(HorseError("record 3: is to blame"), HorseError),
        "without a message": failure(MemoryError(), MemoryError),
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
    alone, first, last = (found["without a message"] for found in both)
    assert alone == last == "" and first == "MemoryError: MemoryError"


def test_a_callers_group_that_takes_no_tensor_of_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(UsageError, match=r"init_process_group: .*cpu:gloo,cuda:nccl"):
        Backbone(tiny.model(), None)


def test_prompts_are_shared_out_once(monkeypatch):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    prompts = backbone.prepare(tiny.records(60), ["edit"]).flat()
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    shares = distributed.shard(prompts)
    assert sorted(i for share in shares for i in share) == list(range(60))
    assert all(len(share) > 5 for share in shares)
    assert distributed.shard(prompts[5:])[0] == [i - 5 for i in shares[0] if i >= 5]


LINES = """\
train --hparams tiny --train train.json --val val.json --out archive
edit --hparams tiny --archive archive --data val.json --onto edits
edit --hparams tiny --data train.json --out bound --max-drift 1e-6
eval --hparams tiny --delta edits --data val.json --out eval.json
compare --hparams-dir . --models tiny --methods unedited,HORSE,FT --data val.json \
--train train.json --val val.json --n-edits 3 --out compared
ask --hparams tiny --delta edits --tokens 5 Oslo --before
"""
RUN = """
import sys
from horse_plugin.cli.main import run
from horse_plugin.distributed import world_size
from torch import distributed
for line in open("lines"):
    sys.argv = ["horse", *line.split()]
    try:
        run()
    except SystemExit as left:
        assert not left.code, line
    if world_size() > 1:
        distributed.barrier()  # until the first process has written
"""
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2 --no-python"
ACCELERATE = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 "
ACCELERATE += "--mixed_precision no --dynamo_backend no --main_process_port {} --no_python"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(folder, launcher: str, code: str, lines: str) -> subprocess.Popen:
    """Python code in one process, or in two."""
    (folder / "lines").write_text(lines)
    command = [*launcher.format(free_port()).split(), sys.executable] if launcher else []
    return subprocess.Popen(
        [sys.executable, *command, "-c", code],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def commands_in(folder, launcher: str, lines: str = LINES) -> str:
    """What the commands print, one after the other."""
    tiny.files(folder)
    settings = json.loads((folder / "tiny.yaml").read_text()) | {"strength": 100.0}
    (folder / "tiny.yaml").write_text(json.dumps(settings))
    shutil.copytree(folder, folder / "HORSE", ignore=shutil.ignore_patterns("model", "HORSE"))
    (folder / "FT").mkdir()
    (folder / "FT/tiny.yaml").write_text("alg_name: FT")
    run = launched(folder, launcher, RUN, lines)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return said


def test_torchrun_gives_the_results_of_one_process_and_writes_once(tmp_path):
    folders = alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in folders:
        folder.mkdir()
    said_alone, said = commands_in(alone, ""), commands_in(together, TORCHRUN)
    assert said.count("Archive:") == said.count("Edit:") - 1 == said.count("Report:") == 1
    assert said.splitlines()[-3:] == said_alone.splitlines()[-3:]  # what the model writes
    edits = [read_edits(f / "edits") + read_edits(f / "bound") for f in folders]
    for one, two in zip(*edits, strict=True):
        close(one.shifts, two.shifts)
    one, two = (delta.about["budget"] for _, delta in edits)
    assert two["edit_ridge"] == pytest.approx(one["edit_ridge"]) and one["edit_ridge"] > 1
    for name in ("eval.json", "compared/results.json", "bound/results.json"):
        rows = [json.loads((folder / name).read_text()) for folder in folders]
        for one, two in zip(*rows, strict=True):
            assert ("in one process only" in two.get("reason", "")) == (two["method"] == "FT")
            one, two = ({k: r[k] for k in ALL_FIGURES if r[k] is not None} for r in (one, two))
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name
    assert not list(together.rglob(f"*{PART}"))


def test_accelerate_launches_processes_that_work_as_one(tmp_path):
    said = commands_in(tmp_path, ACCELERATE, "edit --hparams tiny --data val.json --out e")
    assert said.count("Edit:") == 1
    (delta,) = read_edits(tmp_path / "e")
    editor = HorseEditor.from_hparams(HORSEHyperParams.from_hparams(tmp_path / "tiny"))
    close(editor.edit(delta.records).shifts, delta.shifts)


def test_a_process_whose_memory_runs_out_ends_the_others(tmp_path):
    """In the midst of sums over both: nobody waits for it."""
    tiny.files(tmp_path)
    run = launched(
        tmp_path, TORCHRUN, OUT_OF_MEMORY + RUN, "edit --hparams tiny --data val.json --out e"
    )
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 1 and "horse: OutOfMemoryError: out of memory" in errors
    assert not (tmp_path / "e/edit.json").exists()


OUT_OF_MEMORY = """
import os
import torch
from horse_plugin.method.ridge import Ridge
def fails(self, dtype):
    raise torch.OutOfMemoryError("out of memory")
if os.environ["RANK"] == "1":
    Ridge._gram = fails
"""


def in_slurm(folder, port: int, rank: int):
    """Two tasks of one step, as ``srun`` starts them; the GPUs' collectives are stood in for."""
    os.environ |= {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    distributed.BACKENDS["cuda"] = "gloo"
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
    torch.cuda.set_device = chosen = [].append
    distributed.initialize()
    torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)
    with pytest.raises(UsageError, match=r"model_parallel: .* 2 were launched"):
        load_model(tiny.hparams(model_parallel=True))
    torch.save((chosen.__self__, edit("orthogonal", 12)), folder / f"{rank}.pt")


def test_tasks_of_slurm_are_one_whose_counts_meet_on_the_cpu(tmp_path):
    """A group of NCCL alone takes no tensor of the CPU; each task sees one GPU, number 0."""
    port = free_port()
    two = [processes.start(in_slurm, tmp_path, port, rank) for rank in range(2)]
    for process in two:
        process.join(300)
        assert process.exitcode == 0
    for rank in range(2):
        gpus, shifts = torch.load(tmp_path / f"{rank}.pt")
        assert gpus == [0]
        close(edit("orthogonal", 12), shifts)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[07-09,12]", "n07"), ("gpu-a,gpu-b", "gpu-a"), ("x[3,5],y", "x3")],
)
def test_the_first_host_of_slurms_list_is_the_master(monkeypatch, nodes, first):
    found = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456", "SLURM_PROCID": "3"}
    found |= {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    monkeypatch.setattr(os, "environ", dict(found))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed.atexit, "register", lambda leave: None)
    distributed.initialize()
    named = {k: os.environ[k] for k in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")}
    assert named == {
        "MASTER_ADDR": first,
        "MASTER_PORT": "23456",
        "RANK": "3",
        "WORLD_SIZE": "4",
    }


@pytest.mark.parametrize(
    "found", [{"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_a_batch_script_by_itself_is_one_process(monkeypatch, found):
    monkeypatch.setattr(os, "environ", dict(found))
    monkeypatch.setattr(dist, "init_process_group", None)
    distributed.initialize()
