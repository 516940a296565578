"""A model spread over devices gives what it gives on one, and no device waits between batches."""

import functools

import pytest
import torch

from horse_plugin import Evaluator, HorseEditor, HORSETrainer, UsageError
from horse_plugin.comparison.bench import bench
from horse_plugin.easyedit.apply import apply_horse_to_model
from horse_plugin.evaluation.drift import OrdinaryText
from horse_plugin.evaluation.metrics import predict
from horse_plugin.evaluation.probability import answer_probabilities
from horse_plugin.model import halves as module
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.model.modules import find_edit_modules
from horse_plugin.model.moments import second_moments
from horse_plugin.training.objective import Objective
from tests import tiny
from tests.places import FIRST, HOST, SECOND, Places, spread

TEXT = [("prose", tiny.words(i, 9)) for i in range(6)]
NAMES = [f"model.layers.{i}.mlp.down_proj" for i in range(2, 8)]  # on both devices


@pytest.fixture
def places():
    with Places() as places:
        yield places


def backbone_of(model, monkeypatch, places=None, **settings) -> Backbone:
    """A backbone of the model as it is, or spread over both devices.

    The weights there are of a type that is refused elsewhere, as a quantised one may be.
    """
    found = find_edit_modules(model, NAMES, "ans")
    monkeypatch.setattr(module, "find_edit_modules", lambda *names: found)
    monkeypatch.setattr("horse_plugin.model.modules.is_plain", lambda weight: True)
    backbone = Backbone(spread(model) if places else model, tiny.bpe_tokenizer(), **settings)
    assert backbone.late_backward
    return backbone


def work(backbone: Backbone, out) -> tuple[dict[str, torch.Tensor], list]:
    """What an edit on top of another in sweeps, its figures, and a training run come to."""
    tensors, weights = {}, backbone.weights
    settings = {"edit_sweeps": 2, "preserve": "shipped", "preserve_tokens": 64, "strength": 5.0}
    settings |= {"stats_dir": str(out / "stats"), "max_iters": 1, "keep_tokens": 64}
    hparams = tiny.hparams(**settings, loc_loss="kl")
    editor = HorseEditor.from_backbone(backbone, hparams)
    evaluator = Evaluator(backbone, tiny.records(12), text=OrdinaryText(backbone, TEXT))
    for records in (tiny.records(8), tiny.records(12)[8:]):
        delta = editor.edit(records)
        tensors |= {f"{delta.name}.{name}": t for name, t in delta.tensors.items()}
    tensors |= weights.clones()
    found = [evaluator.evaluate().summary(), editor.ask(["the capital of", "who"], 4)]
    editor.undo()
    editor.undo()
    tensors |= {f"{name}, undone": w for name, w in weights.clones().items()}
    data = tiny.records(18)
    trainer = HORSETrainer(hparams, data[:6], data[12:], out, backbone, progress=False)
    trainer.run()
    tensors |= trainer.network.state_dict()
    return {name: t.cpu().nan_to_num() for name, t in tensors.items()}, [*found, trainer.history]


@pytest.mark.slow
def test_editing_training_measuring_and_asking_give_the_same_bits(tmp_path, monkeypatch):
    one, found = work(backbone_of(tiny.model(), monkeypatch, trunk_cache_gb=0.1), tmp_path / "one")
    with Places() as places:
        backbone = backbone_of(tiny.model(), monkeypatch, places, trunk_cache_gb=0.1)
        assert [m.weight.device for m in backbone.modules.values()] == [FIRST] * 2 + [SECOND] * 4
        both, found_on_both = work(backbone, tmp_path / "both")
    assert one.keys() == both.keys() and found == found_on_both
    for name, tensor in one.items():
        assert torch.equal(tensor, both[name]), name


@pytest.mark.slow
def test_keys_that_wait_in_the_memory_of_the_host_give_the_same_bits(tmp_path, monkeypatch, places):
    """On one device, to which each module's are moved when they are needed."""
    found = []
    for offload in (False, True):
        settings = {"offload_keys": offload, "batch_tokens": 64}
        backbone = backbone_of(tiny.model(), monkeypatch, places, **settings)
        kept = capture(backbone, backbone.prepare(tiny.records(3)).flat("edit"))
        where = {t.device for t in kept.keys + kept.grads}
        assert where == {HOST if offload else FIRST}
        in_blocks = HorseEditor.from_backbone(backbone, tiny.hparams(edit_block=3, edit_sweeps=2))
        in_blocks.edit(tiny.records())
        in_blocks.undo()
        bench(backbone, tiny.hparams(), tiny.records(8), others=False)
        found.append(work(backbone, tmp_path / f"{offload}"))
    (here, figures), (there, same_figures) = found
    assert here.keys() == there.keys() and figures == same_figures
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name


def test_no_copy_of_a_spread_model_is_edited(places):
    with pytest.raises(UsageError, match="copy: a model that accelerate spreads"):
        apply_horse_to_model(spread(tiny.model()), None, [], tiny.hparams(), copy=True)


def passes(backbone: Backbone) -> dict:
    """What runs batches through the model: name → a function that does so again."""
    edits = backbone.prepare(tiny.records(4))
    prompts, edit_prompts = edits.flat(), edits.to_capture(True)
    earlier, text = capture(backbone, edit_prompts), OrdinaryText(backbone, TEXT)

    def train():
        ordinary = backbone.prepare(tiny.records(3), ["edit"]).flat()
        hparams = tiny.hparams(loc_loss="kl", keep_coef=1.0)
        Objective(backbone, edits, hparams, ordinary).weight_gradients()

    return {
        "capture": functools.partial(capture, backbone, edit_prompts),
        "sweep": functools.partial(capture, backbone, edit_prompts, earlier),
        "train": train,
        "predict": functools.partial(predict, backbone, prompts),
        "drift": text.measure,
        "probabilities": functools.partial(answer_probabilities, backbone, prompts),
        "statistics": functools.partial(second_moments, backbone, prompts),
    }


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_the_host_waits_no_more_often_for_many_batches_than_for_few(monkeypatch, places, cached):
    waits = []
    for batch_tokens in (4096, 20):
        settings = {"batch_tokens": batch_tokens, "trunk_cache_gb": 0.1 * cached}
        backbone = backbone_of(tiny.model(), monkeypatch, places, **settings)
        prompts = backbone.prepare(tiny.records(4)).flat()
        assert (len(backbone.batches(prompts, "few or many")) > 8) == (batch_tokens == 20)
        backbone.cache_trunk_states(prompts)
        with backbone.held():
            waits.append({})
            for name, run in passes(backbone).items():
                before = len(places.waits)
                run()
                waits[-1][name] = len(places.waits) - before
    assert waits[0] == waits[1]


def test_the_devices_of_these_tests_do_not_mix_and_note_who_waits(places):
    x, y = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    for mix in (lambda: x + y, lambda: x + torch.ones(3), lambda: torch.cat([x, y])):
        with pytest.raises(RuntimeError, match="tensors of"):
            mix()
    assert (x + y.to(FIRST)).device == FIRST and not places.waits
    for wait in (x.sum().item, x.cpu, x.tolist, x.nonzero, lambda: x[x > 0], lambda: bool(x[0])):
        wait()
    assert len(places.waits) == 6
    torch.ones(3).to(FIRST, non_blocking=True)
    assert len(places.waits) == 6
    torch.ones(3).to(FIRST)
    x[torch.tensor([0])] = 2
    assert len(places.waits) == 8 and x.to(HOST).tolist() == [2, 1, 1]
