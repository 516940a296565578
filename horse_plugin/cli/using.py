"""Commands that use an edited model: questions, on the terminal or in a browser."""

import functools
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from horse_plugin.assets import DEFAULT_MODEL
from horse_plugin.cli.app import app, console
from horse_plugin.cli.options import Delta, Hparams, editor_of, hparams_of, path_option
from horse_plugin.errors import UsageError

command = functools.partial(app.command, rich_help_panel="Use")


@command()
def ask(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to ask; none: a conversation.")
    ] = None,
    hparams: Hparams = DEFAULT_MODEL,
    delta: Delta = None,
    file: Annotated[Path | None, path_option(help="File of prompts, one a line.")] = None,
    chat: Annotated[bool, typer.Option(help="Ask through the model's chat template.")] = False,
    before: Annotated[bool, typer.Option(help="Show the unedited model's answer, too.")] = False,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 50,
):
    """Ask the model, or an edit of it, and read what it writes."""
    from horse_plugin.cli.asking import answer, converse, prompts_of
    from horse_plugin.distributed import is_main_process

    prompts = [*(prompts or ()), *(prompts_of(file) if file else ())]
    editor, deltas = editor_of(hparams_of(hparams, chat_template=chat or None), delta)
    editor.apply_chain(deltas)
    if prompts:
        answer(editor, prompts, before, tokens)
    elif editor.backbone.lockstep.is_sharded:
        raise UsageError("ask: name what to ask; shard_trunk has no conversation.")
    elif is_main_process():  # who alone has the terminal
        converse(editor, before, tokens)


@command()
def play(
    hparams: Hparams = DEFAULT_MODEL,
    onto: Annotated[Path | None, path_option(help="Chain of edits; none: nothing stays.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; else a free one from 7860 on.")] = None,
):
    """Ask, switch edits on and off, and add facts, on a page in your browser."""
    from horse_plugin.cli.play import Session, page_of, serve
    from horse_plugin.editing.chain import Chain
    from horse_plugin.editing.editor import HorseEditor

    settings = hparams_of(hparams)
    with tempfile.TemporaryDirectory() as folder:
        editor = HorseEditor.from_hparams(settings, progress=True)
        if editor.backbone.lockstep.is_sharded:
            raise UsageError("play: shard_trunk has no page; horse ask takes what to ask.")
        page = page_of(Session(editor, Chain(onto or folder)), Path(settings.model_name).name)
        console.print(f"Open {serve(page, port)} in a browser; Ctrl-C ends it.", soft_wrap=True)
        page.block_thread()
