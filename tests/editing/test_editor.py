"""Edits, their deltas, and taking them back."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from horse_plugin import EditRecord, Evaluator, HorseEditor, HorseError, UsageError
from horse_plugin.data.batches import batches
from horse_plugin.editing.solve import calibrate, edit_residuals, new_network, solve
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.capture import capture
from tests import tiny


def editor(architecture="llama", dtype=torch.float32, seed=0, **changes):
    model = tiny.model(architecture, dtype, seed)
    return HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(**changes))


def state(editor):
    return {k: v.clone() for k, v in editor.backbone.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def answer_loss(editor):
    """Summed cross-entropy of the new answers on the edited prompts."""
    prompts = editor.backbone.prepare(tiny.records(), ["edit"]).flat()
    return sum(
        F.cross_entropy(editor.backbone.logits(batch), batch.labels, reduction="sum").item()
        for batch in batches(prompts, 10_000)
    )


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_an_edit_makes_the_answers_likelier_and_undo_is_bit_exact(architecture):
    e = editor(architecture)
    before, unlikely = state(e), answer_loss(e)
    e.edit(tiny.records())
    assert answer_loss(e) < unlikely
    e.undo()
    assert same(before, state(e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_undo_is_bit_exact_in_half_precision_over_a_chain(dtype):
    e = editor(dtype=dtype)
    states = [state(e)]
    for i in range(3):
        e.edit(tiny.records(9)[3 * i : 3 * i + 3])
        states.append(state(e))
    assert len(e.history) == 3
    for wanted in reversed(states[:-1]):
        e.undo()
        assert same(wanted, state(e))
    with pytest.raises(HorseError, match="no edit"):
        e.undo()


def test_the_same_seed_gives_the_same_delta_bit_for_bit():
    one, two = editor().edit(tiny.records()), editor().edit(tiny.records())
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)


@given(
    n=st.integers(1, 5),
    times=st.integers(1, 3),
    length=st.integers(1, 6),
)
@settings(deadline=None, max_examples=15)
@pytest.mark.slow
def test_duplicates_one_token_and_long_answers(n, times, length):
    records = [
        EditRecord(f"{tiny.WORDS[i]} is", " ".join(tiny.WORDS[i : i + length])) for i in range(n)
    ] * times
    e = editor()
    before = state(e)
    delta = e.edit(records)
    assert all(s.isfinite().all() for s in delta.shifts.values())
    e.undo()
    assert same(before, state(e))


def test_a_delta_survives_saving_and_does_the_same(tmp_path):
    e = editor()
    delta = e.edit(tiny.records())
    after = state(e)
    delta.save(tmp_path / "edit")
    assert sorted(p.name for p in (tmp_path / "edit").iterdir()) == [
        "delta.safetensors",
        "edit.json",
    ]
    loaded = HorseEditor.load_delta(tmp_path / "edit")
    assert loaded.records == tiny.records()
    assert loaded.about == delta.about
    other = editor()
    other.apply(loaded)
    assert same(after, state(other))


def test_a_delta_for_another_model_is_refused_by_name(tmp_path):
    editor("llama").edit(tiny.records()).save(tmp_path / "edit")
    loaded = HorseEditor.load_delta(tmp_path / "edit")
    with pytest.raises(UsageError, match=r"LlamaForCausalLM.*GPT2LMHeadModel"):
        editor("gpt2").apply(loaded)
    with pytest.raises(UsageError, match="made for"):
        editor("llama", seed=1).apply(loaded)  # same architecture, other weights
    few = ["model.layers.7.mlp.down_proj"]
    with pytest.raises(UsageError, match=r"model\.layers\.2\.mlp\.down_proj"):
        editor("llama", inner_params=few).apply(loaded)


@pytest.mark.parametrize("file", ["delta.safetensors", "edit.json"])
def test_a_damaged_delta_does_not_load(tmp_path, file):
    editor().edit(tiny.records(2)).save(tmp_path / "edit")
    path = tmp_path / "edit" / file
    whole = path.read_bytes()
    for damage in (whole[:-7], whole[:9], b"", whole[:-60] + b"\0" + whole[-59:]):
        path.write_bytes(damage)
        with pytest.raises(HorseError, match="damaged"):
            HorseEditor.load_delta(tmp_path / "edit")
    path.unlink()
    with pytest.raises(HorseError):
        HorseEditor.load_delta(tmp_path / "edit")


def test_a_system_that_cannot_be_solved_is_named_with_a_record(monkeypatch):
    e = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (gram, torch.tensor(1)))
    first = next(iter(e.backbone.modules))
    with (
        pytest.warns(UserWarning, match="solved in float64"),
        pytest.raises(HorseError, match=rf"{re.escape(first)}: .*singular.* Record \d has the lar"),
    ):
        e.edit(tiny.records())


def test_a_failed_edit_leaves_the_model_alone(monkeypatch):
    e = editor()
    e.edit(tiny.records())
    e.undo()
    e.network = new_network(e.backbone, e.hparams)  # taken as it is from now on
    before = state(e)
    monkeypatch.setattr(
        HyperNetwork, "residuals", lambda *args: [torch.full((14, 32), torch.nan)] * 6
    )
    with pytest.raises(
        HorseError, match=r"record 0: .*layers\.2\.mlp\.down_proj: its residual is not finite"
    ):
        e.edit(tiny.records())
    assert same(before, state(e)) and not e.history


class FailsAt(TorchDispatchMode):
    """Raise an exception in the place of one call of torch; None counts the calls only."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("work", ["edit", "apply_chain", "undo"])
