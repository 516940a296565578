"""``horse play``: the session behind the page, and the page in a browser."""

import re
import shutil
import sys

import pytest
from playwright import sync_api

from horse_plugin import Chain, HorseEditor
from horse_plugin.cli.play import Session, page_of, serve
from horse_plugin.editing.delta import EditDelta
from horse_plugin.errors import UsageError
from tests import tiny

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FACT = {"prompt": "the capital of Norway is", "subject": " ", "target_new": "Lima"}


def tiny_editor() -> HorseEditor:
    """An editor whose edits change what a tiny model writes."""
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(strength=5000.0))


@pytest.fixture
def session(tmp_path):
    return Session(tiny_editor(), Chain(tmp_path / "chain"))


def weights(session: Session) -> dict:
    return session._editor.backbone.weights.digests()


def test_switches_take_edits_out_and_put_them_back_bit_for_bit(session):
    unedited = weights(session)
    for name in ("Lima", "Kyoto", "Rome"):
        session.add(FACT | {"prompt": f"the capital of {name} is", "target_new": name})
    everything = weights(session)
    session.switch(["001", "003"])
    assert Chain(session.chain.folder).in_force == ["001", "003"]
    session.switch([])
    assert weights(session) == unedited
    session.switch(["003", "001", "002"])
    assert weights(session) == everything


def test_facts_above_one_that_is_switched_off_are_written_anew(session):
    for name in ("Lima", "Kyoto"):
        session.add(FACT | {"prompt": f"the capital of {name} is", "target_new": name})
    assert "may hold no more" in session.switch(["002"])
    assert "of 1 facts hold" in session.write_anew()
    assert Chain(session.chain.folder).in_force == ["002", "003"]
    assert session.labels()["003"] == "003: the facts of the edits before it, anew"
    assert session.switch(["002", "003"]) == ""


def test_a_page_begins_with_what_is_in_force_in_the_chain(session):
    session.add(FACT)
    session.add(FACT | {"target_new": "Rome"})
    session.chain.undo("001")
    editor = tiny_editor()
    again = Session(editor, Chain(session.chain.folder))
    assert [d.name for d in editor.history] == ["002"]
    assert list(again.labels()) == ["001", "002"]
    assert again.labels()["001"] == "001: the capital of Norway is → Lima"


def test_a_fact_gets_a_verdict_and_one_that_cannot_be_kept_leaves_the_model(session, monkeypatch):
    assert re.match(r"001: [01] of 1 facts hold; .*drift", session.add(FACT))
    held = weights(session)
    monkeypatch.setattr(Chain, "add", lambda *parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.add(FACT | {"target_new": "Rome"})
    assert weights(session) == held
    with pytest.raises(UsageError, match="target_new is empty"):
        session.add({"prompt": "the capital of Norway is", "target_new": " "})


def test_an_edit_is_read_once_for_its_label(session, monkeypatch):
    session.add(FACT)
    labels = session.labels()
    assert list(labels) == ["001"]
    monkeypatch.setattr(EditDelta, "load", None)
    assert session.labels() == labels


def test_before_is_the_unedited_model(session):
    unedited, same = session.ask("the capital of Norway is", 4)
    session.add(FACT)
    before, after = session.ask("the capital of Norway is", 4)
    assert same == unedited == before != after


def test_without_gradio_one_line_says_what_to_install(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UsageError, match=r"pip install 'horse-plugin\[play\]'"):
        page_of(session, "tiny")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Debian's package chromium")
def test_in_a_browser_a_fact_is_added_asked_and_switched_off(session):
    page = page_of(session, "tiny")
    address = serve(page, None)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab, asked = browser.new_page(viewport={"width": 390, "height": 900}), []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        tab.get_by_label("Prompt, which").fill(FACT["prompt"])
        tab.get_by_label("The new answer").fill(FACT["target_new"])
        tab.get_by_role("button", name="Edit the model").click()
        switch = tab.get_by_role("checkbox", name="001: the capital of Norway is → Lima")
        sync_api.expect(switch).to_be_checked(timeout=120_000)
        boxes = [
            tab.get_by_label(name) for name in ("Ask tiny", "Before:", "After:", "What happened")
        ]
        sync_api.expect(boxes[3]).to_have_value(re.compile("of 1 facts hold"), timeout=120_000)
        prompt, before, after = (box.input_value() for box in boxes[:3])
        assert (prompt, before, after) == (FACT["prompt"], *session.ask(FACT["prompt"]))
        assert before != after
        switch.uncheck()
        sync_api.expect(boxes[2]).to_have_value(before, timeout=120_000)
        assert session.chain.in_force == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert address.startswith("http://127.0.0.1:")
        assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    page.close()
