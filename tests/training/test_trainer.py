"""Training: everything moves, the same seed gives the same bits, a resumed run ends the same."""

import math
import threading
from dataclasses import replace

import pytest
import torch

from horse_plugin import EditRecord, HorseEditor, HorseError, HORSETrainer, UsageError
from horse_plugin.editing.archive import ARCHIVE, load_network
from horse_plugin.editing.sweeps import sweeps
from horse_plugin.evaluation.metrics import Evaluation
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.tensors import load_tensors, save_tensors
from horse_plugin.training import trainer as training
from horse_plugin.training import writer
from horse_plugin.training.checkpoint import CHECKPOINT
from horse_plugin.training.history import HISTORY
from horse_plugin.training.objective import TRAINED_ON, Objective
from horse_plugin.training.trainer import one_prompt_a_kind
from tests import tiny


def trainer(out, architecture="llama", resume=False, log=None, **changes):
    hparams = tiny.hparams(
        **{"max_epochs": 3, "val_interval": 2, "meta_lr": 1e-3, "loc_loss": "ce"} | changes
    )
    hparams.trunk_cache_gb = 0.1
    backbone = Backbone.of(tiny.model(architecture), tiny.bpe_tokenizer(), hparams)
    data = tiny.records(18)
    return HORSETrainer(hparams, data[:12], data[12:], out, backbone, resume, False, log)


def read(folder, name=ARCHIVE):
    return (folder / name).read_bytes()


@pytest.mark.parametrize("train_spread", [False, True])
@pytest.mark.parametrize("loc_loss", ["ce", "kl"])
def test_every_parameter_moves_in_the_first_steps(tmp_path, loc_loss, train_spread):
    t = trainer(tmp_path, loc_loss=loc_loss, train_spread=train_spread)
    t.train_step(t.batch(0))  # calibrates eta, so that its start is known
    before = {n: p.detach().clone() for n, p in t.network.named_parameters()}
    for _ in range(3):
        t.train_step(t.batch(0))
    for name, p in t.network.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (name != "spread_strength" or train_spread), name