def test_weights_and_history_change_together_or_not_at_all(work, error):
    """Whatever fails on the way, as a Ctrl-C or a lack of memory does after the weights moved."""
    chain = editor()
    deltas = [chain.edit(tiny.records(2)), chain.edit(tiny.records(4)[2:])]
    e = editor()
    if work != "apply_chain":
        e.apply_chain(deltas)
    edits = e.backbone.prepare(tiny.records(3), ["edit"])
    works = {
        "edit": lambda: e.edit(edits),
        "apply_chain": lambda: e.apply_chain(deltas),
        "undo": lambda: e.undo(0),
    }

    def all_of_it():
        return state(e), e.history, e.original_weights, e.changed

    before = all_of_it()
    with FailsAt() as counting:
        works[work]()
    after = all_of_it()
    while e.history:
        e.undo()
    e.apply_chain(before[1])
    failed = 0
    for at in range(counting.calls, max(0, counting.calls - 350), -13):
        with pytest.raises(error), FailsAt(at, error):
            works[work]()
        now = all_of_it()
        assert same(now[0], before[0]) and now[1] == before[1] and now[3] is None
        assert now[2].keys() == before[2].keys() and same(before[2], now[2])
        failed += 1
    works[work]()
    assert failed > 10 and same(state(e), after[0]) and len(e.history) == len(after[1])


def test_a_saved_model_opens_in_transformers(tmp_path):
    import transformers

    e = editor()
    e.edit(tiny.records())
    e.save_model(tmp_path / "model")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(state(e), opened.state_dict())
    transformers.AutoTokenizer.from_pretrained(tmp_path / "model")


def test_figures_equal_the_plain_computation():
    e = editor("gpt2", batch_tokens=30)
    records = tiny.records()
    evaluator = Evaluator(e.backbone, records)
    model, tok = e.backbone.model, e.backbone.tokenizer

    @torch.no_grad()
    def predicted(prompt, answer):
        ids = tok(f"{prompt} {answer}", return_tensors="pt").input_ids
        n = len(tok(prompt).input_ids)
        return model(ids).logits[0, n - 1 : -1].argmax(-1), ids[0, n:]

    def share(q):
        guess, answer = predicted(q.prompt, q.answer)
        return (guess == answer).double().mean().item()

    def plain():
        figures = [(share(r.edit), share(r.equivalent[0]), share(r.unrelated[0])) for r in records]
        return figures, [
            predicted(r.unrelated[0].prompt, r.unrelated[0].answer)[0] for r in records
        ]

    _, unrelated_before = plain()
    e.edit(records)
    figures, unrelated_after = plain()
    got = evaluator.evaluate()
    for record, (eff, gen, spe), a, b in zip(
        got.records, figures, unrelated_before, unrelated_after, strict=True
    ):
        assert (record["efficacy"], record["generalization"], record["specificity"]) == (
            eff,
            gen,
            spe,
        )
        assert record["locality"] == (a == b).double().mean().item()
        assert record["portability"] is None


def test_edit_json_is_readable(tmp_path):
    editor().edit(tiny.records(2)).save(tmp_path / "edit")
    described = json.loads((tmp_path / "edit" / "edit.json").read_text())
    assert described["records"][0]["prompt"] == tiny.records()[0].prompt
    assert described["model"]["architecture"] == "LlamaForCausalLM"
    assert described["seconds"] > 0


def test_kept_trunk_states_change_nothing_and_are_dropped_when_stale():
    e, plain = editor(trunk_cache_gb=1), editor(trunk_cache_gb=0)
    Evaluator(e.backbone, tiny.records())  # keeps its prompts' states
    inputs = [p.inputs for p in e.backbone.prepare(tiny.records(), ["edit"]).flat()]
    assert not e.backbone.trunk_cache.missing(inputs)
    a, b = e.edit(tiny.records()), plain.edit(tiny.records())
    for k in a.tensors:
        torch.testing.assert_close(a.tensors[k], b.tensors[k])
    for x in (e, plain):
        x.undo()
        with torch.no_grad():
            x.backbone.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    a, b = e.edit(tiny.records()), plain.edit(tiny.records())
    assert e.backbone.trunk_cache.missing(inputs) == inputs
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_an_untrained_network_is_fitted_to_each_edit():
    e = editor()
    e.edit(tiny.records(1))
    e.undo()
    a, b = e.edit(tiny.records()), editor().edit(tiny.records())
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_edit_ridge_scales_the_ridge_term_of_the_edit():
    e = editor(edit_ridge=0.25)
    prompts = e.backbone.prepare(tiny.records(), ["edit"]).flat()
    captured = capture(e.backbone, prompts)
    network = new_network(e.backbone, e.hparams)
    calibrate(network, captured, e.hparams, e.roots)
    residuals = edit_residuals(e.backbone, network, captured, e.hparams)
    found = solve(e.backbone, network, captured, residuals, e.hparams, e.roots)
    torch.nn.init.constant_(network.lamda, math.log(0.25))
    wanted = solve(e.backbone, network, captured, residuals, tiny.hparams(), e.roots)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kept", [0.0, 0.1])
