"""``horse ask``: questions to the edited model, once or in a conversation."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text
from transformers import TextStreamer

from horse_plugin.cli.app import console
from horse_plugin.cli.show import printed
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import HorseError, UsageError, visible
from horse_plugin.evaluation.tables import Table
from horse_plugin.storage.schema import read_text

HELP = """\
A line is a prompt, which the model goes on with.
  /before      what the unedited model writes after the last prompt
  /edits       the edits in force
  /undo NAME   take an edit out of this conversation; its files stay
  /help        this list
  /quit        the end; so is Ctrl-D"""


def prompts_of(file: Path) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:
        UsageError: the file cannot be read, or holds none.
    """
    try:
        # Not splitlines(), which also breaks at marks that a prompt may hold.
        lines = read_text(file).split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: not readable as UTF-8 text ({error}).") from None
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{file}: holds no prompt.")
    return prompts


def answer(editor: HorseEditor, prompts: Sequence[str], before: bool, n_tokens: int):
    """Print what the model writes: as it is written for a single prompt, else as a table.

    Args:
        before: whether to show what the unedited model writes, too.
    """
    if len(prompts) == 1 and not before:
        _write(editor, prompts[0], n_tokens)
        return
    asked = [True, False] if before else [False]
    columns = [prompts, *(editor.ask(prompts, n_tokens, when) for when in asked)]
    lines = [[" ".join(text.split()) for text in line] for line in zip(*columns, strict=True)]
    names = ["prompt", "before", "after"] if before else ["prompt", "answer"]
    console.print(printed(Table(names, lines, is_text=True)))


def converse(editor: HorseEditor, before: bool, n_tokens: int):
    """Answer one line after the other, until the input ends.

    Args:
        before: whether to show what the unedited model writes after each prompt, too.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # arrows and history for input()
    console.print(_edits(editor), "/help lists what else you can say.")
    last = ""
    while (line := _line()) is not None:
        command, _, name = line.partition(" ")
        try:
            if command == "/quit":
                break
            elif command == "/undo":
                undone = editor.undo(name.strip() or -1)
                console.print(f"Undone here: {undone.name}.", _edits(editor))
            elif command == "/edits":
                console.print(_edits(editor))
            elif command == "/before" and last:
                _write(editor, last, n_tokens, before=True)
            elif command.startswith("/"):
                console.print(Text(HELP))
            elif line:
                last = line
                answer(editor, [line], before, n_tokens)
        except HorseError as error:
            console.print(f"{error}", style="red")


def _line() -> str | None:
    """Return the next line, or None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


class _PlainStreamer(TextStreamer):
    """Prints what a model writes as it is written, with nothing in it that steers a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text("\n".join(map(visible, text.split("\n"))), stream_end)


def _write(editor: HorseEditor, prompt: str, n_tokens: int, before: bool = False):
    tokenizer = editor.backbone.tokenizer
    streamer = _PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    editor.ask(prompt, n_tokens, before, streamer)


def _edits(editor: HorseEditor) -> str:
    names = ", ".join(delta.name for delta in editor.history)
    return f"In force: {names}." if names else "No edit is in force."