def test_what_an_edit_takes_less_of_a_training_step_takes_whole(tmp_path):
    less = {"edit_ridge": 0.1, "edit_step": 0.3, "edit_holds": 1e-6}
    bits = []
    for name, changes in (("whole", {}), ("less", less)):
        t = trainer(tmp_path / name, edit_sweeps=3, **changes)
        for i in range(2):
            t.train_step(t.batch(i))
        bits.append([p.detach().clone() for p in t.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path):
    t = trainer(tmp_path, max_epochs=20, meta_lr=3e-3)
    t.run()
    totals = [sum(h[k] for k in ("edit", "rephrase", "unrelated")) for h in t.history]
    third = len(totals) // 3
    assert sum(totals[-third:]) < sum(totals[:third])


def test_the_same_seed_gives_the_same_archive_bit_for_bit(tmp_path):
    for name in "ab":
        trainer(tmp_path / name).run()
    assert read(tmp_path / "a") == read(tmp_path / "b")
    trainer(tmp_path / "c", seed=1).run()
    a, _ = load_tensors(tmp_path / "a" / ARCHIVE)
    c, _ = load_tensors(tmp_path / "c" / ARCHIVE)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.slow
def test_training_goes_on_while_a_thread_writes(tmp_path, monkeypatch):
    trainer(tmp_path / "whole", val_interval=1).run()
    t, went_on = trainer(tmp_path / "slow", val_interval=1), threading.Event()
    step = t.train_step

    def write_late(*args):
        assert went_on.wait(30)
        save_tensors(*args)

    def train_step(records):
        if t.step:
            went_on.set()
        return step(records)

    t.train_step = train_step
    monkeypatch.setattr(writer, "save_tensors", write_late)
    t.run()
    for name in (ARCHIVE, CHECKPOINT, HISTORY):  # as they were when their turn came
        assert read(tmp_path / "whole", name) == read(tmp_path / "slow", name)


@pytest.mark.slow
def test_a_file_that_cannot_be_written_ends_the_training(tmp_path, monkeypatch):
    def fail(path, *args):
        raise HorseError(f"{path}: not written: full")

    monkeypatch.setattr(writer, "save_tensors", fail)
    for interval, last in ((1, 2), (99, 6)):  # at the next validation at the latest, or at the end
        t = trainer(tmp_path, val_interval=interval)
        with pytest.raises(HorseError, match="not written: full"):
            t.run()
        assert t.step <= last and not (tmp_path / HISTORY).exists()


def test_where_trunk_states_find_no_room_validation_keeps_its_own(tmp_path):
    """It reads each of them twice at every validation, and a step once an epoch."""
    t = trainer(tmp_path, max_iters=1)
    validation, cache = (
        [p for e in t.validation.evaluators() for p in e.edits.flat()],
        t.backbone.trunk_cache,
    )
    cache._limits["memory"] -= cache._room["memory"]  # it fits, with the text beside it
    cache._forget()
    t.run()
    assert not cache.missing([p.inputs for p in validation])
    assert cache.missing([p.inputs for p in t._to_cache()])


def test_the_order_of_the_records_depends_on_seed_and_epoch(tmp_path):
    one, two, again = (trainer(tmp_path, seed=seed, max_epochs=2) for seed in (0, 1, 0))
    assert one.batch(0) == again.batch(0)
    assert one.batch(0) != two.batch(0)
    assert one.batch(0) != one.batch(len(one.schedule) // 2)


def test_a_finished_run_that_is_resumed_completes_its_csv(tmp_path):
    """As after a kill between the last checkpoint and the file."""
    trainer(tmp_path, max_iters=2).run()
    whole = (tmp_path / HISTORY).read_text()
    (tmp_path / HISTORY).write_text(whole[:40])
    trainer(tmp_path, max_iters=2, resume=True).run()
    assert (tmp_path / HISTORY).read_text() == whole


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "least"), [(1, None), (3, 2), (5, None), (5, 2)])
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(
    tmp_path, cut, least, monkeypatch
):
    """Mixed lengths, several rephrasings, trunk states kept: whatever could depend on the past."""
    records = [
        replace(r, rephrases=tuple(f"{tiny.words(i + k, 3 * k + 2)} is" for k in range(3)))
        for i, r in enumerate(tiny.records(18))
    ]
    monkeypatch.setattr(tiny, "records", lambda n: records[:n])
    settings = {"edits_per_step": 3, "max_epochs": 2, "batch_tokens": 40, "val_interval": 2}
    settings["min_edits_per_step"] = least
    trainer(tmp_path / "whole", **settings).run()
    stopped = trainer(tmp_path / "parts", **settings)
    step = stopped.train_step

    def dies(records):
        if stopped.step == cut:
            raise KeyboardInterrupt
        return step(records)

    stopped.train_step = dies
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resume = (tmp_path / "parts" / CHECKPOINT).exists()
    assert resume == (cut > 1)
    trainer(tmp_path / "parts", resume=resume, **settings).run()
    for name in (ARCHIVE, CHECKPOINT):
        assert read(tmp_path / "whole", name) == read(tmp_path / "parts", name)


