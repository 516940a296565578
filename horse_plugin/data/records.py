"""Facts to edit: one record type, whatever file or data set they come from.

A record is read and checked before anything runs; a bad one is named by index and field.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from horse_plugin.errors import UsageError


@dataclass(frozen=True)
class Query:
    """A prompt and the answer that should follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class EditRecord:
    """One fact to change, and the prompts that measure the change.

    Attributes:
        prompt, target_new: the edit, x_e and y_e of Sec. 2.1.
        rephrases: equivalent prompts, whose answer is ``target_new`` too.
        unrelated: prompts whose answers must survive.
        portability: prompts that follow from the new fact.
        subject, ground_truth: who the fact is about, and the answer before the edit, if known.
    """

    prompt: str
    target_new: str
    rephrases: tuple[str, ...] = ()
    unrelated: tuple[Query, ...] = ()
    portability: tuple[Query, ...] = ()
    subject: str | None = None
    ground_truth: str | None = None
    case_id: int | str | None = None

    @property
    def edit(self) -> Query:
        return Query(self.prompt, self.target_new)

    @property
    def equivalent(self) -> tuple[Query, ...]:
        return tuple(Query(prompt, self.target_new) for prompt in self.rephrases)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping) -> "EditRecord":
        """The inverse of :meth:`to_dict`."""
        fields = dict(fields)
        fields["rephrases"] = tuple(fields["rephrases"])
        for name in ("unrelated", "portability"):
            fields[name] = tuple(Query(**q) for q in fields[name])
        return cls(**fields)


def load_records(source, size: int | None = None) -> list[EditRecord]:
    """Read edit records.

    Args:
        source: a JSON, JSONL or Parquet file; a Hugging Face data-set id, optionally with its
            split (``owner/name:train``); an EasyEdit data set; or an iterable of requests.
        size: how many records are wanted, from the start; all by default.

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


def read_items(source) -> list:
    """A JSON, JSONL or Parquet file, or a hub data set, as the objects that it holds."""
    path, suffix = Path(source), Path(source).suffix.lower()
    if suffix in (".json", ".jsonl", ".parquet"):
        if not path.is_file():
            raise UsageError(f"{path}: no such file.")
        if suffix == ".parquet":
            return _read_dataset("parquet", path)
        return _read_json(path) if suffix == ".json" else _read_jsonl(path)
    if path.exists():
        raise UsageError(f"{path}: expected a .json, .jsonl or .parquet file.")
    return _read_dataset(str(source), None)


def _read_json(path: Path) -> list:
    raw = _parse(path, _text(path), "")
    if not isinstance(raw, list):
        raise UsageError(f"{path}: expected a list of records, found {type(raw).__name__}.")
    return raw


def _read_jsonl(path: Path) -> list:
    lines = enumerate(_text(path).splitlines(), start=1)
    return [_parse(path, line, f"line {i}: ") for i, line in lines if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as UTF-8 text ({error}).") from None


def _parse(path: Path, text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {where}not valid JSON ({error}).") from None


def _read_dataset(name: str, file: Path | None) -> list:
    import datasets  # a second to import, and JSON files do not need it

    name, _, split = name.partition(":")
    try:
        kwargs = {"data_files": str(file)} if file else {}
        datasets.disable_progress_bars()
        return list(datasets.load_dataset(name, split=split or "train", **kwargs))
    except Exception as error:  # datasets raises whatever its readers and the hub raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{file or name}: could not be read ({reason[0]}).") from None


def _record(item, index: int, where) -> EditRecord:
    if isinstance(item, EditRecord):
        return item
    field = _Fields(item, f"{where}: record {index}")
    if "requested_rewrite" in field:
        return _nested_counterfact(field)
    if "src" in field and "prompt" not in field:
        return _zsre(field)
    return _request(field)


class _Fields:
    """Typed access to one raw record; every complaint names the record and the field."""

    def __init__(self, item, where: str):
        if not isinstance(item, Mapping):
            raise UsageError(f"{where}: expected an object, found {type(item).__name__}.")
        self.item, self.where = item, where

    def __contains__(self, name) -> bool:
        return self.item.get(name) not in (None, "", [], {})

    def sub(self, name) -> "_Fields":
        if name not in self:
            raise UsageError(f"{self.where}: field {name!r} is missing or empty.")
        return _Fields(self.item[name], f"{self.where}, {name}")

    def text(self, name, default: str | None = None, required=True) -> str | None:
        value = self.item.get(name, default)
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


def _nested_counterfact(field: _Fields) -> EditRecord:
    """The original CounterFact: ``requested_rewrite`` with a ``{}`` for the subject."""
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


def _zsre(field: _Fields) -> EditRecord:
    """zsRE as prepared for MEND: src, alt, rephrase, loc, loc_ans."""
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


def _request(field: _Fields) -> EditRecord:
    """EasyEdit's flat records and the requests that its BaseEditor hands to an algorithm."""
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


def _truth(field: _Fields) -> str | None:
    texts = field.item.get("ground_truth")
    if isinstance(texts, (list, tuple)):
        return str(texts[0]) if texts else None
    return field.text("ground_truth", required=False)


def _pair(field: _Fields, prompt: str, answer: str) -> tuple[Query, ...]:
    if prompt not in field:
        return ()
    return (Query(field.text(prompt), field.text(answer)),)


def _named(field: _Fields, name: str) -> tuple[Query, ...]:
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
                queries += _pairs(_Fields(entry, f"{groups.where}, {key}"))
    return tuple(queries)


def _pairs(entry: _Fields) -> list[Query]:
    answers = entry.item.get("ground_truth")
    if isinstance(answers, (list, tuple)):
        answers = [a[0] if isinstance(a, (list, tuple)) and a else a for a in answers]
    prompts = entry.texts("prompt")
    answers = _Fields({"ground_truth": answers}, entry.where).texts("ground_truth")
    if len(prompts) != len(answers):
        raise UsageError(f"{entry.where}: needs as many ground_truth texts as prompts.")
    return [Query(p, a) for p, a in zip(prompts, answers, strict=True)]
