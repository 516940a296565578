"""Edits, undos, applies, saves, loads, training and a careless caller, in any order, on one model.

After every step weights, history and the caller's state equal those of an oracle of plain tensors.
``HORSE_SEQUENCES=10000 pytest tests/test_stateful.py`` runs that many sequences.
"""

import contextlib
import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from horse_plugin import (
    Chain,
    EditDelta,
    Evaluator,
    HorseEditor,
    HorseError,
    HORSETrainer,
    UsageError,
)
from horse_plugin.data.batches import batches
from horse_plugin.editing.chain import read_edits
from horse_plugin.model.backbone import Backbone
from horse_plugin.training.checkpoint import CHECKPOINT
from tests import tiny
from tests.editing.test_editor import FailsAt

N = int(os.environ.get("HORSE_SEQUENCES", "20"))
SMALL = {**tiny._SIZES, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TOKENIZER, RECORDS = tiny.bpe_tokenizer(), tiny.records(12)
EDITED = [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]
TRUNK = "model.layers.0.self_attn.q_proj.weight"


def small_model(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


MODELS = {dtype: small_model(dtype) for dtype in (torch.float32, torch.bfloat16)}


def hparams(**changes):
    settings = {"inner_params": EDITED, "rank": 1, "edits_per_step": 2, "trunk_cache_gb": 0.01}
    # Every edit must move a bf16 weight: one that moves none is refused.
    settings |= {"max_epochs": 2, "max_iters": 3, "val_interval": 1, "strength": 5.0}
    return tiny.hparams(**settings | changes)


AROUND = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}
around = st.sampled_from(sorted(AROUND)).map(AROUND.get)
some = st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True)


