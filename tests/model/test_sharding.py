"""Two processes with half of the trunk each give what one process gives with all of it."""

import json

import pytest
import torch
import torch.distributed as dist

from horse_plugin import Evaluator, HorseEditor, HORSEHyperParams, HORSETrainer, distributed
from horse_plugin.comparison.runner import weights_digest
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation.drift import OrdinaryText
from horse_plugin.evaluation.generation import answers
from horse_plugin.evaluation.probability import success_and_magnitude
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import load_model
from horse_plugin.model.sharding import Lockstep, local_part
from tests import processes, tiny

TEXT = [("prose", tiny.words(i, 9)) for i in range(5)]


def loaded(folder, **changes) -> HORSEHyperParams:
    settings = json.loads((folder / "tiny.yaml").read_text()) | {
        "archive": None,
        "preserve": "model",
    }
    settings |= {"keep_tokens": 64, "max_epochs": 2, "edits_per_step": 6, "edit_sweeps": 2}
    settings |= {"trunk_cache_gb": 2e-5, "strength": 100.0}  # room for some states of each process
    return HORSEHyperParams.from_dict(settings | changes)


def fails_in_a_loop(backbone: Backbone) -> str:
    """What the first process says of a prompt that fails while the other one goes on."""
    prompts, run = backbone.prepare(tiny.records(12), ["edit"]).flat(), backbone.top
    if not dist.is_initialized() or dist.get_rank() == 0:

        def fail(*args):
            raise HorseError("record 3: is to blame")

        backbone.top = fail
    with pytest.raises(HorseError) as failed:
        success_and_magnitude(backbone, tiny.records(3))
    backbone.top = run
    return f"{failed.value} {len(prompts)}"


def work(folder, out, **changes) -> dict:
    hparams = loaded(folder, stats_dir=str(out / "stats"), **changes)
    backbone = Backbone.load(hparams)
    trunk, rest = backbone.blocks[: backbone.first_edited], backbone.blocks[backbone.first_edited :]
    editor, digest = HorseEditor.from_backbone(backbone, hparams), weights_digest(backbone)
    text = OrdinaryText(backbone, TEXT)
    evaluator = Evaluator(backbone, tiny.records(12), text=text, writing=True)
    shifts = editor.edit(tiny.records(12)).shifts
    found = {
        "trunk": sum(local_part(p).numel() for p in trunk.parameters() if p.dim() > 1),
        "rest": sum(local_part(p).numel() for p in rest.parameters()),
        "figures": {k: v for k, v in evaluator.evaluate().summary().items() if v is not None},
        "probabilities": success_and_magnitude(backbone, tiny.records(3)),
        "said": answers(backbone, ["the capital of", "who"], 5),
        "failure": fails_in_a_loop(backbone),
    }
    if hparams.shard_trunk:
        with pytest.raises(UsageError, match="no process has the whole model"):
            editor.save_model(out / "saved")
    assert weights_digest(backbone) != digest
    editor.undo()
    assert weights_digest(backbone) == digest
    data = tiny.records(18)
    trainer = HORSETrainer(hparams, data[:12], data[12:], out / "archive", backbone, progress=False)
    trainer.run()
    found["losses"] = [h["edit"] for h in trainer.history]
    return found | {"shifts": shifts, "network": trainer.network.state_dict()}


def work_as_two(folder, rank: int):
    join = {"init_method": f"file://{folder}/join", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **join)
    whole, half = (work(folder, folder / f"{s}", shard_trunk=s) for s in (False, True))
    torch.save((whole, half), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_of_the_trunk_work_as_with_all_of_it(tmp_path):
    """Bit for bit, and as one process does up to rounding."""
    tiny.files(tmp_path)
    two = [processes.start(work_as_two, tmp_path, rank) for rank in range(2)]
    alone = work(tmp_path, tmp_path / "alone")
    for process in two:
        process.join(150)
        assert process.exitcode == 0
    for rank in range(2):
        whole, half = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert half.pop("trunk") * 2 == whole.pop("trunk") == alone["trunk"]
        for part in ("shifts", "network"):
            for name, tensor in whole.pop(part).items():
                assert torch.equal(half[part][name], tensor), name
        for name, shift in alone["shifts"].items():
            atol = 1e-5 * max(1.0, shift.abs().max().item())
            torch.testing.assert_close(half["shifts"][name], shift, rtol=0, atol=atol)
        for name, value in whole.items():
            assert half[name] == value, name
        for name in ("failure", "said", "rest"):
            assert half[name] == alone[name], name
        for name in ("figures", "probabilities", "losses"):
            assert half[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("changes", "n", "says"),
    [
        ({}, 1, r"shard_trunk: shares the trunk .* there is one\. Start"),
        ({"model_parallel": True}, 1, r"shard_trunk: .* there is one"),
        ({"model_parallel": True}, 2, r"model_parallel: .* 2 were launched"),
        ({"trunk_bits": 4}, 2, r"shard_trunk: a trunk in trunk_bits"),
        ({"inner_params": ["model.layers.0.mlp.down_proj"]}, 2, r"shard_trunk: the lowest block"),
    ],
)
def test_a_trunk_that_cannot_be_sharded_is_refused(tmp_path, monkeypatch, changes, n, says):
    tiny.files(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: n)
    with pytest.raises(UsageError, match=says):
        load_model(loaded(tmp_path, shard_trunk=True, **changes))


def test_a_process_that_fails_amid_a_pass_of_a_sharded_trunk_ends():
    """The others wait for its parts, and no message would reach them."""

    def fails():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(SystemExit, match="horse: OutOfMemoryError: out of memory"):
        Lockstep(lambda: None).run(fails)
    with pytest.raises(torch.OutOfMemoryError):
        Lockstep(None).run(fails)
