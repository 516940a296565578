"""What will go wrong with a list of edits, found before any weight moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from horse_plugin.data.prompts import AnswerTooLongError, PreparedEdits
from horse_plugin.data.records import EditRecord, plain
from horse_plugin.evaluation.metrics import Evaluation

MEANINGS = {
    "duplicates": "facts given twice",
    "contradictions": "facts that contradict another one on the same prompt",
    "too_long": "prompts that are too long and lose their beginning",
    "unanswerable": "facts that the tokenizer has no tokens for",
    "known": "facts that the model knows already",
}


@dataclass(frozen=True)
class Conflicts:
    """Indices of the records concerned, in each list ascending.

    Attributes:
        duplicates: the same prompt and answer as a record before, or as an earlier edit.
        contradictions: the same prompt as a record before, or as an earlier edit, with another
            answer.
        too_long: prompt and answer exceed ``max_length`` or what the model can read; the prompt
            loses its beginning.
        unanswerable: the tokenizer has no tokens for a prompt or an answer of the record, or only
            an unknown one for a part of the answer, or the answer alone is too long.
        known: the model gives this answer already.
    """

    duplicates: tuple[int, ...] = ()
    contradictions: tuple[int, ...] = ()
    too_long: tuple[int, ...] = ()
    unanswerable: tuple[int, ...] = ()
    known: tuple[int, ...] = ()

    def lines(self) -> list[str]:
        """Return a line for each kind that there is, with its count; none without conflicts."""
        return [
            f"{meaning}: {len(indices)} (record {', '.join(map(str, indices[:5]))}"
            f"{', …' if len(indices) > 5 else ''})"
            for name, meaning in MEANINGS.items()
            if (indices := getattr(self, name))
        ]


def find_conflicts(
    edits: PreparedEdits, unknown_token: int | None = None, earlier: Sequence[EditRecord] = ()
) -> Conflicts:
    """Return all conflicts that show without running the model; see :func:`known_facts` for those.

    Args:
        unknown_token: the id of the tokenizer's token for what it does not know, if it has one.
        earlier: records that were edited before, on top of which these go.
    """
    answers_to = {r.asks: {plain(r.target_new)} for r in earlier}
    found = {name: [] for name in MEANINGS}
    for i, record in enumerate(edits.records):
        answers, answer = answers_to.setdefault(record.asks, set()), record.target_new
        if plain(answer) in answers:
            found["duplicates"].append(i)
        elif answers:
            found["contradictions"].append(i)
        answers.add(plain(answer))
        error, prompts = edits.errors.get(i), edits.prompts["edit"][i]
        if isinstance(error, AnswerTooLongError) or any(p.n_cut for p in prompts):
            found["too_long"].append(i)
        if error or any(unknown_token in p.answer for p in prompts):
            found["unanswerable"].append(i)
    return Conflicts(**{name: tuple(indices) for name, indices in found.items()})


def known_facts(before: Evaluation) -> Conflicts:
    """Return the records whose answer the model gives already.

    Args:
        before: the figures of the unedited model.
    """
    return Conflicts(known=tuple(i for i, r in enumerate(before.records) if r["efficacy"] == 1))
