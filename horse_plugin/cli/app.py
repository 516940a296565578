"""The ``horse`` command itself: what holds the commands, and what they print to."""

import sys
from importlib import metadata
from typing import Annotated

import typer

from horse_plugin.cli.console import PlainConsole
from horse_plugin.errors import HorseError, visible


class Commands(typer.core.TyperGroup):
    """The commands; the message of a Ctrl-C is kept, which typer would drop."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise HorseError(str(stopped) or "stopped.") from None


app = typer.Typer(
    cls=Commands,
    help="Change thousands of facts in a language model at once, with HORSE.\n\n"
    "With --debug, anywhere on the line, errors show where they come from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = PlainConsole()


def _print_version(asked: bool):
    if asked:
        console.print(f"horse-plugin {metadata.version('horse-plugin')}", highlight=False)
        raise typer.Exit


@app.callback()
def horse(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The version.")
    ] = False,
):
    """Hold the options that come before a command."""


def say(message: str, file=None):
    """Print a message beside the output, or to another file, with nothing hidden in it."""
    print(visible(message), file=file or sys.stderr)
