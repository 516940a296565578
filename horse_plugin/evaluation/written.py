"""The answers that a model writes: exact match and contains, with and without a Q&A context.

Teacher-forced figures ask for each token after the right ones. These let the model write by itself,
greedily, and then look for the answer in its text.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from horse_plugin.data.prompts import KINDS
from horse_plugin.data.records import EditRecord, Query
from horse_plugin.data.seam import is_without_spaces
from horse_plugin.evaluation.generation import answers
from horse_plugin.evaluation.metrics import mean
from horse_plugin.evaluation.tables import Table, number
from horse_plugin.model.backbone import Backbone

# How the model is asked: the prompt as it stands, or as a question that wants a short answer.
CONTEXTS = {"plain": "{}", "qa": "Please answer the question briefly.\n\nQ: {}\nA:"}
N_TOKENS = 24  # of an answer that is looked at
STOPS = '.,;:!?)"”*。，、；：！？」』）'  # what may follow an answer that is given alone


@dataclass(frozen=True)
class Written:
    """One prompt and what the model wrote.

    Attributes:
        record: the index of its record.
        kind: ``edit``, ``rephrase``, ``unrelated`` or ``portability``.
        context: a name of :data:`CONTEXTS`.
        exact: whether the text begins with the answer, and a stop mark or nothing follows.
        contains: whether the answer is in the text as whole words.
        judged: whether a judge finds it right; None without one.
        accepted: other answers that are as good as ``wanted``.
    """

    record: int
    kind: str
    context: str
    prompt: str
    wanted: str
    text: str
    exact: bool
    contains: bool
    judged: bool | None = None
    accepted: tuple[str, ...] = ()


FOUND = ("exact", "contains", "judged")


def write_answers(
    backbone: Backbone, records: Sequence[EditRecord], n_tokens: int = N_TOKENS
) -> list[Written]:
    """Let the model answer every prompt of the records in every context.

    Raises:
        UsageError: a prompt leaves no room for an answer.
    """
    asked = [
        (i, kind, context, query)
        for context in CONTEXTS
        for kind, queries in KINDS.items()
        for i, record in enumerate(records)
        for query in queries(record)
    ]
    prompts = [CONTEXTS[context].format(query.prompt) for _, _, context, query in asked]
    texts = answers(backbone, prompts, n_tokens)
    return [
        Written(
            *(i, kind, context, query.prompt, query.answer, text, *_matches(query, text)),
            accepted=query.accepted,
        )
        for (i, kind, context, query), text in zip(asked, texts, strict=True)
    ]


def rows(written: Sequence[Written]) -> list[dict]:
    """Return what was written as rows of a CSV file."""
    return [asdict(w) | {"accepted": "; ".join(w.accepted)} for w in written]


def figures(written: Sequence[Written]) -> dict[str, float]:
    """Return ``<kind>_<exact, contains or judged>_<context>`` → percent, the mean over records."""
    found = {}
    for context in CONTEXTS:
        for kind in KINDS:
            of = [w for w in written if (w.kind, w.context) == (kind, context)]
            for figure in FOUND:
                by_record = {}
                for w in of:
                    if getattr(w, figure) is None:
                        continue
                    by_record.setdefault(w.record, []).append(getattr(w, figure))
                if by_record:
                    found[f"{kind}_{figure}_{context}"] = 100 * mean(map(mean, by_record.values()))
    return found


def table(found: dict[str, float]) -> Table:
    """Return the figures as a table, one row a kind of prompt."""
    shown = [f for f in FOUND if any(f"_{f}_" in name for name in found)]
    columns = [f"{figure}_{context}" for context in CONTEXTS for figure in shown]
    lines = [
        [kind, *(number(found.get(f"{kind}_{column}")) for column in columns)]
        for kind in KINDS
        if f"{kind}_{columns[0]}" in found
    ]
    names = ["prompts", *(f + suffix for suffix in ("", ", Q&A") for f in shown)]
    return Table(names, lines, "Answers in what the model writes, percent")


def _matches(query: Query, text: str) -> tuple[bool, bool]:
    """Return whether a text is an answer to the query, and whether it contains one."""
    exact = contains = False
    for answer in filter(str.strip, (query.answer, *query.accepted)):
        words = r"\s+".join(map(re.escape, answer.split()))
        exact |= bool(re.match(rf"\W*{words}\s*(?:$|[{STOPS}\n])", text, re.IGNORECASE))
        before = "" if is_without_spaces(answer.strip()[0]) else r"(?<!\w)"
        after = "" if is_without_spaces(answer.strip()[-1]) else r"(?!\w)"
        contains |= bool(re.search(f"{before}{words}{after}", text, re.IGNORECASE))
    return exact, contains
