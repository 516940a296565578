"""Errors meant for people: one line that says what is wrong, where, and what to do."""


class HorseError(Exception):
    """Something failed while running. The command line prints it and exits with 1."""


class UsageError(HorseError):
    """The request itself is wrong: a file, a field, a key. The command line exits with 2."""


HALF_HINT = "With float16 weights, try dtype: bf16; while training, a lower meta_lr."
