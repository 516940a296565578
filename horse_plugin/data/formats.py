"""How data sets write a fact down: one function a format, each from a raw object to a record.

To add a format, decorate a function with :func:`data_format`. Formats are asked whether a raw
object is theirs from the last registered to the first, and the first one registered, EasyEdit's
flat requests, takes what no other does. A record is read and checked before anything runs; a bad
one is named by its index and field.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from horse_plugin.data.records import EditRecord, Query
from horse_plugin.data.sources import read_items
from horse_plugin.errors import UsageError


@dataclass(frozen=True)
class DataFormat:
    """Whether a raw object is of this format, and how to read a record from it."""

    recognises: Callable[["Fields"], bool]
    read: Callable[["Fields"], EditRecord]


FORMATS: dict[str, DataFormat] = {}


def data_format(name: str, recognises: Callable[["Fields"], bool]):
    """Register the decorated function as the reader of a format.

    Args:
        name: of the format.
        recognises: tells from a raw object's fields whether it is of this format.
    """

    def register(read: Callable[["Fields"], EditRecord]):
        FORMATS[name] = DataFormat(recognises, read)
        return read

    return register


def load_records(source, size: int | None = None) -> list[EditRecord]:
    """Return the edit records of a source.

    Args:
        source: a JSON, JSONL or Parquet file; a Hugging Face data-set id, optionally with its
            split (``owner/name:train``); an EasyEdit data set; or an iterable of requests.
        size: the number of records wanted, from the start; None is all.

    Raises:
        UsageError: the source is missing, malformed, empty or shorter than ``size``.
    """
    where = source if isinstance(source, (str, Path)) else type(source).__name__
    if size is not None and size < 1:
        raise UsageError(f"{where}: at least one record must be asked for, not {size}.")
    raw = read_items(source) if isinstance(source, (str, Path)) else _items(source)
    if not raw:
        raise UsageError(f"{where}: no records in it.")
    records = [_record(item, i, where) for i, item in enumerate(raw) if not _has_no_edit(item)]
    if len(records) < len(raw):
        warnings.warn(
            f"{where}: {len(raw) - len(records)} zsRE records without an answer (alt) left out",
            stacklevel=2,
        )
    if not records or (size or 0) > len(records):
        raise UsageError(f"{where}: {size or 1} records asked for, but it holds {len(records)}.")
    return records[:size]


def _has_no_edit(item) -> bool:
    """zsRE's own files hold records with an empty ``alt``; EasyEdit's loader drops them too."""
    return isinstance(item, Mapping) and "src" in item and item.get("alt") == ""


def _items(source) -> list:
    if isinstance(source, Mapping):
        raise UsageError("records: expected a list of requests, found one object.")
    try:
        return list(source)
    except TypeError:
        raise UsageError(
            f"records: expected a list of requests, found {type(source).__name__}."
        ) from None


def _record(item, index: int, where) -> EditRecord:
    if isinstance(item, EditRecord):
        return item
    field = Fields(item, f"{where}: record {index}")
    chosen = next(f for f in reversed(FORMATS.values()) if f.recognises(field))
    return chosen.read(field)


class Fields:
    """Typed access to one raw record; every complaint names the record and the field."""

    def __init__(self, item, where: str):
        if not isinstance(item, Mapping):
            raise UsageError(f"{where}: expected an object, found {type(item).__name__}.")
        self.item, self.where = item, where

    def __contains__(self, name) -> bool:
        return self.item.get(name) not in (None, "", [], {})

    def sub(self, name) -> "Fields":
        if name not in self:
            raise UsageError(f"{self.where}: field {name!r} is missing or empty.")
        return Fields(self.item[name], f"{self.where}, {name}")

    def text(self, name, required=True) -> str | None:
        value = self.item.get(name)
        if isinstance(value, Mapping):  # {"str": ..., "id": ...} in the original CounterFact
            value = value.get("str")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
            value = str(value)
        if value is None or value == "":
            if required:
                raise UsageError(f"{self.where}: field {name!r} is missing or empty.")
            return None
        if not isinstance(value, str):
            raise UsageError(
                f"{self.where}: field {name!r} must be text, found {type(value).__name__}."
            )
        return self._checked(name, value)

    def texts(self, name) -> tuple[str, ...]:
        """A string or a list of strings; absent is empty."""
        value = self.item.get(name)
        if value is None or value == "":
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)):
            raise UsageError(f"{self.where}: field {name!r} must be text or a list of texts.")
        if not all(isinstance(v, str) for v in values):
            raise UsageError(f"{self.where}: field {name!r} holds something that is not text.")
        return tuple(self._checked(name, v) for v in values)

    def _checked(self, name, text: str) -> str:
        if not text.strip():
            raise UsageError(f"{self.where}: field {name!r} is blank.")
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UsageError(f"{self.where}: field {name!r} holds half a Unicode character.")
        return text


@data_format("request", lambda field: True)
def flat_request(field: Fields) -> EditRecord:
    """Read EasyEdit's flat records, and the requests that its BaseEditor hands to an algorithm."""
    unrelated = _pair(field, "locality_prompt", "locality_ground_truth") + _named(field, "locality")
    return EditRecord(
        prompt=field.text("prompt"),
        target_new=field.text("target_new"),
        rephrases=field.texts("rephrase_prompt"),
        unrelated=unrelated,
        portability=_named(field, "portability"),
        subject=field.text("subject", required=False),
        ground_truth=_truth(field),
        case_id=field.item.get("case_id"),
    )


