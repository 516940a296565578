"""Errors meant for people: one line that says what is wrong, where, and what to do."""


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
