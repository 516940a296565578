"""How data sets write a fact down: one function a format, each from a raw object to a record.

To add a format, decorate a function with :func:`data_format`. Formats are asked whether a raw
object is theirs from the last registered to the first, and the first one registered, flat records,
takes what no other does. A record is read and checked before anything runs; a bad one is named by
its index and field.
"""

import json
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from horse_plugin.data.records import EditRecord, Query
from horse_plugin.data.sources import read_items
from horse_plugin.errors import UsageError, counted, first_line


@dataclass(frozen=True)
class DataFormat:
    """Whether a raw object is of this format, and how to read a record from it."""

    recognises: Callable[["Fields"], bool]
    read: Callable[["Fields"], EditRecord | list[EditRecord]]


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
    records, notes = [], Counter()
    for i, item in enumerate(raw):
        if _has_no_edit(item):
            notes["zsRE record", "without an answer (alt) left out"] += 1
        else:
            found = _record(item, i, where, notes)
            records += found if isinstance(found, list) else [found]
    for (what, why), n in notes.items():
        if n:
            warnings.warn(f"{where}: {counted(n, what)} {why}", stacklevel=2)
    _warn_of_unread(raw, where)
    if not records or (size or 0) > len(records):
        wanted = counted(size or 1, "record")
        raise UsageError(f"{where}: {wanted} asked for, but it holds {len(records)}.")
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


def _warn_of_unread(raw: list, where):
    """Name the fields that nothing reads, in one warning."""
    ours = FORMATS["request"], FORMATS["counterfact"]
    unread = Counter()
    for item in raw:
        names = item.keys() - READ - IGNORED if isinstance(item, Mapping) else ()
        if names and _format_of(Fields(item, "")) in ours:
            unread.update(map(str, names))
    if unread:
        named = ", ".join(f"{name} ({n})" for name, n in sorted(unread.items())[:8])
        warnings.warn(
            f"{where}: fields that nothing reads, and in how many records: {named}", stacklevel=3
        )


def _format_of(field: "Fields") -> DataFormat:
    return next(f for f in reversed(FORMATS.values()) if f.recognises(field))


def _record(item, index: int, where, notes: Counter) -> EditRecord | list[EditRecord]:
    if isinstance(item, EditRecord):
        return _checked(item, f"{where}: record {index}")
    field = Fields(item, f"{where}: record {index}", notes)
    return _format_of(field).read(field)


