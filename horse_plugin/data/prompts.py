"""Queries as tokens, and where the answer lies in them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from horse_plugin.data.reader import Reader
from horse_plugin.data.records import EditRecord, Query
from horse_plugin.data.seam import PLAIN, Seam
from horse_plugin.errors import UsageError, counted

UNKNOWN = -100  # in place of a token that only the model knows
# Records whose texts are tokenised in one call. Python looks through all that it holds each time
# many objects are new, so that more of them take longer.
CHUNK = 64


@dataclass(frozen=True)
class Prompt:
    """A query as token ids.

    Attributes:
        ids: the tokens of prompt and answer; ``ids[start:]`` is the answer, and each of its tokens
            is predicted at the position before it.
        start: the index of the first answer token.
        n_cut: the number of tokens that the prompt lost at its beginning, as it was too long.
        subject: the index of the last token of the subject, if keys are read there; else None.
        still: whether an edit must do nothing here, instead of teaching the answer.
        ends: whether the model is also asked what follows the answer, which an edit keeps likely.
        accepted: the same prompt with other answers that are as good.
        record: the index of its record in the edit that reads it, for messages; records of edits
            in force come after the edit's own.
    """

    ids: tuple[int, ...]
    start: int
    n_cut: int = 0
    subject: int | None = None
    still: bool = False
    ends: bool = False
    accepted: tuple["Prompt", ...] = ()
    record: int = field(default=0, compare=False)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but the last, if that is only ever predicted."""
        return self.ids if self.ends else self.ids[:-1]

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer tokens."""
        return self.ids[self.start :]

    @property
    def keys_at(self) -> tuple[int, ...]:
        """The positions where an edit reads keys.

        They are the answer positions. With a subject, its last token stands for the position that
        predicts the first answer token. Where an edit must do nothing, only that position counts.
        """
        if self.still:
            return (self.start - 1,)
        first = self.start - 1 if self.subject is None else self.subject
        return first, *range(self.start, len(self.inputs))

    @property
    def n_late(self) -> int:
        """The number of positions from the first key or answer position on."""
        return len(self.inputs) - min(self.start - 1, *self.keys_at)

    @property
    def labels(self) -> tuple[int, ...]:
        """What is predicted from the first answer token on; ``UNKNOWN`` is what follows it."""
        return self.answer + (UNKNOWN,) * self.ends


# kind of prompt → a record's queries of that kind
KINDS: dict[str, Callable[[EditRecord], tuple[Query, ...]]] = {
    "edit": lambda record: (record.edit,),
    "rephrase": lambda record: record.equivalent,
    "unrelated": lambda record: record.unrelated,
    "portability": lambda record: record.portability,
}


@dataclass
class PreparedEdits:
    """Edit records with their prompts, tokenised once and handed from stage to stage.

    Attributes:
        records: the edit records.
        prompts: kind of prompt → for each record, its prompts of that kind.
        errors: index of a record → why its prompts could not be tokenised. Such a record has no
            prompts.
        contrasts: for each record, prompts where an edit of it must do nothing; mostly none.
    """

    records: list[EditRecord]
    prompts: dict[str, list[tuple[Prompt, ...]]]
    errors: dict[int, UsageError] = field(default_factory=dict)
    contrasts: list[tuple[Prompt, ...]] = field(default_factory=list)

    @classmethod
    def of_none(cls) -> "PreparedEdits":
        """Return the prompts of no record."""
        return cls([], {kind: [] for kind in KINDS})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, indices: slice | Sequence[int]) -> "PreparedEdits":
        """Return some of the records with their prompts."""
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        return PreparedEdits(
            [self.records[i] for i in indices],
            {kind: [groups[i] for i in indices] for kind, groups in self.prompts.items()},
            {k: self.errors[i] for k, i in enumerate(indices) if i in self.errors},
            [self.contrasts[i] for i in indices] if self.contrasts else [],
        )

    def on_top_of(self, earlier: "PreparedEdits") -> "PreparedEdits":
        """Return the edit prompts of these records, and after them those of edits in force.

        Where keys are read has to be found anew: two of the records may share a subject.
        """
        prompts = {"edit": self.prompts["edit"] + earlier.prompts["edit"]}
        return PreparedEdits(self.records + earlier.records, prompts)

    def flat(self, *kinds: str) -> list[Prompt]:
        """Return the prompts of these kinds, or of all, kind after kind and record after record."""
        return [p for kind in kinds or self.prompts for group in self.prompts[kind] for p in group]

    def of(self, kind: str, i: int) -> tuple[Prompt, ...]:
        """Return the prompts of that kind of record i, none if the kind was not wanted."""
        return self.prompts[kind][i] if kind in self.prompts else ()

    def to_capture(self, ends: bool = False) -> list[Prompt]:
        """Return what an edit of these records reads: the edit prompts, then the contrasts.

        Args:
            ends: whether an edit also reads what follows an answer.
        """
        edits, contrasts = enumerate(self.prompts["edit"]), enumerate(self.contrasts)
        return [
            *(replace(p, record=i, ends=ends) for i, g in edits for p in g),
            *(replace(p, record=i) for i, group in contrasts for p in group),
        ]

    def check(self):
        """Refuse records whose prompts could not be tokenised.

        Raises:
            UsageError: the message names the first one.
        """
        for i, error in self.errors.items():
            raise UsageError(f"record {i}: {error}")


def prepare(
    tokenizer,
    records: Sequence[EditRecord],
    max_length: int | None = None,
    kinds: Sequence[str] = tuple(KINDS),
    seam: Seam = PLAIN,
) -> PreparedEdits:
    """Tokenise the records' queries of these kinds, each once.

    A warning counts other accepted answers that have no tokens or too many, and are left out.

    Args:
        max_length: the most tokens of prompt and answer; None is no limit.
        seam: how the model is asked.
    """
    prepared, n_left_out = PreparedEdits(list(records), {kind: [] for kind in kinds}), 0
    for first in range(0, len(prepared), CHUNK):
        chunk = prepared.records[first : first + CHUNK]
        queries = [[KINDS[kind](record) for kind in kinds] for record in chunk]
        made = _tokenized(tokenizer, [q for of in queries for g in of for q in g], max_length, seam)
        for i, of_record in enumerate(queries, first):
            try:
                groups = [tuple(_prompt_of(q, made) for q in group) for group in of_record]
            except UsageError as error:
                prepared.errors[i], groups = error, [()] * len(kinds)
            else:
                n_left_out += sum(len(q.accepted) for group in of_record for q in group)
                n_left_out -= sum(len(p.accepted) for group in groups for p in group)
            for kind, group in zip(kinds, groups, strict=True):
                prepared.prompts[kind].append(group)
    if n_left_out:
        warnings.warn(
            f"{counted(n_left_out, 'accepted answer')} left out: too long, or without tokens",
            stacklevel=3,
        )
    return prepared


class AnswerTooLongError(UsageError):
    """The answer alone exceeds the most tokens that a prompt may have."""


def tokenize(
    tokenizer, queries: Sequence[Query], max_length: int | None = None, seam: Seam = PLAIN
) -> list[Prompt]:
    """Tokenise each query as the model reads it: prompt and answer as one text.

    The answer is found from the tokenizer's offsets, or from the prompt's own length where the
    tokenizer has none; never from the tokenizer's class. A BOS token appears once where the
    tokenizer sets one; an EOS token appears where the answer has one. A prompt over ``max_length``
    tokens loses its beginning (after BOS), never its answer. Of other accepted answers,
    those that cannot be tokenised are left out.

    Args:
        seam: how the model is asked.

    Raises:
        UsageError: the tokenizer has no tokens for an answer or a prompt.
        AnswerTooLongError: an answer exceeds ``max_length``.
    """
    made = _tokenized(tokenizer, queries, max_length, seam)
    return [_prompt_of(query, made) for query in queries]


def _tokenized(
    tokenizer, queries: Sequence[Query], max_length: int | None, seam: Seam
) -> dict[tuple[str, str], Prompt | UsageError]:
    """Return each distinct pair of prompt and answer as tokens, or why it has none."""
    joined, made = {}, {}
    for pair in dict.fromkeys((q.prompt, a) for q in queries for a in (q.answer, *q.accepted)):
        try:
            joined[pair] = seam.join(tokenizer, *pair)
        except UsageError as error:
            made[pair] = error
    reader = Reader(tokenizer, (text for text, _ in joined.values()))
    for (prompt, answer), (text, n_before) in joined.items():
        try:
            whole = _find_answer(reader, prompt, answer, text, n_before)
            made[prompt, answer] = _shorten(whole, max_length, answer, reader)
        except UsageError as error:
            made[prompt, answer] = error
    return made


def _prompt_of(query: Query, made: dict[tuple[str, str], Prompt | UsageError]) -> Prompt:
    """Return a query's tokens, with its other answers as far as they have any."""
    prompt = made[query.prompt, query.answer]
    if isinstance(prompt, UsageError):
        raise prompt
    others = (made[query.prompt, answer] for answer in query.accepted)
    others = tuple(other for other in others if isinstance(other, Prompt))
    return replace(prompt, accepted=others) if others else prompt