def test_further_sweeps_read_the_model_as_it_is_by_then(kept):
    """Two sweeps from the equations: Σ R' of both, under the keys of the second."""
    settings = {"normalizer": "scale", "residual_cap": 0.3, "strength": 0.5, "spread": "uniform"}
    e = editor(edit_sweeps=2, trunk_cache_gb=kept, **settings)
    before, probability = state(e), answer_loss(e)
    prompts = e.backbone.prepare(tiny.records(), ["edit"]).flat()
    first = capture(e.backbone, prompts)
    network = e.untrained_network(first)

    def shift(h, r, lamda):
        h, r = h.double(), r.double()
        return torch.linalg.solve(h.T @ h + lamda.exp().item() * torch.eye(h.shape[1]), h.T @ r)

    residuals = network.residuals(first.keys, first.grads)
    shifts = map(shift, first.keys, residuals, network.lamda)
    with e.backbone.weights.shifted(dict(zip(e.backbone.modules, shifts, strict=True))):
        second = capture(e.backbone, prompts)
    more = network.residuals(second.keys, second.grads)
    wanted = map(shift, second.keys, map(torch.add, residuals, more), network.lamda)
    delta = e.edit(tiny.records())
    for found, want in zip(delta.shifts.values(), wanted, strict=True):
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-3)
    assert answer_loss(e) < probability
    inputs = [p.inputs for p in prompts]
    assert e.backbone.trunk_cache.missing(inputs) == inputs  # none was kept for longer
    e.undo()
    assert same(before, state(e))


def test_one_token_at_one_module_is_too_little_for_an_untrained_network():
    e = editor(inner_params=["model.layers.7.mlp.down_proj"])
    words = [w for w in tiny.WORDS if len(e.backbone.tokenizer(f" {w}").input_ids) == 1]
    with pytest.raises(HorseError, match="too few answer tokens"):
        e.edit([EditRecord("the capital is", words[0])])


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.5.mlp.up_proj", "model.layers.6.mlp.down_proj"],
        ["model.layers.6.mlp.down_proj", "model.layers.6.mlp.up_proj"],
    ],
)
@pytest.mark.parametrize("spread", ["orthogonal", "gram_schmidt"])
def test_edit_modules_of_different_widths_and_in_one_block(names, spread):
    e = editor(inner_params=names, spread=spread)
    unlikely = answer_loss(e)
    delta = e.edit(tiny.records())
    assert answer_loss(e) < unlikely
    assert delta.modules == sorted(names, key=lambda n: (n.split(".")[2], "down" in n))


def test_prompts_beyond_the_models_length_lose_their_beginning():
    e = editor()
    e.backbone.model.config.max_position_embeddings = 16
    long = EditRecord(f"{tiny.words(0, 60)} is", "Oslo")
    e.edit([long, *tiny.records()])
    (prompt,) = e.backbone.prepare([long], ["edit"]).flat()
    assert len(prompt.ids) == 16


def test_saving_leaves_other_files_in_the_folder_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    delta = editor().edit(tiny.records(2))
    delta.save(tmp_path)
    with pytest.raises(UsageError, match="holds an edit already"):
        delta.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(UsageError, match="something already"):
        editor().save_model(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_capture_of_other_records_is_refused():
    e = editor()
    before, captured = state(e), e.capture(tiny.records(3))
    for others in (tiny.records(2), tiny.records(4)[1:]):
        with pytest.raises(UsageError, match="belongs to other records"):
            e.edit(others, captured=captured)
    assert same(before, state(e)) and not e.history
    e.edit(tiny.records(3), captured=captured)


def test_the_model_is_asked_before_and_after_an_edit():
    e, prompts = editor(strength=5000.0), [r.prompt for r in tiny.records()]
    unedited = e.ask(prompts, 6)
    e.edit(tiny.records())
    edited = e.ask(prompts, 6)
    assert edited != unedited
    assert e.ask(prompts[0], 6) == edited[:1]
    assert e.ask(prompts, 6, before=True) == unedited
    assert e.ask(prompts, 6) == edited
    e.undo()
    assert e.ask(prompts, 6) == unedited


def test_an_empty_or_too_long_prompt_is_refused():
    e = editor()
    with pytest.raises(UsageError, match="the prompt is empty"):
        e.ask("")
    with pytest.raises(UsageError, match=r"'the capital .*' *: \d+ tokens and an answer of 50 are"):
        e.ask(tiny.words(0, 120))
