"""An edit on top of others: recursive least squares, and facts in force that stay written."""

import math
from dataclasses import replace

import pytest
import torch

from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.in_force import InForce
from horse_plugin.editing.solve import edit_residuals, solve
from horse_plugin.evaluation.metrics import predict
from horse_plugin.method.metric import inverse_root, metric_of
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from tests import tiny
from tests.numbers import arrays, close


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("preserve", [False, True])
def test_one_edit_after_the_other_ends_where_both_at_once_end(n, preserve):
    """With keys that stay: D of the first n rows, then ΔW of n more, is Eq. 2 of all 2n."""
    h, r, x = map(torch.tensor, arrays(3, (2 * n, 12), (2 * n, 5), (40, 12)))
    root = inverse_root(metric_of(x.T @ x, 0.1)) if preserve else None
    shift = Ridge(h[:n], 0.4, root).shift(r[:n])
    captured = tiny.capture_of([h], in_force=torch.arange(2 * n) < n)
    below = InForce.of([shift], captured, torch.tensor([0.4]), [root])
    new = torch.where(captured.in_force[:, None], 0, r) + below.residuals(captured)[0]
    new[n:] -= h[n:] @ shift  # what is asked for at the new keys, over what D writes there
    ridge = Ridge(h, 0.4, root)
    together = shift + ridge.shift(new) - ridge.anchored(shift)
    close(together, Ridge(h, 0.4, root).shift(r), 2e-3)


@pytest.mark.parametrize("n", [4, 30])
def test_the_anchor_pulls_as_the_equation_says(n):
    h, d, x = map(torch.tensor, arrays(5, (n, 12), (12, 5), (40, 12)))
    metric = metric_of(x.T @ x, 0.1)
    want = 0.7 * torch.linalg.solve(h.T @ h + 0.7 * metric, metric @ d)
    close(Ridge(h, 0.7, inverse_root(metric)).anchored(d), want)
    want = 0.7 * torch.linalg.solve(h.T @ h + 0.7 * torch.eye(12, dtype=d.dtype), d)
    close(Ridge(h, 0.7).anchored(d), want)


def editor(**changes):
    settings = {"normalizer": "scale", "residual_cap": 5.0, "ridge": 0.01, "edit_sweeps": 12}
    hparams = tiny.hparams(strength=3.0, **settings | changes)
    return HorseEditor.from_backbone(Backbone(tiny.model(), tiny.bpe_tokenizer()), hparams)


def held(e, records):
    prompts = e.backbone.prepare(records, ["edit"]).flat()
    return sum(t.tolist() == list(p.answer) for p, t in predict(e.backbone, prompts).items())


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


def test_a_first_edit_is_the_same_with_and_without():
    a, b = (editor(keep_edits=keep).edit(tiny.records()) for keep in (True, False))
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_larger_ridge_term_charges_the_new_shift_alone():
    e = editor(ridge=0.05)
    first = e.edit(tiny.records(3))
    captured = e.capture(tiny.records(6)[3:])
    network = e.untrained_network(captured)
    residuals = edit_residuals(e.backbone, network, captured, e.hparams)
    mus = network.lamda.detach().exp()
    below = InForce.of(list(first.shifts.values()), captured, mus, e.roots)
    parts = e.backbone, network, captured, residuals

    def length(share):
        tensors = solve(*parts, replace(e.hparams, edit_ridge=share), e.roots, below)
        return math.hypot(*(t.norm().item() for t in tensors.values()))

    lengths = [length(10.0**i) for i in range(6)]
    assert sorted(lengths, reverse=True) == lengths and lengths[-1] < 1e-2 * lengths[0]