def _find_answer(tokenizer, prompt: str, answer: str, text: str, n_before: int) -> Prompt:
    """Return a text as tokens, whose answer begins behind so many characters."""
    ids, spans = _encode(tokenizer, text, n_before)
    start = next((i for i, (_, end) in enumerate(spans) if end > n_before), len(ids))
    if start < len(ids) and (spans[start][0] < n_before or text[n_before] != " "):
        # The model reads the prompt without knowing the answer, which may change its last tokens.
        before = ask(tokenizer, text[:n_before])
        if before != list(ids[:start]):
            ids, start = [*before, *_continuation(tokenizer, text[n_before:])], len(before)
    if start >= len(ids) or not answer.strip():
        raise UsageError(f"answer {answer!r}: the tokenizer has no tokens for it.")
    if start == 0:
        raise UsageError(f"prompt {prompt!r}: the tokenizer has no tokens for it.")
    return Prompt(tuple(ids), start)


def _encode(tokenizer, text: str, n_before: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Return a text's tokens, and where each begins and ends in it."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    else:
        ids = tokenizer(text)["input_ids"]
        prompt = text[:n_before]
        n_prompt = len(_without_eos(tokenizer(prompt)["input_ids"], prompt, tokenizer))
        spans = [(0, 0)] * n_prompt + [(n_before, len(text))] * (len(ids) - n_prompt)
    ids = _without_eos(ids, text, tokenizer)
    extra = _n_extra_bos(ids, tokenizer)
    return ids[extra:], spans[extra : len(ids)]


def _continuation(tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that goes on without a space, which some tokenizers put first."""
    for anchor in "\n,a":
        ids, spans = _encode(tokenizer, anchor + text, 1)
        start = next(i for i, (_, end) in enumerate(spans) if end > 1)
        if spans[start][0] >= 1:
            return ids[start:]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ask(tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that a model is to go on with, as :func:`tokenize` has them."""
    ids = _without_eos(tokenizer(text)["input_ids"], text, tokenizer)
    return ids[_n_extra_bos(ids, tokenizer) :]


def text_prompts(ids: Sequence[int], size: int) -> list[Prompt]:
    """Return a text in pieces of at most ``size`` tokens, of which all positions count."""
    pieces = (tuple(ids[i : i + size]) for i in range(0, len(ids), size))
    return [Prompt(piece, 1) for piece in pieces if len(piece) > 1]


def _n_extra_bos(ids: Sequence[int], tokenizer) -> int:
    """Return 1 if the text brought a BOS token of its own beside the tokenizer's, else 0."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])


def _without_eos(ids: list[int], text: str, tokenizer) -> list[int]:
    """Return a text's tokens without the EOS token that a tokenizer appends."""
    eos = tokenizer.eos_token_id
    if eos is None or len(ids) < 2 or ids[-1] != eos:
        return ids
    is_own = text.endswith(str(tokenizer.eos_token)) and ids[-2] != eos
    return ids if is_own else ids[:-1]


def _shorten(prompt: Prompt, max_length: int | None, answer: str, tokenizer) -> Prompt:
    if max_length is None or len(prompt.ids) <= max_length:
        return prompt
    n_bos = int(prompt.ids[0] == tokenizer.bos_token_id)
    n_kept = max_length - n_bos
    if n_kept <= len(prompt.answer):
        raise AnswerTooLongError(f"answer {answer[:40]!r}: longer than max_length={max_length}.")
    ids = prompt.ids[:n_bos] + prompt.ids[-n_kept:]
    return Prompt(ids, len(ids) - len(prompt.answer), len(prompt.ids) - max_length)
