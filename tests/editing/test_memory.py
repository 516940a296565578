"""Memory of an edit: estimated before the work, and refused beyond a limit."""

import contextlib

import pytest
import torch

from horse_plugin import HorseEditor, HorseError, HORSETrainer, UsageError
from horse_plugin.editing import editor as editing
from horse_plugin.editing import memory
from horse_plugin.model.backbone import Backbone
from tests import tiny
from tests.peak import Peak


def editor(**changes):
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(**changes))


def test_an_edit_that_would_take_too_much_memory_is_refused_before_the_work(monkeypatch, tmp_path):
    e = editor(edit_memory_gb=1e-6)
    before = e.backbone.weights.digests()
    monkeypatch.setattr(editing, "capture", None)  # the work
    with pytest.raises(HorseError, match=r"edit_memory_gb: 6 prompts take about .* are allowed"):
        e.edit(tiny.records())
    hparams = tiny.hparams(edit_memory_gb=1e-6)
    trainer = HORSETrainer(hparams, *[tiny.records()] * 2, tmp_path, e.backbone, progress=False)
    with pytest.raises(HorseError, match=r"are allowed .* Train on fewer facts in a step"):
        trainer.train_step(tiny.records())
    with pytest.raises(HorseError, match=r"Validate on fewer facts in an edit \(val_edits\)"):
        trainer.run()
    free = editor()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(HorseError, match=r"beside the model, and 0\.0 GB are free\. Edit fewer"):
        free.edit(tiny.records())
    assert e.backbone.weights.digests() == before and not e.history


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("n", [6, 60])
def test_the_estimate_covers_what_an_edit_keeps(n, sweeps):
    e = editor(edit_sweeps=sweeps)
    prompts = e.backbone.prepare(tiny.records(n), ["edit"]).flat()
    needed = memory.needed_bytes(e.backbone, prompts, e.hparams)
    captured = e.capture(tiny.records(n))
    kept = sum(t.nbytes for t in captured.keys + captured.grads)
    weights = sum(m.weight.nbytes for m in e.backbone.modules.values())
    delta = e.edit(tiny.records(n), captured=captured)
    kept += weights + sum(t.nbytes for t in delta.tensors.values())
    assert kept < needed < 4 * kept


@pytest.mark.parametrize("training", [False, True])
def test_keys_that_wait_elsewhere_are_counted_for_one_module_at_a_time(monkeypatch, training):
    e = editor(edit_sweeps=3)
    prompts = e.backbone.prepare(tiny.records(6), ["edit"]).flat()
    n = sum(len(p.answer) for p in prompts)
    here = memory.needed_bytes(e.backbone, prompts, e.hparams, training)
    each = [4 * sum(shape) for shape in e.backbone.shapes]
    e.backbone.keys_device = torch.device("meta")
    there = memory.needed_bytes(e.backbone, prompts, e.hparams, training)
    saved = (3 if training else 2) * n * sum(each) - n * max(each)
    for_ridge = n * sum(4 * d for d, _ in e.backbone.shapes) if training else 0  # H of all modules
    assert here - there == saved - for_ridge
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    e.backbone.edit_device = e.backbone.keys_device
    with pytest.raises(HorseError, match=r"or set offload_keys: true\.$"):
        memory.check_memory(e.backbone, prompts, e.hparams)
    e.backbone.keys_device = torch.device("cpu")
    with pytest.raises(HorseError, match=r"Edit fewer facts at once\.$"):
        memory.check_memory(e.backbone, prompts, e.hparams)


def test_the_sums_of_an_edit_in_blocks_are_counted(monkeypatch):
    e = editor(edit_block=3, edit_sweeps=2)
    prompts = e.backbone.prepare(tiny.records(3), ["edit"]).flat()
    block = memory.needed_bytes(e.backbone, prompts, e.hparams)
    sums = 2 * sum(8 * d * (d + d_out) for d, d_out in e.backbone.shapes)
    monkeypatch.setattr(memory, "free_bytes", lambda device: block + sums - 1)
    with pytest.raises(HorseError, match="edit_memory_gb"):
        e.edit(tiny.records())
    monkeypatch.setattr(memory, "free_bytes", lambda device: block + sums)
    e.edit(tiny.records())


