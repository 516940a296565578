"""Ordinary text: shipped, from records, or from files."""

import datasets
import pytest

from horse_plugin import UsageError
from horse_plugin.data.corpus import read_corpus, shipped_pieces, texts_of
from tests import tiny


def test_a_corpus_is_any_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\nthree\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_corpus(tmp_path / "a.txt", 2) == ["one", "two"]
    assert read_corpus(tmp_path / "b.jsonl", 9) == ["one", "two"]
    texts = read_corpus(tiny.records(1), 9)
    assert len(texts) == 3
    assert not [t for t in texts if tiny.records(1)[0].target_new in t.split(" is ")[-1:]]
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(UsageError, match="no text in it"):
        read_corpus(tmp_path / "c.txt", 9)


def test_shipped_text_begins_with_all_kinds_and_is_not_the_held_out_one(shipped_text):
    parts = {part: dict(shipped_pieces(part)) for part in ("preserve", "choose", "heldout")}
    assert all(len(kinds) == 5 for kinds in parts.values())
    texts = [t for part in parts for _, t in shipped_pieces(part)]
    assert len(texts) == len(set(texts))
    kept = [t for _, t in shipped_pieces("preserve")]
    assert texts_of("shipped", 5) == kept[:5]
    assert any("return" in t for t in kept[:5]) and any(ord(max(t)) > 0x400 for t in kept[:15])


def test_a_corpus_is_found_in_the_users_folder(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n")
    assert read_corpus("~/a.txt", 2) == ["one"]


def test_a_file_of_bytes_is_no_text_and_parquet_is_read(tmp_path):
    datasets.Dataset.from_dict({"text": ["one text", "another"]}).to_parquet(tmp_path / "c.parquet")
    assert read_corpus(tmp_path / "c.parquet", 9) == ["one text", "another"]
    (tmp_path / "c.parquet").rename(tmp_path / "c.txt")
    with pytest.raises(UsageError, match=r"c\.txt: is no text"):
        read_corpus(tmp_path / "c.txt", 9)
