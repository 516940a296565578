"""Answers in what the model writes: exact match, contains, and a Q&A context."""

import pytest

from horse_plugin import EditRecord, HorseEditor, Query
from horse_plugin.data.prompts import KINDS
from horse_plugin.evaluation import written
from horse_plugin.evaluation.written import CONTEXTS, figures, table, write_answers
from tests import tiny


@pytest.mark.parametrize(
    ("text", "exact", "contains"),
    [
        ("Ada Lovelace. She was", True, True),
        ("ada  lovelace", True, True),
        ("Ada Lovelace\nQ: Who", True, True),
        ("Ada Lovelace House", False, True),
        ("It was Ada Lovelace.", False, True),
        ("Ada Lovelaces", False, False),
        ("Countess of Lovelace!", True, True),  # accepted as well
        ("", False, False),
    ],
)
def test_an_answer_is_found_in_a_text(monkeypatch, text, exact, contains):
    record = EditRecord(
        "a", "b", unrelated=(Query("c", "Ada Lovelace", ("countess of lovelace",)),)
    )
    monkeypatch.setattr(written, "answers", lambda backbone, prompts, n: [text] * len(prompts))
    found = [w for w in write_answers(None, [record]) if w.kind == "unrelated"]
    assert [(w.exact, w.contains) for w in found] == [(exact, contains)] * len(CONTEXTS)


@pytest.mark.parametrize(
    ("answer", "text", "exact", "contains"),
    [
        ("東京", "東京。人口は", True, True),
        ("東京", "答えは東京です", False, True),
        ("กรุงเทพ", "เมืองหลวงคือกรุงเทพครับ", False, True),
        ("Oslo", "**Oslo**", True, True),
        ("Oslo", "Oslos", False, False),
    ],
)
def test_an_answer_is_found_where_no_space_is_about_it(monkeypatch, answer, text, exact, contains):
    monkeypatch.setattr(written, "answers", lambda backbone, prompts, n: [text] * len(prompts))
    found = write_answers(None, [EditRecord("a", answer)])
    assert {(w.exact, w.contains) for w in found} == {(exact, contains)}


def test_every_prompt_is_answered_in_every_context_as_the_model_writes():
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())
    records = tiny.records(3)
    found = write_answers(editor.backbone, records, 4)
    assert len(found) == 2 * sum(len(of(r)) for of in KINDS.values() for r in records)
    for w in found:
        assert w.text == editor.ask(CONTEXTS[w.context].format(w.prompt), 4)[0]
    said = {w.prompt: w.text for w in found if w.context == "plain" and w.kind == "edit"}
    told = [EditRecord(r.prompt, said[r.prompt] or "x") for r in records]
    share = figures(write_answers(editor.backbone, told, 4))
    assert share["edit_contains_plain"] == pytest.approx(
        100 * sum(bool(text) for text in said.values()) / 3
    )
    assert "rephrase_exact_plain" not in share and len(table(share).lines) == 1


def test_the_mean_is_over_records_and_not_over_prompts():
    def one(record, exact):
        return written.Written(record, "rephrase", "plain", "", "", "", exact, exact)

    share = figures([one(0, True), one(0, False), one(0, False), one(1, True)])
    assert share["rephrase_exact_plain"] == pytest.approx(100 * (1 / 3 + 1) / 2)
