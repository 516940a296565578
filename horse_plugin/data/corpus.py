"""Ordinary text: from a file, from records, or from a data set of the hub."""

import json
from collections.abc import Iterable
from pathlib import Path

from horse_plugin.assets import CALIBRATION, HELDOUT
from horse_plugin.data.formats import load_records
from horse_plugin.data.records import EditRecord
from horse_plugin.data.seam import join
from horse_plugin.data.sources import read_items
from horse_plugin.errors import UsageError, first_line

N_CHOOSE = 10  # pieces of the shipped text, two of each kind, by which settings are chosen


def shipped_pieces(part: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each piece of one part of the package's ordinary text.

    The kinds take turns, so that any first pieces hold all of them.

    Args:
        part: ``preserve`` for what edits may leave alone and training may read; ``choose`` for what
            validation and ``max_drift`` measure; ``heldout`` for figures, which nothing else reads.
    """
    file = HELDOUT if part == "heldout" else CALIBRATION
    pieces = json.loads(file.read_text(encoding="utf-8"))
    seen: dict[str, int] = {}
    for piece in pieces:
        piece["turn"] = seen[piece["kind"]] = seen.get(piece["kind"], 0) + 1
    found = [(p["kind"], p["text"]) for p in sorted(pieces, key=lambda piece: piece["turn"])]
    return {"heldout": found, "preserve": found[N_CHOOSE:], "choose": found[:N_CHOOSE]}[part]


def texts_of(source, size: int) -> list[str]:
    """Return the first ``size`` texts of a source.

    Args:
        source: ``shipped`` for the package's own text, or what :func:`read_corpus` takes.
    """
    if source == "shipped":
        return [text for _, text in shipped_pieces("preserve")][:size]
    return read_corpus(source, size)


def read_corpus(source, size: int) -> list[str]:
    """Return the first ``size`` texts of a source, or all if it holds fewer.

    Args:
        source: edit records, or their file; a JSON, JSONL or Parquet file of objects with a
            ``text``; any other file of text, whose lines are the texts; or a hub data set with a
            ``text`` column, optionally with its configuration (``owner/name:configuration``).

    Raises:
        UsageError: no such source, or no text in it.
    """
    if not isinstance(source, (str, Path)):
        texts = _of_records(source)
    elif (path := Path(source).expanduser()).suffix.lower() in (".json", ".jsonl", ".parquet"):
        items = read_items(path)
        plain = [i["text"] for i in items if isinstance(i, dict) and isinstance(i.get("text"), str)]
        texts = plain or _of_records(load_records(path))
    elif path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            texts = [line.strip() for line in file]
        if any("\0" in text for text in texts):
            raise UsageError(f"{path}: is no text, as its bytes say.")
    elif path.exists():
        raise UsageError(f"{path}: expected a file of text.")
    else:
        texts = _hub_texts(str(source), size)
    texts = [t for t in texts if t.strip()][:size]
    if not texts:
        raise UsageError(f"{source}: no text in it.")
    return texts


def _of_records(records: Iterable[EditRecord]) -> list[str]:
    """Return the records' true statements, without the edited ones."""
    texts = []
    for r in records:
        texts += [join(q.prompt, q.answer) for q in r.unrelated]
        texts += [join(p, r.ground_truth or "").strip() for p in (r.prompt, *r.rephrases)]
    return texts


def _hub_texts(name: str, size: int) -> list[str]:
    import datasets

    name, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        return [row["text"] for row in rows.take(size)]
    except Exception as error:  # whatever the hub and its formats raise
        raise UsageError(
            f"{name!r}: no such file of text, nor a data set of the hub ({first_line(error)})."
        ) from None
