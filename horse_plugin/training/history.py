"""The losses and validations of a training, step by step, as ``training.csv`` in its archive."""

import csv
import io
from pathlib import Path

from horse_plugin.editing.archive import HISTORY
from horse_plugin.errors import HorseError
from horse_plugin.storage.files import write
from horse_plugin.storage.schema import read_text

VALIDATION = "validation_"  # begins the name of a figure of the validation records


def flat(step: dict) -> dict[str, float]:
    """Return one step of the trainer's history as names and numbers; what is None is left out."""
    figures = step.get("validation", {}).items()
    named = {n: v for n, v in step.items() if n != "validation"}
    named |= {f"{VALIDATION}{name}": value for name, value in figures}
    return {name: value for name, value in named.items() if value is not None}


def save_history(folder, history: list[dict]):
    """Write the trainer's history, one line a step; a validation stands in the line of its step."""
    lines = list(map(flat, history))
    text = io.StringIO()
    # In an order that does not depend on whether the run went on from a checkpoint.
    names = sorted({name for line in lines for name in line}, key=lambda n: (n != "step", n))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write(Path(folder, HISTORY), text.getvalue())


def read_history(folder) -> list[dict]:
    """Return the history that :func:`save_history` wrote.

    Raises:
        HorseError: the file is damaged.
    """
    path, history = Path(folder, HISTORY), []
    try:
        for line in csv.DictReader(io.StringIO(read_text(path), newline="")):
            values = {name: float(value) for name, value in line.items() if value}
            step = {n: v for n, v in values.items() if not n.startswith(VALIDATION)}
            figures = {n.removeprefix(VALIDATION): v for n, v in values.items() if n not in step}
            step["step"] = int(step["step"])
            history.append(step | ({"validation": figures} if figures else {}))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise HorseError(f"{path}: damaged, or not the history of a training ({error}).") from None
    return history
