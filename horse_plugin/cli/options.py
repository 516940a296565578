"""What several commands share: options, and what their values mean."""

import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from horse_plugin.assets import shipped_yamls
from horse_plugin.errors import UsageError

if TYPE_CHECKING:
    from horse_plugin.editing.delta import EditDelta
    from horse_plugin.editing.editor import HorseEditor
    from horse_plugin.hparams import HORSEHyperParams


def _yamls(begun: str) -> list[str]:
    """Complete the name of a shipped YAML."""
    return [name for name in shipped_yamls() if name.startswith(begun)]


def expanded(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Return paths with ``~`` as the user's folder, which a shell leaves as it is in ``--out=~/x``.

    Raises:
        typer.BadParameter: there is no such user.
    """
    if isinstance(value, list):
        return [expanded(path) for path in value]
    try:
        return value and value.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{value}: {error}") from None


# How every command declares a path.
path_option = functools.partial(typer.Option, callback=expanded)
path_argument = functools.partial(typer.Argument, callback=expanded)

Hparams = Annotated[
    str,
    typer.Option(help="YAML with settings, or a shipped one's name.", autocompletion=_yamls),
]
AnotherModel = Annotated[
    str | None, typer.Option(help="Another model's YAML.", autocompletion=_yamls)
]
Folder = Annotated[Path, path_argument(help="The folder of an edit, or of a chain of them.")]
Delta = Annotated[
    Path | None,
    path_option(help="An edit, or a chain of them, also owner/name on the hub; none: the model."),
]
NEdits = Annotated[int | None, typer.Option(help="How many records, from the start.", min=1)]

Datas = Annotated[list[str] | None, typer.Option(help="Facts to edit; may be repeated.")]
Trains = Annotated[list[str] | None, typer.Option(help="Training facts, one for each --data.")]
Vals = Annotated[list[str] | None, typer.Option(help="Validation facts, one for each --data.")]
Seeds = Annotated[str, typer.Option(help="Seeds, comma-separated.")]


def hparams_of(name: str, **overrides) -> "HORSEHyperParams":
    """Return the settings of a YAML, some of them set anew; None leaves one as it is."""
    from horse_plugin.hparams import HORSEHyperParams

    settings = HORSEHyperParams.from_hparams(name)
    return replace(settings, **{k: v for k, v in overrides.items() if v is not None})


def command_line() -> str:
    """Return the command line that is running, for the reports."""
    return shlex.join(["horse", *sys.argv[1:]])


def names_of(text: str) -> list[str]:
    """Return the names of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_of(option: str, text: str, least: int = 1) -> list[int]:
    """Return the numbers of a list with commas; ``option`` names it where one is none."""
    numbers = names_of(text)
    if not all(n.isdecimal() and int(n) >= least for n in numbers):
        raise UsageError(f"--{option}: expected whole numbers from {least}, got {text!r}.")
    return [int(n) for n in numbers]


def batches_of(text: str) -> tuple[list[int], int]:
    """Return (number of edits,) and how many of them at once, of a text such as 20x100."""
    times, _, size = text.lower().partition("x")
    if not (times.isdecimal() and size.isdecimal() and int(times) and int(size)):
        raise UsageError(f"--sequential: expected batches x facts, such as 20x100, got {text!r}.")
    return [int(times) * int(size)], int(size)


def editor_of(
    settings: "HORSEHyperParams", delta: Path | None
) -> tuple["HorseEditor", list["EditDelta"]]:
    """Return an editor without a network, and the edits in the folder ``delta``."""
    from horse_plugin.editing.chain import read_edits
    from horse_plugin.editing.editor import HorseEditor

    deltas = read_edits(delta) if delta else []
    return HorseEditor.from_hparams(replace(settings, archive=None), progress=True), deltas
