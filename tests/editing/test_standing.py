"""Chains that tell the truth: whose figures are stale, and what they are now."""

import shutil

import pytest

from horse_plugin import Chain, HorseEditor, UsageError
from horse_plugin.editing.checked import checked_edit
from horse_plugin.editing.export import to_rank
from horse_plugin.editing.standing import Since, is_unsettled, measure_again, since, stale
from tests import tiny
from tests.numbers import assert_same_edit


def editor():
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(strength=5000.0))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    e, made = editor(), Chain(tmp_path_factory.mktemp("three") / "chain")
    for i, name in enumerate(("a", "b", "c")):
        records = tiny.records(12)[4 * i : 4 * i + 4]
        made.add(*checked_edit(e, records, "facts", name, max_rise=1e9))
    return made.folder


@pytest.fixture
def chain(three, tmp_path):
    """Three edits of other facts, one on top of the other."""
    return Chain(shutil.copytree(three, tmp_path / "chain"))


def test_every_edit_says_what_it_was_made_onto(chain):
    assert [d.about["onto"] for d in chain.deltas()] == [[], ["a"], ["a", "b"]]
    assert [entry["onto"] for entry in Chain(chain.folder).entries] == [[], ["a"], ["a", "b"]]


def test_figures_are_stale_once_edits_come_on_top_or_go_below(chain):
    assert stale(chain) == {"a": Since(("b", "c"), ()), "b": Since(("c",), ())}
    chain.undo("b")
    assert stale(chain) == {"a": Since(("c",), ()), "c": Since((), ("b",))}
    assert str(stale(chain)["c"]) == "since then undone: b"
    chain.undo("c")
    assert stale(chain) == {}  # a is alone, as it was when it was made
    assert since("c", None, ["a", "c"]) == Since((), ())  # of 0.1: onto those below


def test_figures_are_measured_again_in_the_model_as_it_is(chain):
    chain.undo("a")
    fresh = editor()
    rows = measure_again(fresh, chain.deltas())
    assert [row["method"] for row in rows] == ["b", "c"]
    again = measure_again(editor(), chain.deltas())
    assert [r["efficacy"] for r in rows] == [r["efficacy"] for r in again]
    evaluated = fresh.backbone.prepare(chain.deltas()[1].records)
    assert rows[1]["n_edits"] == len(evaluated) == 4 and rows[1]["drift"] > 0
    chain.save_now(rows)
    assert Chain(chain.folder).now()["c"]["efficacy"] == rows[1]["efficacy"]
    chain.undo("b")
    assert Chain(chain.folder).now() == {}  # they are of other edits
    chain.undo("c")
    with pytest.raises(UsageError, match="no edit is in force"):
        measure_again(editor(), chain.deltas())


def test_the_last_edit_of_a_chain_measured_again_has_the_figures_that_it_was_made_with(chain):
    rows = measure_again(editor(), chain.deltas())
    made = chain.deltas()[2].about["figures"]["after"]
    for figure in ("efficacy", "generalization", "specificity", "drift", "perplexity"):
        assert rows[2][figure] == pytest.approx(made[figure]), figure


def test_facts_above_an_edit_that_is_undone_are_written_anew(chain):
    """Then the weights are those of an edit of what is left alone."""
    assert not is_unsettled(chain)
    chain.undo("c")
    assert not is_unsettled(chain)
    chain.redo("c")
    chain.undo("a")
    assert is_unsettled(chain)
    e, alone = editor(), editor()
    e.apply_chain(chain.deltas())
    delta, rows = checked_edit(e, None, "facts in force", "anew", max_rise=1e9)
    assert delta.records == [] and rows[1]["n_edits"] == len(delta.facts) == 8
    chain.add(delta, rows)
    assert not is_unsettled(chain)
    assert chain.deltas()[-1].about["onto"] == ["b", "c"]
    alone.edit(e.facts_in_force)
    assert_same_edit(e, alone, 1e-3)
    rows = measure_again(editor(), chain.deltas())
    assert [row["method"] for row in rows] == ["b", "c"]
    chain.undo("anew")
    assert is_unsettled(chain)


def test_without_a_fact_in_force_there_is_nothing_to_write_anew():
    with pytest.raises(UsageError, match="no fact is in force"):
        editor().edit(None)


def test_where_only_an_edit_without_facts_is_left_it_is_said(chain):
    chain.undo("a")
    e = editor()
    e.apply_chain(chain.deltas())
    chain.add(*checked_edit(e, None, "facts in force", "anew", max_rise=1e9))
    chain.undo("b")
    chain.undo("c")
    assert stale(chain) == {}
    with pytest.raises(UsageError, match="has facts to measure"):
        measure_again(editor(), chain.deltas())
    with pytest.raises(UsageError, match="no edit has facts"):
        to_rank(editor(), chain.deltas())
