"""Trouble that a list of edits will make, found before any weight moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from horse_plugin.data.prompts import tokenize
from horse_plugin.data.records import EditRecord
from horse_plugin.errors import UsageError
from horse_plugin.evaluation.metrics import Evaluation
from horse_plugin.model.backbone import Backbone


@dataclass(frozen=True)
class Conflicts:
    """Indices of the records in question, in each list ascending.

    Attributes:
        duplicates: the same prompt and answer as a record before, or as an earlier edit.
        contradictions: the same prompt as a record before, or as an earlier edit, with another
            answer.
        too_long: prompt and answer exceed ``max_length`` or what the model can read; the prompt
            loses its beginning.
        unanswerable: the tokenizer has no tokens for the answer or the prompt, only an unknown
            one for part of the answer, or the answer alone is too long.
        known: the model gives this answer already.
    """

    duplicates: tuple[int, ...] = ()
    contradictions: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    unanswerable: tuple[int, ...] = ()
    known: tuple[int, ...] = ()

    def lines(self) -> list[str]:
        """What there is to say, with counts; empty without conflicts."""
        return [
            f"{meaning}: {len(indices)} (record {', '.join(map(str, indices[:5]))}"
            f"{', …' if len(indices) > 5 else ''})"
            for name, meaning in MEANINGS.items()
            if (indices := getattr(self, name))
        ]


MEANINGS = {
    "duplicates": "facts given twice",
    "contradictions": "facts that contradict another one on the same prompt",
    "too_long": "prompts that are too long and lose their beginning",
    "unanswerable": "facts that cannot be said in the tokenizer's tokens",
    "known": "facts that the model knows already",
}


def find(
    backbone: Backbone,
    records: Sequence[EditRecord],
    max_length: int | None = None,
    earlier: Sequence[EditRecord] = (),
) -> Conflicts:
    """All conflicts that show without running the model; for the rest see :func:`known`.

    Args:
        earlier: records that were edited before, on top of which these go.
    """
    seen = {_key(r.prompt): {_key(r.target_new)} for r in earlier}
    limit = backbone.limit(max_length)
    found = {name: [] for name in MEANINGS}
    for i, record in enumerate(records):
        answers = seen.setdefault(_key(record.prompt), set())
        if _key(record.target_new) in answers:
            found["duplicates"].append(i)
        elif answers:
            found["contradictions"].append(i)
        answers.add(_key(record.target_new))
        try:
            (prompt,) = tokenize(backbone.tokenizer, [record.edit])
            if limit is not None and len(prompt.ids) > limit:
                found["too_long"].append(i)
                tokenize(backbone.tokenizer, [record.edit], limit)
            if backbone.tokenizer.unk_token_id in prompt.answer:
                found["unanswerable"].append(i)
        except UsageError:
            found["unanswerable"].append(i)
    return Conflicts(**{name: tuple(indices) for name, indices in found.items()})


def known(before: Evaluation) -> Conflicts:
    """The records whose answer the model gives already, by its figures before the edit."""
    return Conflicts(known=tuple(i for i, r in enumerate(before.records) if r["efficacy"] == 1))


def _key(text: str) -> str:
    return " ".join(text.split())
