"""Errors meant for people: one line that says what is wrong, where, and what to do."""

import difflib
import unicodedata
from collections.abc import Iterable

# Joiners, which some scripts need and which hide nothing but themselves.
HARMLESS = "\u200c\u200d"


class HorseError(Exception):
    """Something failed while running. The command line prints it and exits with 1."""


class UsageError(HorseError):
    """The request itself is wrong: a file, a field, a key. The command line exits with 2."""


HALF_PRECISION_HINT = "With float16 weights, try dtype: bf16; while training, a lower meta_lr."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reason(error: BaseException) -> str:
    """Return one line for people: our messages as they are, others with the name of their class."""
    line = first_line(error)
    return line if isinstance(error, HorseError) else f"{type(error).__name__}: {line}"


def counted(n: int, what: str) -> str:
    """Return a number with what it counts, in words: "1 record", "2,000 records"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" with the known name that is nearest to this one, or nothing."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[near[0]]}?" if near else ""


def not_installed(what: str, error: ImportError, extra: str) -> UsageError:
    """Return the error to raise where one of our extras is not installed."""
    return UsageError(f"{what}: {error}: install it with `pip install 'horse-plugin[{extra}]'`.")


def visible(text) -> str:
    """Return text of a file as a person may see it: nothing hides, and nothing steers a terminal.

    Control characters, line breaks, marks of direction, other invisible marks and halves of Unicode
    characters are escaped.
    """
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in hidden and c not in HARMLESS
        else c
        for c in str(text)
    )
