"""How keys crowd: the warning that sweeps will not do, and the length of their steps."""

import re
import warnings

import pytest
import torch

from horse_plugin import HorseEditor
from horse_plugin.editing.crowding import TOO_CROWDED, Crowding
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from tests import tiny


def rows(n, mu=0.5):
    return Crowding.of(Ridge(torch.ones(n, 5), mu))


def test_rows_with_one_key_share_what_one_would_move():
    crowding = rows(20)
    assert (crowding.share, crowding.alone) == pytest.approx((100 / 100.5 / 20, 5 / 5.5))


def test_the_more_rows_share_a_key_the_shorter_are_the_steps():
    sweeps = tiny.hparams(edit_sweeps=3)
    steps = [rows(n).step(sweeps) for n in (1, 2, 5, 20)]
    assert steps[:2] == [1, 1] and 1 > steps[2] > steps[3]
    assert steps[3] == pytest.approx(100 / 100.5 / 20 / (5 / 5.5) / TOO_CROWDED)
    assert rows(20).step(tiny.hparams(edit_sweeps=1, edit_step=0.4)) == 1  # the paper's
    assert rows(20).step(tiny.hparams(edit_sweeps=3, edit_step=0.4)) == 0.4
    for exponent in range(3, 16):  # of which rounding leaves this or that
        for factor in (1, 2, 5):
            assert 0 < rows(20, factor * 10.0**exponent).step(sweeps) <= 1


def test_the_sweeps_it_asks_for_are_enough():
    with pytest.warns(UserWarning, match="2 answer tokens crowd .* 48% .* 91% alone") as found:
        rows(2).warn(tiny.hparams(edit_sweeps=3))
    needed = int(re.search(r"Try edit_sweeps: (\d+)", str(found[0].message))[1])
    with pytest.warns(UserWarning, match="crowd"):
        rows(2).warn(tiny.hparams(edit_sweeps=needed - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(2).warn(tiny.hparams(edit_sweeps=needed))


def test_where_answers_undo_each_other_no_number_of_sweeps_is_promised():
    said = "20 answer tokens crowd .* Try more edit_sweeps with a smaller edit_ridge, more modules"
    with pytest.warns(UserWarning, match=said):
        rows(20).warn(tiny.hparams(edit_sweeps=100))


def test_a_large_ridge_term_is_not_taken_for_a_crowd():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(1).warn(tiny.hparams())
        rows(20, mu=1e4).warn(tiny.hparams())
        rows(20, mu=1e12).warn(tiny.hparams(edit_sweeps=12))  # of which 0 is left


@pytest.mark.parametrize("block", [20, 100])
def test_an_edit_warns_at_once_and_in_blocks(block):
    """Before its sweeps, with more facts than the keys have features, and hardly any ridge term."""
    hparams = tiny.hparams(ridge=1e-4, edit_sweeps=2, edit_block=block)
    editor = HorseEditor.from_backbone(Backbone(tiny.model(), tiny.bpe_tokenizer()), hparams)
    with pytest.warns(UserWarning, match="crowd the edit modules"):
        editor.edit(tiny.records(60))