def test_a_run_in_the_users_folder_is_resumed(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    trainer("~/a", max_iters=2).run()
    assert trainer("~/a", max_iters=2, resume=True).step == 2


def test_resuming_on_other_records_is_refused(tmp_path):
    trainer(tmp_path, max_iters=2).run()
    t = trainer(tmp_path, max_iters=2)
    with pytest.raises(UsageError, match="was trained on other records"):
        HORSETrainer(t.hparams, t.val_records * 2, t.val_records, tmp_path, t.backbone, True, False)


def test_resuming_with_other_settings_is_refused(tmp_path):
    trainer(tmp_path, max_epochs=1).run()
    with pytest.raises(UsageError, match=r"meta_lr: 0\.001, and the hparams now say 0\.1"):
        trainer(tmp_path, resume=True, meta_lr=0.1)
    path = tmp_path / CHECKPOINT
    tensors, about = load_tensors(path)
    del about["hparams"]["min_edits_per_step"]  # as before there was such a key
    save_tensors(path, tensors, about)
    trainer(tmp_path, resume=True)
    with pytest.raises(UsageError, match="min_edits_per_step: None, and the hparams now say 2"):
        trainer(tmp_path, resume=True, min_edits_per_step=2)
    with pytest.warns(UserWarning, match="no checkpoint; training starts at the beginning"):
        trainer(tmp_path / "none", resume=True)


def test_resuming_in_another_precision_or_on_another_text_is_refused(tmp_path, monkeypatch):
    text = tmp_path / "own.txt"
    text.write_text("\n".join(tiny.words(i, 9) for i in range(9)))
    settings = {"preserve": str(text), "preserve_tokens": 64, "stats_dir": str(tmp_path / "stats")}
    trainer(tmp_path / "run", max_epochs=1, **settings).run()
    trainer(tmp_path / "run", resume=True, **settings)
    made = tiny.model("llama", torch.bfloat16)
    monkeypatch.setattr(tiny, "model", lambda architecture: made)
    with pytest.raises(UsageError, match=r"in torch\.float32, and this model is in torch"):
        trainer(tmp_path / "run", resume=True, **settings)
    monkeypatch.undo()
    text.write_text("\n".join(tiny.words(i, 9) for i in range(3, 9)))
    with pytest.raises(UsageError, match="was trained with other ordinary text"):
        trainer(tmp_path / "run", resume=True, **settings)


def test_the_best_archive_is_kept_and_edits(tmp_path):
    t = trainer(tmp_path, max_epochs=6)
    t.run()
    scores = [h["validation"]["score"] for h in t.history if "validation" in h]
    assert t.best["score"] == max(scores)
    network, _, about = load_network(tmp_path, t.backbone)
    assert about["best"] == t.best
    assert about["hparams"]["rank"] == 4
    hparams = tiny.hparams(archive=str(tmp_path))
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams)
    for a, b in zip(editor.network.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert editor.edit(tiny.records()).tensors


def test_an_archive_for_another_model_or_other_modules_is_refused_by_name(tmp_path):
    trainer(tmp_path).run()
    hparams = tiny.hparams(archive=str(tmp_path))
    with pytest.raises(UsageError, match=r"made for .*LlamaForCausalLM.*MistralForCausalLM"):
        HorseEditor(tiny.model("mistral"), tiny.bpe_tokenizer(), hparams)
    hparams.inner_params = ["model.layers.7.mlp.down_proj"]
    with pytest.raises(UsageError, match=r"model\.layers\.2"):
        HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams)
    hparams.archive = str(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no archive"):
        HorseEditor(tiny.model(), tiny.bpe_tokenizer(), hparams)


def test_damaged_archives_do_not_load(tmp_path):
    trainer(tmp_path, max_iters=1).run()
    path = tmp_path / ARCHIVE
    whole = path.read_bytes()
    for at in (3, 40, len(whole) // 2, len(whole) - 5):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        for damaged in (bytes(flipped), whole[:at]):
            path.write_bytes(damaged)
            with pytest.raises(HorseError, match="damaged"):
                load_tensors(path)


def test_absolute_lr_is_eta(tmp_path):
    t = trainer(tmp_path, lr=3e-4)
    assert torch.allclose(t.network.log_eta, torch.tensor(math.log(3e-4)))
    t.train_step(t.batch(0))


def test_a_gradient_that_is_not_finite_stops_with_the_step(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    good = t.backbone.weights.gradients

    import contextlib

    @contextlib.contextmanager
    def poisoned(device):
        with good(device) as (total, collect):
            yield total, lambda: (collect(), [g.fill_(torch.nan) for g in total.values()])

    monkeypatch.setattr(t.backbone.weights, "gradients", poisoned)
    with pytest.raises(HorseError, match=r"step 0: .*layers\.2\.mlp\.down_proj"):
        t.run()
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_with_the_record(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    good = t.backbone.logits
    (prompt,) = t.batch(0).of("rephrase", 4)

    def poisoned(batch):
        logits = good(batch)
        rows = [i for i, p in enumerate(batch.prompts) if p == prompt]
        return torch.where(torch.isin(batch.rows, torch.tensor(rows))[:, None], torch.nan, logits)

    monkeypatch.setattr(t.backbone, "logits", poisoned)
    says = r"step 0: record 4: the loss on its rephrase prompt is not finite.*bf16"
    with pytest.raises(HorseError, match=says):
        t.run()


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path):
    t = trainer(tmp_path, max_epochs=2, val_interval=3)
    before = {k: v.clone() for k, v in t.backbone.model.state_dict().items()}
    found = t.dry_run()
    assert (found.steps, found.validations) == (4, 2)
    assert found.seconds > 4 * found.step_seconds > 0
    assert found.peak_memory_mb > 10
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(v, before[k]) for k, v in t.backbone.model.state_dict().items())
    trainer(tmp_path, max_epochs=2, val_interval=3, max_iters=3).run()
    t = trainer(tmp_path, max_epochs=2, val_interval=3, max_iters=3, resume=True)
    assert (t.dry_run().steps, t.dry_run().validations) == (0, 0)


def test_a_dry_run_of_steps_of_several_sizes_takes_them_between_the_largest_and_the_smallest(
    tmp_path, monkeypatch
):
    t = trainer(tmp_path, edits_per_step=8, min_edits_per_step=2, max_epochs=9, val_interval=99)
    taken = []

    def timed(work, *devices):
        found = work()
        is_step = isinstance(found, dict)
        taken.extend([n[0]] if is_step else [])
        return (float(10 + n.pop(0)) if is_step else 0.0), found

    sizes = [step.size for step in t.schedule.steps]
    n = [max(sizes), min(sizes)]
    monkeypatch.setattr(training, "timed", timed)
    found = t.dry_run()
    assert taken == [8, min(sizes)] and min(sizes) < 8
    assert found.seconds == pytest.approx(sum(10 + size for size in sizes))
    assert found.step_seconds == pytest.approx(found.seconds / len(sizes))


def test_too_few_records_are_refused(tmp_path):
    with pytest.raises(UsageError, match="edits_per_step: 13 in one step, but only 12"):
        trainer(tmp_path, edits_per_step=13)


def test_training_leaves_the_model_as_it_was(tmp_path):
    t = trainer(tmp_path)
    before = {k: v.clone() for k, v in t.backbone.model.state_dict().items()}
    t.run()
    for k, v in t.backbone.model.state_dict().items():
        assert torch.equal(v, before[k])
    assert all(p.requires_grad and p.grad is None for p in t.backbone.model.parameters())


def test_edit_modules_of_different_shapes_train_together(tmp_path):
    names = ["model.layers.5.mlp.up_proj", "model.layers.6.mlp.down_proj"]
    t = trainer(tmp_path, inner_params=names, spread="decay")
    t.run()
    assert len(t.network.groups) == 2
    network, *_ = load_network(tmp_path, t.backbone)
    assert network.shapes == t.backbone.shapes


def test_early_stopping(tmp_path):
    t = trainer(tmp_path, max_epochs=50, early_stop_patience=2, meta_lr=1e-9, eta_meta_lr=1e-9)
    t.run()
    assert t.step < t.n_steps


def test_records_with_several_prompts_take_turns_over_the_epochs(tmp_path):
    t = trainer(tmp_path)
    (query,) = tiny.records()[0].unrelated
    r = EditRecord("the capital", "Oslo", ("a is", "b is"), (query,) * 3)
    plain = EditRecord("the capital", "Oslo")
    edits = t.backbone.prepare([r, plain], TRAINED_ON)
    shown = {one_prompt_a_kind(edits, epoch).flat("rephrase")[0].ids for epoch in range(4)}
    assert len(shown) == 2
    assert [len(one_prompt_a_kind(edits, 0).flat(kind)) for kind in TRAINED_ON] == [2, 1, 1]


def test_records_without_rephrased_or_unrelated_prompts_train(tmp_path):
    t = trainer(tmp_path)
    plain = [EditRecord(r.prompt, r.target_new) for r in t.train_records[:6]]
    losses = t.train_step(t.backbone.prepare(plain, TRAINED_ON))
    assert losses["edit"] > 0
    assert losses["rephrase"] is losses["unrelated"] is None


def test_a_loss_that_is_not_finite_names_its_record(tmp_path, monkeypatch):
    """The first records have no rephrasing, so that prompts and records count differently."""
    t = trainer(tmp_path)
    records = [replace(r, rephrases=()) if i < 3 else r for i, r in enumerate(tiny.records(6))]
    objective = Objective(t.backbone, t.backbone.prepare(records, TRAINED_ON), t.hparams)
    rephrased, own = TRAINED_ON.index("rephrase"), objective._token_losses

    def losses(i, batch):
        return own(i, batch) + torch.where(objective.kinds[i] == rephrased, math.nan, 0.0)

    monkeypatch.setattr(objective, "_token_losses", losses)
    with pytest.raises(HorseError, match=r"record [345]: the loss on its rephrase prompt"):
        objective.weight_gradients()


def test_a_float64_archive_is_read_as_it_was_written(tmp_path):
    hparams = tiny.hparams(max_epochs=1, val_interval=1, edits_per_step=6)
    backbone = Backbone.of(tiny.model("llama", torch.float64), tiny.bpe_tokenizer(), hparams)
    data = tiny.records(18)
    t = HORSETrainer(hparams, data[:12], data[12:], tmp_path, backbone, False, False)
    t.run()
    again = HORSETrainer(hparams, data[:12], data[12:], tmp_path, backbone, True, False)
    for name, tensor in t.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor)


def test_an_archive_says_how_residuals_are_made_and_of_which_method(tmp_path):
    t = trainer(tmp_path)
    t.run()
    settings = replace(t.hparams, archive=str(tmp_path), spread="gram_schmidt", residual_cap=0.5)
    with pytest.warns(UserWarning, match="trained with spread: orthogonal.*not gram_schmidt"):
        found = HorseEditor.from_backbone(t.backbone, settings).hparams
    assert found.spread == "orthogonal" and found.residual_cap is None
    with pytest.raises(UsageError, match="trained as HORSE, but alg_name is MALMEN"):
        HorseEditor.from_backbone(t.backbone, replace(settings, alg_name="MALMEN"))


def test_validation_may_edit_more_at_once_than_a_step(tmp_path):
    t = trainer(tmp_path, edits_per_step=3, val_edits=6)
    (evaluator,) = t.validation.evaluators()
    assert len(evaluator.edits) == 6


@pytest.mark.slow
def test_the_rates_sink_to_zero_when_asked_to(tmp_path):
    t = trainer(tmp_path, decay_meta_lr=True, meta_lr=1e-3, eta_meta_lr=1e-2)
    t.run()
    left = 1 / t.n_steps
    assert [g["lr"] for g in t.optimizer.param_groups] == pytest.approx([1e-3 * left, 1e-2 * left])
    t = trainer(tmp_path)
    t.run()
    assert [g["lr"] for g in t.optimizer.param_groups] == [1e-3, 1e-2]


def test_records_that_cannot_teach_the_edit_are_refused(tmp_path):
    t = trainer(tmp_path, edit_coef=0.0)
    t.train_step(t.batch(0))
    plain = [replace(r, rephrases=()) for r in t.train_records[:6]]
    with pytest.raises(UsageError, match="nothing would teach the edit"):
        t.train_step(t.backbone.prepare(plain, TRAINED_ON))


def test_lambda_starts_where_ridge_says_once(tmp_path):
    plain, t = (
        trainer(tmp_path / "plain"),
        trainer(tmp_path / "ridge", ridge=0.5, train_lamda=False),
    )
    plain.train_step(plain.batch(0))
    assert plain.network.lamda.abs().max() < 0.1
    t.train_step(t.batch(0))
    start = t.network.lamda.clone()
    assert start.isfinite().all() and (start.abs() > 0.1).all()
    t.train_step(t.batch(1))
    assert torch.equal(t.network.lamda, start)


SWEPT = {
    "token": "subject",
    "inner_params": [f"model.layers.{i}.mlp.down_proj" for i in (4, 6)],
    "normalizer": "scale",
    "residual_cap": 0.5,
    "edit_sweeps": 3,
}


def test_a_step_and_a_validation_make_their_own_number_of_sweeps(tmp_path, monkeypatch):
    made = {"training.trainer": [], "editing.editor": []}
    for where, numbers in made.items():

        def counted(*parts, numbers=numbers):
            numbers.append(parts[3].edit_sweeps)
            return sweeps(*parts)

        monkeypatch.setattr(f"horse_plugin.{where}.sweeps", counted)
    trainer(tmp_path, max_epochs=1, val_interval=2, train_sweeps=2, **SWEPT).run()
    assert made == {"training.trainer": [2, 2], "editing.editor": [3]}
    trainer(tmp_path / "same", max_epochs=1, val_interval=2, **SWEPT).run()
    assert made["training.trainer"][2:] == [3, 3]


def test_an_archive_of_a_capped_network_edits_as_it_was_trained(tmp_path):
    t = trainer(tmp_path, **SWEPT | {"val_interval": 100})
    t.run()
    network, *_ = load_network(tmp_path, t.backbone)
    assert network.normalizer == "scale" and network.has_cap
    assert t.best["step"] == t.step, "only the last is validated, so that both are the same"
    found = []
    for edits_with in (network, t.network):
        editor = HorseEditor.from_backbone(t.backbone, t.hparams, edits_with)
        found.append(editor.edit(tiny.records(4)).shifts)
        editor.undo()
    for name, shift in found[0].items():
        assert shift.abs().max() > 0
        assert torch.equal(shift, found[1][name])


def test_a_first_validation_that_is_no_number_ends_the_training(tmp_path, monkeypatch):
    """It would be the best for ever; a later one is only not the best."""
    scores = iter([50.0, math.nan, math.nan])
    monkeypatch.setattr(Evaluation, "kept_score", lambda self: next(scores))
    trainer(tmp_path / "later", max_iters=4).run()
    with pytest.raises(HorseError, match="step 2: the validation's score"):
        trainer(tmp_path / "first").run()
    assert not (tmp_path / "first" / ARCHIVE).exists()
