"""Files of text and the form that their content must have, checked before anything is read out."""

import errno
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from horse_plugin.errors import HorseError, first_line


@dataclass(frozen=True)
class Maybe:
    """The form of a field that may be missing or null."""

    form: object


def finite(value) -> bool:
    """Be the form of a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value) -> bool:
    """Be the form of a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def plain_file(path) -> Path:
    """Return the path of a file that can be read to its end, unlike a pipe or a device.

    Raises:
        OSError: it is something else.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path


def read_text(path) -> str:
    """Return the text of a UTF-8 file, with its ends of lines as they are and no byte order mark.

    Raises:
        OSError: there is none, or it is no plain file.
        ValueError: it is not UTF-8.
    """
    return plain_file(path).read_bytes().decode("utf-8-sig")


def read_json(path, form):
    """Return the content of a JSON file of that form.

    Raises:
        HorseError: it cannot be read, or has another form; the message names it.
    """
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise HorseError(f"{path}: damaged, or not our file ({first_line(error)}).") from None
    check_form(path, content, form)
    return content


def check_form(path, value, form, where: str = ""):
    """Check a value that JSON held against its form.

    Args:
        path: the file, for the message.
        form: a type or a tuple of types; a list of one form, for lists of it; a dict of forms, for
            objects that hold at least these fields; ``{str: form}``, for objects whose values have
            that form; a function that says whether the value will do; or :class:`Maybe`.
        where: the name of the field so far.

    Raises:
        HorseError: the value has another form; the message names the file and the field.
    """
    if isinstance(form, Maybe):
        if value is None:
            return
        form = form.form
    if isinstance(form, Callable) and not isinstance(form, type):
        fits = form(value)
    else:
        outer = type(form) if isinstance(form, (dict, list)) else form
        fits = isinstance(value, outer) and (not isinstance(value, bool) or outer is bool)
    if not fits:
        plain = finite(value) or isinstance(value, (bool, float))
        found = f"{value}" if plain else type(value).__name__
        found = "missing" if value is None else f"{found}, which it must not be"
        raise HorseError(f"{path}: damaged: field {where or 'about'!r} is {found}.")
    if isinstance(form, dict) and str in form:
        for name, inner in value.items():
            check_form(path, inner, form[str], f"{where}.{name}".lstrip("."))
    elif isinstance(form, dict):
        for name, inner in form.items():
            check_form(path, value.get(name), inner, f"{where}.{name}".lstrip("."))
    elif isinstance(form, list):
        for i, item in enumerate(value):
            check_form(path, item, form[0], f"{where}[{i}]")