class Made:
    """A delta, the weights that it was made on, and those before all edits of its editor."""

    def __init__(self, delta, on, original):
        self.delta, self.on, self.original = delta, on, original


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class OneModel(RuleBasedStateMachine):
    """The real thing, and beside it ``self.weights``, ``self.edits`` and ``self.caller``."""

    made = Bundle("made")
    saved = Bundle("saved")

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.count = 0

    def teardown(self):
        self.stack.close()

    @initialize(dtype=st.sampled_from(list(MODELS)), training=st.booleans())
    def a_model(self, dtype, training):
        self.model = copy.deepcopy(MODELS[dtype]).train(training)
        self.editor = HorseEditor(self.model, TOKENIZER, hparams())
        self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.original = self.edit_weights()  # before the edits in force
        self.edits, self.hooks, self.foreign = [], [], False
        self.trainer, self.trained = None, None
        self.caller = self.callers_state()

    # What holds after every step.

    @invariant()
    def the_weights_are_the_oracles(self):
        if hasattr(self, "model"):
            assert equal(self.weights, self.model.state_dict())

    @invariant()
    def the_history_is_the_oracles(self):
        if hasattr(self, "model"):
            assert [d.name for d in self.editor.history] == [m.delta.name for m in self.edits]
            assert bool(self.editor.changed) == (self.foreign and bool(self.edits))

    @invariant()
    def the_callers_state_is_untouched(self):
        if hasattr(self, "model"):
            assert self.callers_state() == self.caller
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")

    def callers_state(self):
        modules = [
            (m.training, "forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in self.model.modules()
        ]
        parameters = [
            (p.requires_grad, id(p), id(p.grad), None if p.grad is None else p.grad.sum().item())
            for p in self.model.parameters()
        ]
        return modules, parameters

    # The oracle: plain tensors.

    def edit_weights(self):
        return {name: self.weights[f"{name}.weight"].clone() for name in EDITED}

    def put(self, weights, deltas):
        """Set the edit weights to these plus the deltas, one after the other."""
        for name in EDITED:
            weight = weights[name]
            for delta in deltas:
                tensors = delta.tensors
                shift = tensors.get(f"{name}.shift")
                if shift is None:
                    shift = tensors[f"{name}.keys"].T @ tensors[f"{name}.factors"]
                weight = (weight.float() + shift.T).to(weight.dtype)
            self.weights[f"{name}.weight"] = weight.clone()

    def keep(self, delta):
        if not self.edits:
            self.original = self.edit_weights()
        kept = Made(delta, self.edit_weights(), self.original)
        self.put(kept.on, [delta])
        self.edits.append(kept)
        return kept

    @contextlib.contextmanager
    def refused(self, expected):
        """What is expected to be refused is, and nothing else."""
        try:
            yield
        except HorseError:
            assert expected
        else:
            assert not expected

    # What is done with edits.

    @rule(target=made, indices=st.none() | some, around=around)
    def edit(self, indices, around):
        """Of some facts, or of those in force, anew."""
        self.count += 1
        kept, records = None, indices and [RECORDS[i] for i in indices]
        nothing = records is None and not any(m.delta.records for m in self.edits)
        with self.refused(nothing or (bool(self.edits) and self.foreign)):
            with around():
                delta = self.editor.edit(records, f"e{self.count}")
            kept = self.keep(delta)
            self.foreign = False
        return kept

    @precondition(lambda self: not self.foreign)
    @rule(
        indices=some,
        back=st.integers(0, 120),
        error=st.sampled_from([KeyboardInterrupt, torch.OutOfMemoryError]),
    )
    def edit_that_fails(self, indices, back, error):
        edits = self.editor.backbone.prepare([RECORDS[i] for i in indices], ["edit"])
        for _ in range(2):  # the first one also drops the states of a trunk that has changed
            with FailsAt() as counting:
                self.editor.edit(edits)
            self.editor.undo()
        with contextlib.suppress(error), FailsAt(max(1, counting.calls - back), error):
            self.editor.edit(edits)
            raise AssertionError

    @rule(which=st.integers(0, 5), by_name=st.booleans(), force=st.booleans(), around=around)
    def undo(self, which, by_name, force, around):
        which = which % len(self.edits) if self.edits else which
        given = self.edits[which].delta.name if self.edits and by_name else which
        with self.refused(not self.edits or (self.foreign and not force)):
            with around():
                undone = self.editor.undo(given, force)
            if by_name:  # the last edit of that name
                which = max(i for i, m in enumerate(self.edits) if m.delta.name == given)
            assert undone is self.edits.pop(which).delta
            self.put(self.original, [m.delta for m in self.edits])
            self.foreign = False

    @rule(kept=made, around=around)
    def apply(self, kept, around):
        if kept is None:
            return
        here = [self.edit_weights(), *([self.original] if self.edits else [])]
        fits = any(equal(kept.on, weights) for weights in here)
        with self.refused((self.foreign and bool(self.edits)) or not fits):
            with around():
                self.editor.apply(kept.delta)
            self.keep(kept.delta)
            self.foreign = False

    @rule(target=saved, kept=made)
    def save(self, kept):
        if kept is None:
            return None
        self.count += 1
        kept.delta.save(self.folder / str(self.count))
        return kept, self.folder / str(self.count)

    @rule(target=made, pair=consumes(saved))
    def load(self, pair):
        if pair is None:
            return None
        kept, folder = pair
        loaded = EditDelta.load(folder)
        assert equal(kept.delta.tensors, loaded.tensors)
        assert loaded.records == kept.delta.records and loaded.name == kept.delta.name
        return Made(loaded, kept.on, kept.original)

    @precondition(lambda self: self.edits and not self.foreign)
    @rule(which=st.integers(0, 5))
    def chain(self, which):
        """All edits go into a folder, one is undone there, and the rest into another model."""
        names = [m.delta.name for m in self.edits]
        if len(set(names)) < len(names) or not equal(self.edits[0].on, self.original):
            return
        self.count += 1
        chain = Chain(self.folder / f"chain{self.count}")
        for made in self.edits:
            chain.add(made.delta)
        undone = chain.undo(names[which % len(names)])
        left = [m.delta for m in self.edits if m.delta.name != undone]
        read = read_edits(chain.folder)
        assert [d.name for d in read] == [d.name for d in left]
        before = {k: v.clone() for k, v in self.weights.items()}
        self.put(self.original, left)
        wanted, self.weights = self.weights, before
        other = HorseEditor(copy.deepcopy(self.model), TOKENIZER, hparams())
        other.backbone.weights.restore(self.original)
        with contextlib.suppress(UsageError):  # edits that combine, but are no chain
            other.apply_chain(read)
            found = other.backbone.model.state_dict()
            assert all(torch.equal(found[f"{n}.weight"], wanted[f"{n}.weight"]) for n in EDITED)

    # What else is done with the model.

    @rule(around=around)
    def train(self, around):
        """One more step of a training, which a later rule may resume."""
        with around():
            if self.trainer is None:
                self.count += 1
                folder = self.folder / f"archive{self.count}"
                self.trainer = self.new_trainer(folder)
            self.trainer.train_step(self.trainer.batch(0))

    def new_trainer(self, folder, resume=False):
        backbone = Backbone.of(self.model, TOKENIZER, hparams())
        return HORSETrainer(
            hparams(), RECORDS[:4], RECORDS[4:6], folder, backbone, resume, progress=False
        )

    @rule(around=around)
    def train_to_the_end_and_resume(self, around):
        self.count += 1
        folder = self.folder / f"run{self.count}"
        with around():
            trainer = self.new_trainer(folder)
            trainer.run()
            resumed = self.new_trainer(folder, resume=True)
        assert (folder / CHECKPOINT).exists() and resumed.step == trainer.step == 3
        assert equal(resumed.network.state_dict(), trainer.network.state_dict())

    @rule(indices=some, around=around)
    def evaluate(self, indices, around):
        with around():
            evaluator = Evaluator(self.editor.backbone, [RECORDS[i] for i in indices])
        assert evaluator.before.mean("locality") == 100
        prompts = evaluator.edits.flat("edit")
        batch = next(batches(prompts, 4096))
        with around():
            found = self.editor.backbone.logits(batch)
        fresh = Backbone(copy.deepcopy(self.model), TOKENIZER, EDITED)
        torch.testing.assert_close(found, fresh.logits(batch), rtol=0.02, atol=0.02)

    # What a caller does to the model in between.

    @rule(module=st.integers(0, 30), training=st.booleans())
    def caller_sets_a_mode(self, module, training):
        modules = list(self.model.modules())
        modules[module % len(modules)].train(training)
        self.caller = self.callers_state()

    @rule(parameter=st.integers(0, 60), requires_grad=st.booleans(), value=st.floats(-1, 1))
    def caller_sets_a_gradient(self, parameter, requires_grad, value):
        parameters = list(self.model.parameters())
        p = parameters[parameter % len(parameters)]
        p.requires_grad_(requires_grad).grad = torch.full_like(p, value)
        self.caller = self.callers_state()

    @rule(module=st.integers(0, 30))
    def caller_adds_or_removes_a_hook(self, module):
        if self.hooks:
            self.hooks.pop().remove()
        else:
            modules = list(self.model.modules())
            hooked = modules[module % len(modules)]
            self.hooks.append(hooked.register_forward_hook(lambda module, args, out: None))
        self.caller = self.callers_state()

    @rule(how=st.sampled_from(["data", "in place", "parameter"]), factor=st.floats(0.5, 1.5))
    def caller_changes_the_trunk(self, how, factor):
        module = self.model.get_submodule(TRUNK.removesuffix(".weight"))
        if how == "data":
            module.weight.data = module.weight.data * factor
        elif how == "in place":
            with torch.no_grad():
                module.weight.mul_(factor)
        else:
            module.weight = torch.nn.Parameter(module.weight.detach() * factor)
        self.weights[TRUNK] = module.weight.detach().clone()
        self.caller = self.callers_state()

    @rule(name=st.sampled_from(EDITED))
    def caller_changes_an_edit_weight(self, name):
        weight = self.model.get_submodule(name).weight
        weight.data[0, 0] += 1
        self.weights[f"{name}.weight"] = weight.detach().clone()
        self.foreign = bool(self.edits)


OneModel.TestCase.settings = settings(
    max_examples=N // 2,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=set(Phase) - {Phase.explain},
)


@pytest.mark.slow
class TestOneModel(OneModel.TestCase):
    """Half of the sequences."""


@pytest.mark.slow
class TestOneModelBesideIt(OneModel.TestCase):
    """The other half, which another worker may run."""