def test_a_validation_in_blocks_is_checked_as_its_edit_will_be(monkeypatch, tmp_path):
    e = editor(edit_block=3, edit_sweeps=2)
    records = tiny.records()
    t = HORSETrainer(e.hparams, records, records, tmp_path, e.backbone, progress=False)
    prompts = e.backbone.prepare(records[:3], ["edit"]).flat()
    block = memory.needed_bytes(e.backbone, prompts, e.hparams)
    sums = 2 * sum(8 * d * (d + d_out) for d, d_out in e.backbone.shapes)
    for free in (block + sums - 1, block + sums):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        with contextlib.ExitStack() as stack:
            if free < block + sums:
                stack.enter_context(pytest.raises(HorseError, match="Validate on fewer facts"))
            t.validation.check_memory(t.validation.evaluators())
    evaluators = list(t.validation.evaluators())
    monkeypatch.setattr(memory.distributed, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="edit_block: several processes edit 6 prompts"):
        t.validation.check_memory(evaluators)


def test_the_systems_of_several_processes_and_of_doubles_are_counted(monkeypatch):
    e = editor(editor_batch_size=1)  # else a pass of the network takes more than a system
    few = memory.edit_bytes(e.backbone, 5, e.hparams)
    gathered = memory.edit_bytes(e.backbone, 5, e.hparams, n_all=30)  # fewer than keys are wide
    d = max(d for d, _ in e.backbone.shapes)
    assert gathered - few >= 4 * (3 * (30**2 - 5**2) + 25 * d)
    assert memory.training_bytes(e.backbone, 5, e.hparams, 30) > memory.training_bytes(
        e.backbone, 5, e.hparams
    )
    large = memory.edit_bytes(e.backbone, 90, e.hparams)
    monkeypatch.setattr(memory, "doubles_are_fast", lambda device: True)
    assert memory.edit_bytes(e.backbone, 90, e.hparams) - large == 4 * 3 * d**2


@pytest.mark.parametrize("n", [2, 30])
def test_the_estimate_covers_what_an_edit_on_top_of_others_keeps(n, monkeypatch):
    e, needed, check = editor(keep_edits=True), [], memory.check_memory

    def checked(*parts, on_top, **more):
        needed.append(memory.needed_bytes(*parts, on_top=on_top))
        check(*parts, on_top=on_top, **more)

    monkeypatch.setattr(editing, "check_memory", checked)
    records = tiny.records(2 * n)
    e.edit(records[:n])
    captured = e.capture(records[n:])
    e.edit(records[n:], captured=captured)
    weights = [m.weight for m in e.backbone.modules.values()]
    residuals, shifts = captured.grads, 2 * list(e.history[1].tensors.values())  # D, and ΔW
    tensors = [*captured.keys, *captured.grads, *residuals, *shifts, *weights]
    kept = sum(t.nbytes for t in tensors)
    assert kept < needed[1] < 4 * kept


@pytest.mark.slow
@pytest.mark.parametrize("rows", [32, 8192])
@pytest.mark.parametrize("changes", [{}, {"edit_sweeps": 2}, {"token": "subject"}])
def test_the_estimate_covers_a_training_step_and_is_near_it(tmp_path, rows, changes):
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(1, 7)]
    hparams = tiny.hparams(
        edits_per_step=200, editor_batch_size=rows, batch_tokens=64, inner_params=names, **changes
    )
    backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), hparams)
    records = tiny.records(206)
    data = records[:200], records[200:]
    trainer = HORSETrainer(hparams, *data, tmp_path, backbone, progress=False)
    batch = trainer.batch(0)
    needed = memory.needed_bytes(backbone, batch.to_capture(False), hparams, training=True)
    with Peak() as peak:
        trainer.train_step(batch)
    assert peak.most < needed < 2 * peak.most


def test_what_is_free_is_asked_of_the_system():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or free > 0
    assert memory.free_bytes(torch.device("meta")) is None


def test_files_that_the_system_keeps_at_hand_are_free(tmp_path, monkeypatch):
    """Of a control group: its limit without what programs use, which leaves out cached files."""
    given = {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 300\nactive_file 200\ninactive_file 400\n",
    }
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 700
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "cgroup")
    (tmp_path / "job" / "step").mkdir(parents=True)  # as Slurm and systemd have them
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for name, text in (given | {"memory.max": "950\n"}).items():
        (tmp_path / "job" / name).write_text(text)
    assert memory.free_bytes(torch.device("cpu")) == 650
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(torch.device("cpu")) > 10_000


def test_the_shifts_of_an_edit_are_made_one_after_the_other():
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(1, 7)]
    e = editor(inner_params=names)
    delta = e.edit(tiny.records(4))
    assert all(f"{name}.factors" in delta.tensors for name in names)
    one, taken = e.backbone.modules[names[0]].weight.nbytes, []
    for shifts in (lambda: delta.shifts, delta.lazy_shifts):
        with Peak() as peak, e.backbone.weights.shifted(shifts()):
            pass
        taken.append(peak.most / one)
    assert taken[0] - taken[1] == len(names) - 1