@data_format("zsre", lambda field: "src" in field and "prompt" not in field)
def zsre(field: Fields) -> EditRecord:
    """Read zsRE as prepared for MEND: src, alt, rephrase, loc, loc_ans."""
    answers = field.texts("answers")
    return EditRecord(
        prompt=field.text("src"),
        target_new=field.text("alt"),
        rephrases=field.texts("rephrase"),
        unrelated=_pair(field, "loc", "loc_ans"),
        subject=field.text("subject", required=False),
        ground_truth=answers[0] if answers else field.text("pred", required=False),
        case_id=field.item.get("case_id"),
    )


@data_format("counterfact", lambda field: "requested_rewrite" in field)
def nested_counterfact(field: Fields) -> EditRecord:
    """Read the original CounterFact: ``requested_rewrite`` with a ``{}`` for the subject."""
    rewrite = field.sub("requested_rewrite")
    subject, template = rewrite.text("subject"), rewrite.text("prompt")
    truth = rewrite.text("target_true", required=False)
    neighbours = field.texts("neighborhood_prompts")
    if neighbours and truth is None:
        raise UsageError(f"{rewrite.where}: field 'target_true' is missing or empty.")
    return EditRecord(
        prompt=template.replace("{}", subject),
        target_new=rewrite.text("target_new"),
        rephrases=field.texts("paraphrase_prompts"),
        unrelated=tuple(Query(prompt, truth) for prompt in neighbours),
        subject=subject,
        ground_truth=truth,
        case_id=field.item.get("case_id"),
    )


def _truth(field: Fields) -> str | None:
    texts = field.item.get("ground_truth")
    if isinstance(texts, (list, tuple)):
        return str(texts[0]) if texts else None
    return field.text("ground_truth", required=False)


def _pair(field: Fields, prompt: str, answer: str) -> tuple[Query, ...]:
    if prompt not in field:
        return ()
    return (Query(field.text(prompt), field.text(answer)),)


def _named(field: Fields, name: str) -> tuple[Query, ...]:
    """EasyEdit's ``locality: {"neighborhood": {"prompt": ..., "ground_truth": ...}}``.

    A group may also be a list of such entries, an answer a list of its spellings (KnowEdit), of
    which the first counts; an empty group is none.
    """
    if name not in field:
        return ()
    queries, groups = [], field.sub(name)
    for key, group in groups.item.items():
        for entry in group if isinstance(group, list) else [group]:
            if entry:
                queries += _pairs(Fields(entry, f"{groups.where}, {key}"))
    return tuple(queries)


def _pairs(entry: Fields) -> list[Query]:
    answers = entry.item.get("ground_truth")
    if isinstance(answers, (list, tuple)):
        answers = [a[0] if isinstance(a, (list, tuple)) and a else a for a in answers]
    prompts = entry.texts("prompt")
    answers = Fields({"ground_truth": answers}, entry.where).texts("ground_truth")
    if len(prompts) != len(answers):
        raise UsageError(f"{entry.where}: needs as many ground_truth texts as prompts.")
    return [Query(p, a) for p, a in zip(prompts, answers, strict=True)]
