"""What is said before and after an edit: conflicts, how far the weights moved, perplexity."""

import warnings

import pytest
import torch

from horse_plugin import EditRecord, Evaluator, HorseEditor, HorseError, UsageError
from horse_plugin.data.prompts import prepare
from horse_plugin.editing.checked import checked_edit
from horse_plugin.editing.conflicts import Conflicts, find_conflicts
from horse_plugin.evaluation.drift import OrdinaryText
from tests import tiny


@pytest.fixture
def editor():
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())


def fact(prompt, answer):
    return EditRecord(prompt, answer)


TROUBLE = [
    fact("the capital of Norway is", "Oslo"),
    fact("the  capital of Norway is ", "Lima"),  # blanks make no other prompt
    fact("the capital of Norway is", "Oslo"),
    fact(f"{tiny.words(0, 90)} is", "Oslo"),
    fact("the capital of France is", tiny.words(0, 90)),
    fact("the piano of Kyoto is", "guitar"),
]


def test_conflicts_are_found_with_their_records(editor):
    earlier = [fact("the piano of Kyoto is", "Rome")]
    edits = prepare(editor.backbone.tokenizer, TROUBLE, 64)
    found = find_conflicts(edits, earlier=earlier)
    assert found == Conflicts(
        duplicates=(2,), contradictions=(1, 5), too_long=(3, 4), unanswerable=(4,)
    )
    assert found.lines()[:2] == [
        "facts given twice: 1 (record 2)",
        "facts that contradict another one on the same prompt: 2 (record 1, 5)",
    ]
    assert find_conflicts(editor.backbone.prepare(tiny.records())).lines() == []


def test_an_answer_of_unknown_tokens_is_unanswerable():
    e = HorseEditor(tiny.model(), tiny.sentencepiece_tokenizer(), tiny.hparams())
    records = [fact("the capital is", "Oslo"), fact("the capital is", "東京")]
    unknown = e.backbone.tokenizer.unk_token_id
    assert find_conflicts(e.backbone.prepare(records), unknown).unanswerable == (1,)


def test_a_token_for_the_unknown_that_ends_answers_makes_none_unanswerable():
    """GPT-2's are one token; append_eos puts it after each answer."""
    e = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(append_eos=True))
    e.backbone.tokenizer.unk_token = e.backbone.tokenizer.eos_token
    delta, _ = checked_edit(e, tiny.records(2), "facts", max_rise=1e9)
    assert "unanswerable" not in delta.about["figures"]["conflicts"]


def test_edits_that_the_model_knows_are_counted(editor):
    records, model = tiny.records(3), editor.backbone.model
    (prompt,) = editor.backbone.prepare(records[2:3], ["edit"]).flat()
    assert len(prompt.answer) == 1
    ids = torch.tensor([prompt.inputs])
    values = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    model.lm_head.weight.data[prompt.answer[0]] = 100 * values  # now it says just that
    with pytest.warns(UserWarning, match=r"facts that the model knows already: 1 \(record 2\)"):
        checked_edit(editor, records, "facts")


def test_strict_refuses_before_any_weight_moves(editor):
    before = {k: v.clone() for k, v in editor.backbone.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"--strict: facts given twice: 1 .*; facts that contra"):
        checked_edit(editor, TROUBLE[:3], "facts", strict=True)
    after = editor.backbone.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not editor.history


def test_strict_undoes_an_edit_with_a_bad_verdict(editor):
    before = {k: v.clone() for k, v in editor.backbone.model.state_dict().items()}
    with pytest.raises(HorseError, match=r"--strict: undone\. 0 of 6 facts hold; .*try a trained"):
        checked_edit(editor, tiny.records(), "facts", strict=True, max_rise=1e9)
    after = editor.backbone.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not editor.history
    delta, _ = checked_edit(editor, tiny.records(), "facts", max_rise=1e9)
    assert delta.about["figures"]["verdict"]["facts"] == "bad"
    assert delta.about["figures"]["held"] == (0, 6) and delta.about["figures"]["kept"][1] == 6


def test_an_edit_that_cannot_be_measured_is_taken_back(editor, monkeypatch):
    before = {n: w.clone() for n, w in editor.backbone.model.state_dict().items()}

    def out_of_memory(self, *args):
        raise MemoryError

    monkeypatch.setattr(Evaluator, "evaluate", out_of_memory)
    with pytest.raises(MemoryError):
        checked_edit(editor, tiny.records(), "facts")
    assert not editor.history
    after = editor.backbone.model.state_dict()
    assert all(torch.equal(after[n], w) for n, w in before.items())


def test_edits_on_top_of_others_are_compared_with_them(editor):
    editor.edit([TROUBLE[0], *tiny.records()])
    with pytest.raises(UsageError, match="contradict another one on the same prompt: 1"):
        checked_edit(editor, TROUBLE[1:2], "facts", strict=True)


def test_a_rise_of_perplexity_is_warned_of_and_figures_stay_with_the_edit(editor, tmp_path):
    heldout = tmp_path / "text.txt"
    heldout.write_text(tiny.words(0, 60))
    with pytest.warns(UserWarning, match="perplexity on the held-out text rose from"):
        delta, rows = checked_edit(editor, tiny.records(), "facts", heldout=heldout, max_rise=-100)
    figures = delta.about["figures"]
    assert figures["before"]["efficacy"] == rows[0]["efficacy"]
    assert figures["after"]["efficacy"] == rows[1]["efficacy"]
    assert figures["before"]["drift"] == 0 < figures["after"]["drift"]
    now = OrdinaryText(editor.backbone, [("text", heldout.read_text())]).before.perplexity
    assert figures["after"]["perplexity"] == pytest.approx(now)
    assert rows[1]["perplexity"] == figures["after"]["perplexity"]
    examples = figures["examples"]
    kinds = ["edit"] * 4 + ["rephrase"] * 2 + ["unrelated"] * 2 + ["opening"] * 2
    assert [e["kind"] for e in examples] == kinds
    editor.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_edit(editor, tiny.records(), "facts", max_rise=1e6)
    with pytest.raises(UsageError, match=r"none\.txt: not readable"):
        checked_edit(editor, tiny.records(), "facts", heldout=tmp_path / "none.txt")
