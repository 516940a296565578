"""What a fact to edit is: one record type, whatever file or data set it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """A prompt and the answer that should follow it.

    Attributes:
        accepted: other answers that are as good, in measuring.
    """

    prompt: str
    answer: str
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditRecord:
    """One fact to change, and the prompts that measure the change (Sec. 2.1).

    Attributes:
        prompt: the edit prompt x_e.
        target_new: the new answer y_e.
        rephrases: equivalent prompts, whose answer is ``target_new`` too.
        unrelated: prompts whose answers must survive.
        portability: prompts whose answers follow from the new fact.
        subject: who or what the fact is about, if known.
        ground_truth: the answer before the edit, if known.
        case_id: the record's name in its data set, if it has one.
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
    def asks(self) -> str:
        """The edit prompt with single spaces: records that ask the same are of one fact."""
        return plain(self.prompt)

    @property
    def edit(self) -> Query:
        """The edit prompt with the new answer."""
        return Query(self.prompt, self.target_new)

    @property
    def equivalent(self) -> tuple[Query, ...]:
        """The rephrased prompts with the new answer."""
        return tuple(Query(prompt, self.target_new) for prompt in self.rephrases)

    def to_dict(self) -> dict:
        """Return plain fields, for JSON; ``accepted`` only where a query has it, as in 0.1."""
        queries = {"unrelated": self.unrelated, "portability": self.portability}
        return vars(self) | {name: tuple(map(_fields_of, q)) for name, q in queries.items()}

    @classmethod
    def from_dict(cls, fields: Mapping) -> "EditRecord":
        """Return the record that :meth:`to_dict` described."""
        fields = dict(fields)
        fields["rephrases"] = tuple(fields["rephrases"])
        for name in ("unrelated", "portability"):
            queries = (q | {"accepted": tuple(q.get("accepted", ()))} for q in fields[name])
            fields[name] = tuple(Query(**q) for q in queries)
        return cls(**fields)


def plain(text: str) -> str:
    """Return the text with single spaces: other white space makes no other text."""
    return " ".join(text.split())


def _fields_of(query: Query) -> dict:
    return {name: v for name, v in vars(query).items() if v or name != "accepted"}
