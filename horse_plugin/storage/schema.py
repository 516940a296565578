"""The form that a JSON description must have, checked before anything is read out of it."""

from horse_plugin.errors import HorseError


def check_form(path, value, form, where: str = ""):
    """Check a value that JSON held against its form.

    Args:
        path: the file, for the message.
        form: a type or a tuple of types; a list of one form, for lists of it; or a dict of forms,
            for objects that hold at least these fields.
        where: the name of the field so far.

    Raises:
        HorseError: the value has another form; the message names the file and the field.
    """
    outer = type(form) if isinstance(form, (dict, list)) else form
    if not isinstance(value, outer) or (isinstance(value, bool) and outer is not bool):
        found = "missing" if value is None else f"{type(value).__name__}, which it must not be"
        raise HorseError(f"{path}: damaged: field {where or 'about'!r} is {found}.")
    if isinstance(form, dict):
        for name, inner in form.items():
            check_form(path, value.get(name), inner, f"{where}.{name}".lstrip("."))
    elif isinstance(form, list):
        for i, item in enumerate(value):
            check_form(path, item, form[0], f"{where}[{i}]")
