"""A budget for drift: the smallest ridge term that keeps to it."""

import warnings
from dataclasses import replace

import pytest
import torch

from horse_plugin import HorseEditor, HorseError, UsageError, checked_edit
from horse_plugin.editing.budget import smallest_ridge
from horse_plugin.editing.solve import edit_residuals, predicted_cost, solve
from horse_plugin.method.metric import inverse_root, metric_of
from tests import tiny

STRONG = {"strength": 20.0, "edit_ridge": 0.01}


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    pieces = [("prose", tiny.words(i, 30)) for i in range(4)]
    monkeypatch.setattr("horse_plugin.editing.editor.shipped_pieces", lambda part: pieces)


def editor(**changes):
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(**STRONG | changes))


def drift_without_a_budget():
    e = editor()
    e.edit(tiny.records())
    return e._choosing_text.measure().drift


def test_the_edit_takes_the_smallest_ridge_term_that_keeps_to_the_budget():
    budget = drift_without_a_budget() / 5
    e = editor(max_drift=budget)
    with pytest.warns(UserWarning, match=r"max_drift .* took .* of the trained ridge term; effic"):
        delta = e.edit(tiny.records())
    found = delta.about["budget"]
    assert e._choosing_text.measure().drift == pytest.approx(found["drift"])
    assert found["drift"] <= budget
    assert found["efficacy"] <= found["efficacy_without"]
    assert len(found["trials"]) < 12  # the prediction is near
    less = editor(edit_ridge=found["edit_ridge"] / 1.1)
    less.edit(tiny.records())
    assert less._choosing_text.measure().drift > budget
    e.undo()
    assert e._choosing_text.measure().drift == pytest.approx(0, abs=1e-9)


def test_a_budget_that_is_kept_anyway_changes_nothing():
    plain, generous = editor(), editor(max_drift=100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = plain.edit(tiny.records()), generous.edit(tiny.records())
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    assert b.about["budget"]["efficacy_without"] is None


def test_no_budget_at_all_is_refused():
    with pytest.raises(UsageError, match="max_drift: must be above 0"):
        tiny.hparams(max_drift=0)


def test_edits_in_force_may_have_spent_the_budget():
    e = editor()
    e.edit(tiny.records())
    weights = e.backbone.weights.digests()
    e.hparams = replace(e.hparams, max_drift=drift_without_a_budget() / 100)
    with pytest.raises(HorseError, match="drift of the edits in force"):
        e.edit(tiny.records(9)[6:])
    assert e.backbone.weights.digests() == weights and len(e.history) == 1


def test_the_prediction_is_what_the_metric_says():
    e = editor()
    captured = e.capture(tiny.records())
    network = e.untrained_network(captured)
    residuals = edit_residuals(e.backbone, network, captured, e.hparams)
    metrics = [metric_of(torch.randn(60, 48).T.cov() + i * torch.eye(48), 0.1) for i in range(6)]
    roots = [inverse_root(m).float() for m in metrics]
    tensors = solve(e.backbone, network, captured, residuals, e.hparams, roots)
    want = 0.0
    for name, metric in zip(e.backbone.modules, metrics, strict=True):
        shift = (tensors[f"{name}.keys"].T @ tensors[f"{name}.factors"]).double()
        want += (shift.T @ metric @ shift).trace().item()
    found = predicted_cost(e.backbone, tensors, roots)
    assert found == pytest.approx(want, rel=1e-3)


def test_bisection_needs_few_trials_whatever_the_prediction():
    for off in (1e-3, 1, 1e3):
        tensors, budget = smallest_ridge(
            lambda share: share,
            lambda share, off=off: off / share if off == 1 else 1 / share**0.5,
            lambda share: 1 / share,
            1.0,
            0.01,
        )
        assert 100 <= budget.edit_ridge <= 110.1 and tensors == budget.edit_ridge
        assert len(budget.trials) < 20


def test_the_checked_edit_reports_the_budget_beside_the_figures():
    with pytest.warns(UserWarning, match="max_drift"):
        delta, rows = checked_edit(
            editor(max_drift=drift_without_a_budget() / 5), tiny.records(), "facts", max_rise=1e9
        )
    assert rows[1]["drift"] == delta.about["figures"]["after"]["drift"] > 0