def _checked(record: EditRecord, where: str) -> EditRecord:
    """Return the record, if it can be written to a file, and read from there."""
    if isinstance(record.rephrases, str):
        raise UsageError(f"{where}: cannot be saved: its rephrases are one text, not a list.")
    if not isinstance(record.case_id, (int, str, type(None))):
        raise UsageError(f"{where}: cannot be saved: its case_id is no whole number and no text.")
    try:
        json.dumps(record.to_dict(), ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: cannot be saved: {first_line(error)}.") from None
    return record


def _case_id(field: "Fields") -> int | str | None:
    value = field.item.get("case_id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if hasattr(value, "__index__"):  # numpy's whole numbers
        return operator.index(value)
    return Fields({"case_id": str(value)}, field.where).text("case_id", required=False)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


class Fields:
    """Typed access to one raw record; every complaint names the record and the field."""

    def __init__(self, item, where: str, notes: Counter | None = None):
        if not isinstance(item, Mapping):
            raise UsageError(f"{where}: expected an object, found {type(item).__name__}.")
        self.item, self.where = item, where
        self.notes = Counter() if notes is None else notes  # (what, why) to warn of → how many

    def first(self, names: Sequence[str]) -> str:
        """Return the first of these names that the record has a value for; else the first."""
        return next((name for name in names if name in self), names[0])

    def accepted(self, name) -> list[tuple[str, ...]]:
        """Return the accepted answers in a field: text, a list of texts, or a list of those."""
        value = self.item.get(name)
        values = value if isinstance(value, (list, tuple)) else [value]
        values = [str(v) if _is_number(v) else v for v in values]
        return [Fields({name: v}, self.where).texts(name) for v in values]

    def __contains__(self, name) -> bool:
        return self.item.get(name) not in (None, "", [], {})

    def sub(self, name) -> "Fields":
        if name not in self:
            raise UsageError(f"{self.where}: field {name!r} is missing or empty.")
        return Fields(self.item[name], f"{self.where}, {name}", self.notes)

    def text(self, name, required=True) -> str | None:
        value = self.item.get(name)
        if isinstance(value, Mapping):  # {"str": ..., "id": ...} in the original CounterFact
            value = value.get("str")
        if _is_number(value):
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
        if isinstance(value, Mapping):
            value = value.get("str", value)
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


SLOT = re.compile(r"\{\s*(?:subject|0)?\s*\}")  # where a template has its subject
# What a record's fields are called in EasyEdit's data sets and scripts: zsRE, CounterFact,
# KnowEdit, CKnowEdit, WikiBigEdit, and the requests of its BaseEditor. The first that a record has
# counts; of rephrasings and of pairs all do.
PROMPT = ("prompt", "src", "update", "text")
ANSWER = ("target_new", "alt", "ans", "labels")
SUBJECT = ("subject", "concept")
BEFORE = ("ground_truth", "target_old", "answers", "target_true", "pred")
REPHRASINGS = (
    "rephrase_prompt",
    "rephrase_prompts",
    "rephrase",
    "rephrases",
    "paraphrase_prompts",
    "question",
)
# What they are called in `requested_rewrite`; the second are of AKEW's WikiUpdate.
NESTED_ANSWER = ("target_new", "answer_new")
NESTED_BEFORE = ("target_true", "answer_true")
UNRELATED = {
    "locality_prompt": ("locality_ground_truth", "locality_ans"),
    "loc": ("loc_ans",),
    "neighborhood_prompts": BEFORE,
}
PORTABILITY = {
    "mhop": ("mhop_ans",),
    "portability_hop": ("portability_hop_ans",),
    "portability_prompt": ("portability_ground_truth",),
    "personas": ANSWER,
    "portability_personas": ANSWER,
    "questions": ("new_answer",),
}
# In place of a group of objects, where it is text, with its answers beside it.
UNRELATED_TEXTS = {"locality": ("locality_ans",)}
UNRELATED_GROUPS = ("locality", "unrelated", "locality_rs", "locality_f")
PORTABILITY_GROUPS = ("portability", "portability_r", "portability_s", "portability_l")
# Nobody misses these: names and notes, and what serves figures that HORSE does not have.
IGNORED = frozenset(
    """case_id id cond tag time date pararel_idx relation_id attribute_prompts generation_prompts
    orig ent answer_alias single_hops new_single_hops""".split()
)
ALIASES = {"new_answer": "new_answer_alias"}  # MQuAKE's other names for an answer
READ = {
    "requested_rewrite",
    *ALIASES.values(),
    *(PROMPT + ANSWER + SUBJECT + BEFORE + REPHRASINGS + UNRELATED_GROUPS + PORTABILITY_GROUPS),
    *(name for pairs in (UNRELATED, PORTABILITY) for k, v in pairs.items() for name in (k, *v)),
}


@data_format("request", lambda field: True)
def flat_request(field: Fields) -> EditRecord:
    """Read flat records, by any of the names above, and EasyEdit's requests."""
    subject = field.text(field.first(SUBJECT), required=False)
    return EditRecord(
        prompt=_filled(field, field.text(field.first(PROMPT)), subject),
        target_new=field.text(field.first(ANSWER)),
        rephrases=_rephrasings(field, subject),
        unrelated=_about(field, _unrelated(field), subject),
        portability=_about(field, _portability(field), subject),
        subject=subject,
        ground_truth=_truth(field),
        case_id=_case_id(field),
    )


@data_format("counterfact", lambda field: "requested_rewrite" in field)
def nested_counterfact(field: Fields) -> EditRecord | list[EditRecord]:
    """Read CounterFact, MQuAKE and AKEW: ``requested_rewrite`` has a ``{}`` for the subject.

    MQuAKE has a list of them, and questions that follow from all of these; they go with the last.
    """
    rewrites = field.item["requested_rewrite"]
    several = isinstance(rewrites, (list, tuple))
    records = []
    for i, item in enumerate(rewrites if several else [rewrites]):
        where = f"{field.where}, requested_rewrite" + (f" {i}" if several else "")
        rewrite = Fields(item, where)
        subject, template = rewrite.text("subject"), rewrite.text("prompt")
        last = i == len(rewrites) - 1 if several else True
        truth = rewrite.text(rewrite.first(NESTED_BEFORE), required=False)
        neighbours = field.texts("neighborhood_prompts") if last else ()
        if neighbours and truth is None:
            raise UsageError(f"{rewrite.where}: field 'target_true' is missing or empty.")
        records.append(
            EditRecord(
                prompt=subject.join(SLOT.split(template)),
                target_new=rewrite.text(rewrite.first(NESTED_ANSWER)),
                rephrases=_rephrasings(field, subject) + _rephrasings(rewrite, subject),
                unrelated=tuple(Query(prompt, truth) for prompt in neighbours)
                + (_about(field, _unrelated(field, nested=True), subject) if last else ()),
                portability=_about(field, _portability(field), subject) if last else (),
                subject=subject,
                ground_truth=truth,
                case_id=_case_id(field),
            )
        )
    return records if several else records[0]


# RippleEdits' criteria: answers that must survive the edit, and those that follow from it.
RIPPLES_KEPT = ("Relation_Specificity", "Forgetfulness")
RIPPLES = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)
# Its facts are sentences. What stands before the answer ends with one of these in all of them.
SENTENCE = re.compile(
    r"(.+ (?:is(?! followed by )|is followed by|are|follows)) (.+?)\.?", re.DOTALL
)


@data_format("rippleedits", lambda field: "edit" in field and "example_type" in field)
def ripple_edit(field: Fields) -> EditRecord:
    """Read RippleEdits: a fact as a sentence, and queries by criterion.

    Each query counts for itself; the conditions under which its authors count one are left out.
    """
    edit = field.sub("edit")
    prompt, answer = _sentence(edit)
    before = edit.sub("previous_fact") if "previous_fact" in edit else None
    return EditRecord(
        prompt,
        answer,
        unrelated=_ripples(field, RIPPLES_KEPT),
        portability=_ripples(field, RIPPLES),
        ground_truth=_sentence(before)[1] if before else None,
    )


def _sentence(fact: Fields) -> tuple[str, str]:
    """Return a fact's prompt and answer."""
    parts = SENTENCE.fullmatch(fact.text("prompt"))
    if not parts:
        raise UsageError(f"{fact.where}: field 'prompt' is no sentence such as 'X of Y is Z.'.")
    return parts[1], parts[2]


def _ripples(field: Fields, criteria: Sequence[str]) -> tuple[Query, ...]:
    """Return the queries of these criteria that have an answer, each once."""
    queries = {}
    for criterion in criteria:
        for i, test in enumerate(_objects(field, criterion)):
            test = Fields(test, f"{field.where}, {criterion} {i}")
            for asked in _objects(test, "test_queries"):
                query = Fields(asked, test.where)
                given = [Fields(a, test.where) for a in _objects(query, "answers")]
                given = [text for a in given for n in ("value", "aliases") for text in a.texts(n)]
                if given:
                    queries[query.text("prompt")] = tuple(dict.fromkeys(given))
    return tuple(Query(prompt, given[0], given[1:]) for prompt, given in queries.items())


def _objects(field: Fields, name: str) -> list:
    value = field.item.get(name) or []
    if not isinstance(value, list):
        raise UsageError(f"{field.where}: field {name!r} must be a list.")
    return value


def _filled(field: Fields, prompt: str, subject: str | None) -> str:
    """Return a prompt with its subject in the place of ``{}``, as ROME's and MEMIT's have it.

    A prompt that names its subject has its ``{}`` for itself; a warning counts such prompts.
    """
    if not SLOT.search(prompt):
        return prompt
    if subject and subject in SLOT.sub("", prompt):
        field.notes["prompt", "with {} beside the name of the subject; the {} stay"] += 1
        return prompt
    if not subject:
        raise UsageError(
            f"{field.where}: prompt {prompt!r} has {{}} for its subject, but no field 'subject' "
            "says which. If {} is part of the text, name a subject that the prompt holds."
        )
    return subject.join(SLOT.split(prompt))


def _about(field: Fields, queries: Sequence[Query], subject: str | None) -> tuple[Query, ...]:
    """Return queries with the subject in the place of ``{}``."""
    return tuple(replace(q, prompt=_filled(field, q.prompt, subject)) for q in queries)


def _truth(field: Fields) -> str | None:
    for name in BEFORE:
        value = field.item.get(name)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
            value = value[0] if isinstance(value, (list, tuple)) and value else value
        if value not in (None, "", [], {}):
            return Fields({name: value}, field.where).text(name)
    return None


def _rephrasings(field: Fields, subject: str | None) -> tuple[str, ...]:
    texts = [text for name in REPHRASINGS for text in field.texts(name)]
    return tuple(dict.fromkeys(_filled(field, text, subject) for text in texts))


def _unrelated(field: Fields, nested: bool = False) -> tuple[Query, ...]:
    """Return the unrelated queries; of a nested record without its neighbours."""
    pairs = {k: v for k, v in UNRELATED.items() if not (nested and k == "neighborhood_prompts")}
    texts = {k: v for k, v in UNRELATED_TEXTS.items() if _are_texts(field.item.get(k))}
    groups = [name for name in UNRELATED_GROUPS if name not in texts]
    return _beside(field, pairs | texts) + _groups(field, groups)


def _are_texts(value) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(values) and all(isinstance(v, str) and v for v in values)


def _portability(field: Fields) -> tuple[Query, ...]:
    return _beside(field, PORTABILITY) + _groups(field, PORTABILITY_GROUPS)


def _beside(field: Fields, pairs: Mapping[str, Sequence[str]]) -> tuple[Query, ...]:
    """Return the queries whose prompts and answers are fields of their own."""
    queries = []
    for name, answers in pairs.items():
        if name in field:
            answer = field.first(answers)
            prompts, given = field.texts(name), field.accepted(answer)
            one_to_all = not isinstance(field.item.get(answer), (list, tuple))
            if one_to_all or len(prompts) == 1 or answer in (*BEFORE, "new_answer"):
                aliases = field.texts(ALIASES[answer]) if answer in ALIASES else ()
                given = [sum(given, ()) + aliases] * len(prompts)
            queries += _queries(field, prompts, given, answer)
    return tuple(queries)


def _groups(field: Fields, names: Sequence[str]) -> tuple[Query, ...]:
    """EasyEdit's ``locality: {"neighborhood": {"prompt": ..., "ground_truth": ...}}``.

    A group may also be a list of such entries, and so may the whole field. zsRE's portability has
    a ``New Question`` and a ``New Answer``. Prompts without an answer are left out.
    """
    queries = []
    for name in names:
        if name not in field:
            continue
        groups = field.item[name]
        if isinstance(groups, Mapping) and "New Question" in groups:
            group = field.sub(name)
            queries.append(Query(group.text("New Question"), group.text("New Answer")))
            continue
        groups = groups if isinstance(groups, Mapping) else {"": groups}
        for key, group in groups.items():
            for entry in group if isinstance(group, (list, tuple)) else [group]:
                if entry:
                    where = f"{field.where}, {name}" + (f", {key}" if key else "")
                    queries += _pairs(Fields(entry, where, field.notes))
    return tuple(queries)


def _pairs(entry: Fields) -> list[Query]:
    answer = entry.first(("ground_truth", "answer", "target", "answers"))
    prompts, accepted = entry.texts("prompt"), entry.accepted(answer)
    if len(prompts) == 1:  # KnowEdit lists all the answers that it accepts, and so do we
        accepted = [sum(accepted, ()) + entry.texts("accepted")]
    return _queries(entry, prompts, accepted, answer)


def _queries(field: Fields, prompts, accepted, name: str) -> list[Query]:
    """Return prompts with their accepted answers; those that have none are left out."""
    if name not in field.item:
        raise UsageError(f"{field.where}: field {name!r} is missing or empty.")
    if name not in field:
        accepted = [()] * len(prompts)
    if len(prompts) != len(accepted):
        raise UsageError(f"{field.where}: needs as many {name} texts as prompts.")
    field.notes["prompt", "without an answer left out"] += sum(not a for a in accepted)
    return [Query(p, a[0], tuple(a[1:])) for p, a in zip(prompts, accepted, strict=True) if a]
