"""The shipped ordinary text: five kinds, of the stated sizes, and nothing in both files."""

import json
from collections import Counter

import pytest

from horse_plugin.assets import CALIBRATION, HELDOUT, HELDOUT_TEXT, TEXT

KINDS = ["prose", "questions", "chat", "code", "languages"]
WINDOW = 40  # characters
# Characters of a kind, and of a piece; a token of another language is often less than two.
KIND = {HELDOUT: (900, 3500), CALIBRATION: (6000, 20_000)}
PIECE = {HELDOUT: (30, 2000), CALIBRATION: (70, 1500)}


def rows(path):
    return json.loads(path.read_text(encoding="utf-8"))


def windows(path):
    return {
        r["text"][i : i + WINDOW] for r in rows(path) for i in range(len(r["text"]) - WINDOW + 1)
    }


@pytest.fixture(params=[HELDOUT, CALIBRATION], ids=lambda path: path.stem)
def path(request):
    return request.param


def test_every_line_is_a_kind_and_a_text(path):
    first, *lines, last = path.read_text(encoding="utf-8").splitlines()
    assert (first, last) == ("[", "]")
    assert [json.loads(line.removesuffix(",")) for line in lines] == rows(path)
    for row in rows(path):
        assert list(row) == ["kind", "text"] and row["text"].strip()
        assert "\ufffd" not in row["text"]


def test_the_kinds_are_in_order_and_their_sizes_within_bounds(path):
    assert list(dict.fromkeys(row["kind"] for row in rows(path))) == KINDS
    sizes = Counter()
    for row in rows(path):
        assert PIECE[path][0] <= len(row["text"]) <= PIECE[path][1], row
        sizes[row["kind"]] += len(row["text"])
    for kind, size in sizes.items():
        assert KIND[path][0] <= size <= KIND[path][1], kind


def test_no_text_is_twice_in_a_file(path):
    texts = [row["text"] for row in rows(path)]
    assert len(set(texts)) == len(texts)


def test_the_files_share_no_window_of_text():
    assert not windows(HELDOUT) & windows(CALIBRATION)


def test_the_heldout_prose_begins_with_the_text_of_earlier_figures():
    assert rows(HELDOUT)[0]["text"] == HELDOUT_TEXT.read_text(encoding="utf-8")


def test_the_languages_have_their_scripts(path):
    text = "".join(row["text"] for row in rows(path) if row["kind"] == "languages")
    for first, last in ["\u0600\u06ff", "\u0400\u04ff", "\u3040\u30ff", "\u4e00\u9fff"]:
        assert any(first <= character <= last for character in text), first
    assert all(word in text for word in ["Artikel", "Article", "Artículo"])


def test_the_licences_of_the_sources_are_there():
    said = (TEXT / "LICENCES.txt").read_text(encoding="utf-8")
    assert all(name in said for name in ["Pallets", "NetworkX", "OpenJS", "Apache License"])
