"""An edit on top of others: one of all facts from the unedited weights, less what is there."""

import math
from dataclasses import replace

import pytest
import torch

from horse_plugin.editing import editor as editing
from horse_plugin.editing.checked import checked_edit
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.in_force import InForce
from horse_plugin.editing.solve import edit_residuals, solve
from horse_plugin.errors import UsageError
from horse_plugin.evaluation.metrics import predict
from horse_plugin.method.metric import inverse_root, metric_of
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from tests import tiny
from tests.fast import fast
from tests.numbers import arrays, assert_same_edit, close, weights


@pytest.mark.parametrize("n", [4, 30])
@pytest.mark.parametrize("preserve", [False, True])
def test_an_edit_on_top_pulls_as_the_equation_says(n, preserve):
    """e^λ (HᵀH + μC̄)⁻¹C̄D, for μ above e^λ, as under a budget."""
    h, d, x = map(torch.tensor, arrays(5, (n, 12), (12, 5), (40, 12)))
    metric = metric_of(x.T @ x, 0.1) if preserve else torch.eye(12, dtype=d.dtype)
    ridge = Ridge(h, 0.7, inverse_root(metric) if preserve else None)
    want = 0.2 * torch.linalg.solve(h.T @ h + 0.7 * metric, metric @ d)
    close(InForce([d], torch.tensor([0.2])).pulled(0, ridge), want)


def editor(**changes):
    settings = {"normalizer": "scale", "residual_cap": 5.0, "ridge": 0.01, "edit_sweeps": 12}
    hparams = tiny.hparams(strength=3.0, **settings | changes)
    return HorseEditor.from_backbone(Backbone(tiny.model(), tiny.bpe_tokenizer()), hparams)


def held(e, records):
    prompts = e.backbone.prepare(records, ["edit"]).flat()
    return sum(t.tolist() == list(p.answer) for p, t in predict(e.backbone, prompts).items())


@pytest.mark.parametrize("preserve", fast(["none", "shipped"], ["shipped"]))
@pytest.mark.parametrize("block", fast([8192, 3], [3]))
@pytest.mark.parametrize("step", fast([None, 0.5], [None]))
def test_one_edit_after_the_other_ends_where_all_at_once_end(block, step, preserve):
    records = tiny.records(6)
    settings = {"edit_block": block, "preserve": preserve, "preserve_tokens": 200}
    settings["edit_step"] = step
    one, other = editor(**settings), editor(**settings)
    for i in range(0, 6, 2):
        one.edit(records[i : i + 2])
    # An edit reads its own facts first, and then those in force, oldest first.
    other.edit([*records[4:], *records[:4]])
    assert_same_edit(one, other, 1e-4)


WRITE_ANEW = {
    "edit": lambda e: e.edit(None),
    "checked": lambda e: checked_edit(e, None, "facts", max_rise=1e9),
}


@pytest.mark.parametrize("how", fast(WRITE_ANEW, ["checked"]))
def test_a_budget_on_what_is_written_anew_charges_all_of_it(how):
    """Under a larger ridge term the weights are those of an edit of all facts under it."""
    records = tiny.records(6)
    one, other = editor(), editor()
    one.edit(records[:3])
    one.edit(records[3:])
    one.undo(0)

    def dear(solve_at, *parts):  # a budget that takes a ridge term of 50 times
        return solve_at(50.0), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one, "_within_budget", dear)
        WRITE_ANEW[how](one)
        patch.setattr(other, "_within_budget", dear)
        other.edit(records[3:])
    assert_same_edit(one, other, 1e-4)


def test_a_prompt_with_other_white_space_is_the_same_fact():
    e, records = editor(), tiny.records(3)
    e.edit(records)
    correction = replace(records[1], prompt=f"{records[1].prompt}  ", target_new=tiny.words(3))
    assert len(e.to_capture(e.backbone.prepare([correction], ["edit"]))) == 3
    e.edit([correction])
    facts = e.facts_in_force
    assert len(facts) == 3 and correction in facts and records[1] not in facts


def test_other_settings_of_facts_in_force_are_named():
    e, records = editor(), tiny.records(4)
    e.edit(records[:2])
    e.use(e.backbone, replace(e.hparams, separator=" - "))
    with pytest.warns(UserWarning, match="separator: 001 had another than ' - '"):
        e.edit(records[2:])


def test_an_edit_in_blocks_that_fails_at_the_solve_keeps_its_files(tmp_path, monkeypatch):
    e, records = editor(edit_block=3), tiny.records(6)
    monkeypatch.setattr(editing, "solve_sums", lambda *parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        e.edit(records, unfinished=tmp_path)
    assert list(tmp_path.iterdir())


def test_without_keep_edits_nothing_is_written_anew():
    e = editor(keep_edits=False)
    e.edit(tiny.records(2))
    for write_anew in (e.edit, lambda records: checked_edit(e, records, "facts")):
        with pytest.raises(UsageError, match="keep_edits"):
            write_anew(None)


def test_facts_in_force_hold_after_further_edits():
    records, kept = tiny.records(9), {}
    for keep in (True, False):
        e = editor(keep_edits=keep)
        for i in range(0, 9, 3):
            e.edit(records[i : i + 3])
        kept[keep] = held(e, records)
    assert kept[True] == 9 > kept[False]


def test_an_edit_of_the_same_prompt_takes_the_place_of_the_one_in_force():
    e, records = editor(), tiny.records(4)
    e.edit(records[:3])
    other = replace(records[0], target_new=records[3].target_new)
    e.edit([other])
    assert held(e, [other, *records[1:3]]) == 3


def test_an_edit_that_replaces_all_others_leaves_nothing_of_them():
    e, alone, records = editor(), editor(), tiny.records(4)
    others = [replace(r, target_new=records[3].target_new) for r in records[:3]]
    e.edit(records[:3])
    e.edit(others)
    alone.edit(others)
    for found, want in zip(weights(e), weights(alone), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_a_capture_made_before_another_edit_is_refused():
    e, records = editor(), tiny.records(6)
    captured = e.capture(records[3:])
    e.edit(records[:3])
    with pytest.raises(UsageError, match="other records"):
        e.edit(records[3:], captured=captured)


def test_a_first_edit_is_the_same_with_and_without():
    a, b = (editor(keep_edits=keep).edit(tiny.records()) for keep in (True, False))
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_larger_ridge_term_charges_the_new_shift_alone():
    e = editor(ridge=0.05)
    first = e.edit(tiny.records(3))
    captured = e.capture(tiny.records(6)[3:])
    network = e.untrained_network(captured)
    residuals = edit_residuals(e.backbone, network, captured, e.hparams)
    below = InForce(list(first.shifts.values()), network.lamda.detach().exp())
    parts = e.backbone, network, captured, residuals

    def length(share):
        tensors = solve(*parts, replace(e.hparams, edit_ridge=share), e.roots, below)
        return math.hypot(*(t.norm().item() for t in tensors.values()))

    lengths = [length(10.0**i) for i in range(6)]
    assert sorted(lengths, reverse=True) == lengths and lengths[-1] < 1e-2 * lengths[0]
