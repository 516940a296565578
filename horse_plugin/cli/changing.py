"""Commands that change a model, and that keep, list and hand on its edits."""

import contextlib
import functools
from pathlib import Path
from typing import Annotated

import typer

from horse_plugin.assets import DEFAULT_MODEL
from horse_plugin.cli.app import app, console, say
from horse_plugin.cli.options import (
    Folder,
    Hparams,
    NEdits,
    command_line,
    editor_of,
    hparams_of,
    path_argument,
    path_option,
)
from horse_plugin.errors import UsageError, visible

command = functools.partial(app.command, rich_help_panel="Edit")


@command()
def edit(
    data: Annotated[
        str | None, typer.Option(help="Facts; none, with --onto: those in force, anew.")
    ] = None,
    hparams: Hparams = DEFAULT_MODEL,
    out: Annotated[Path | None, path_option(help="Folder for the edit, by itself.")] = None,
    onto: Annotated[Path | None, path_option(help="Chain of edits to put it on top of.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name; else a number, or OUT's.")] = None,
    archive: Annotated[
        Path | None, path_option(help="Trained archive, shipped, or untrained; none: the YAML's.")
    ] = None,
    n_edits: NEdits = None,
    save_model: Annotated[Path | None, path_option(help="Also save the edited model here.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse conflicts; undo a bad edit.")] = False,
    max_drift: Annotated[
        float | None, typer.Option(help="Most drift of ordinary text, in nats a token: 0.05.")
    ] = None,
    heldout: Annotated[Path | None, path_option(help="Text for drift and perplexity.")] = None,
    max_rise: Annotated[float, typer.Option(help="Perplexity's rise without warning, %.")] = 20.0,
):
    """Edit all the facts at once, measure the edit, save it: as --out, or on top of --onto.

    With --onto and no --data, write the facts in force anew, some of which may have fallen when
    an edit under theirs was undone.
    """
    from horse_plugin.cli import show
    from horse_plugin.data.formats import load_records
    from horse_plugin.distributed import is_main_process
    from horse_plugin.editing.chain import Chain
    from horse_plugin.editing.checked import checked_edit
    from horse_plugin.editing.delta import check_free
    from horse_plugin.editing.editor import HorseEditor
    from horse_plugin.evaluation import results
    from horse_plugin.hparams import UNTRAINED
    from horse_plugin.storage.files import check_empty, locked_folder, reserved

    if (out is None) == (onto is None):
        raise UsageError("edit: give --out for an edit by itself, or --onto for a chain of edits.")
    if data is None and (out or n_edits):
        raise UsageError("edit: give --data; only --onto works without, on the facts in force.")
    settings = hparams_of(hparams, archive=archive and str(archive), max_drift=max_drift)
    records = None if data is None else load_records(data, n_edits)
    with contextlib.ExitStack() as stack:
        if save_model:
            saved, edited = (p.resolve() for p in (save_model, out or onto))
            if saved == edited or saved in edited.parents:
                raise UsageError(f"--save-model: {save_model} is to hold the edit; choose another.")
            stack.enter_context(reserved(save_model))
            check_empty(save_model)
        folder = stack.enter_context(locked_folder(out or onto))
        chain = Chain(folder) if onto else None
        name = chain.new_name(name) if chain else name or folder.name
        if not chain:
            check_free(folder)
        if settings.archive in (None, UNTRAINED):
            say("No archive: the hypernetwork is untrained. `horse train` makes one.")
        editor = HorseEditor.from_hparams(settings, progress=True)
        if chain:
            editor.apply_chain(chain.deltas())
        dataset = "facts in force" if data is None else visible(Path(data).stem)
        options = dataset, name, strict, heldout, max_rise
        delta, rows = checked_edit(editor, records, *options, unfinished=folder)
        delta.about["command"] = command_line()
        if not is_main_process():
            return
        if chain:
            chain.add(delta, rows)
        else:
            delta.save(folder)
            results.save(folder / "results.json", rows)
        if save_model:
            editor.save_model(save_model)
    for part in (*show.verdict(delta), show.figures(rows), *show.outcome(delta)):
        console.print(part)
    console.print(f"Edit: {folder / delta.name if chain else folder}", soft_wrap=True)
    for part in show.stale_in(chain) if chain else ():
        console.print(part, soft_wrap=True)


@command()
def undo(
    folder: Folder,
    name: Annotated[str | None, typer.Argument(help="The edit's name; else the last one.")] = None,
):
    """Take an edit out of a chain, the last one or any other; its files stay."""
    from horse_plugin.cli import show
    from horse_plugin.editing.chain import Chain

    chain = Chain.at(folder)
    undone = chain.undo(name)
    console.print(f"Undone: {undone}. Its files stay in {folder / undone}.", soft_wrap=True)
    for part in show.stale_in(chain):
        console.print(part, soft_wrap=True)


@command()
def redo(folder: Folder, name: Annotated[str, typer.Argument(help="The edit's name.")]):
    """Put an undone edit back into its place in a chain."""
    from horse_plugin.cli import show
    from horse_plugin.editing.chain import Chain

    chain = Chain.at(folder)
    chain.redo(name)
    console.print(f"In force again: {name}.", soft_wrap=True)
    for part in show.stale_in(chain):
        console.print(part, soft_wrap=True)


@command()
def log(folder: Folder):
    """List the edits of a chain, oldest first."""
    from horse_plugin.cli import show
    from horse_plugin.editing.chain import Chain

    console.print(show.log(Chain.at(folder)))


@command(name="show")
def show_edit(
    folder: Folder,
    failed: Annotated[bool, typer.Option(help="Only the facts that do not hold.")] = False,
    skip: Annotated[int, typer.Option(help="Facts of each edit to leave out first.", min=0)] = 0,
    facts: Annotated[int, typer.Option(help="Facts of each edit to show after them.", min=1)] = 10,
):
    """Print what an edit is: its facts, model, settings, versions and figures."""
    from horse_plugin.cli import show
    from horse_plugin.editing.chain import Chain, read_edits
    from horse_plugin.editing.delta import DELTA
    from horse_plugin.editing.standing import stale
    from horse_plugin.evaluation.facts import read_facts
    from horse_plugin.storage.hub import local

    folder = local(folder)
    deltas, is_chain = read_edits(folder), not (folder / DELTA).exists()
    others = stale(Chain(folder)) if is_chain else {}
    for delta in deltas:
        if failed:
            parts = [
                show.failed(delta.name, read_facts(folder / delta.name if is_chain else folder))
            ]
        else:
            parts = show.edit(delta, others.get(delta.name), skip, facts)
        for part in parts:
            console.print(part)
    if not deltas:
        console.print("No edit is in force.")


@command()
def report(
    folder: Annotated[Path, path_argument(help="Of an edit, a chain, a comparison, a demo …")],
    out: Annotated[Path | None, path_option(help="The page; else report.html in it.")] = None,
):
    """Draw the report of a folder, or draw it again."""
    from horse_plugin.comparison.again import report_of
    from horse_plugin.storage.files import reserved, write

    page, made = out or folder / "report.html", report_of(folder)
    with reserved(page):
        write(page, made.html())
    console.print(f"Report: {page}", soft_wrap=True)


@command()
def export(
    delta: Annotated[Path, path_option(help="An edit, or a chain of them.")],
    out: Annotated[Path, path_option(help="New folder for the model or the adapter.")],
    hparams: Hparams = DEFAULT_MODEL,
    lora: Annotated[bool, typer.Option(help="A PEFT LoRA adapter, not the whole model.")] = False,
    rank: Annotated[int | None, typer.Option(help="The adapter's rank; else exact.", min=1)] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Or the least rank with this relative error: 0.05.", min=0)
    ] = None,
):
    """Write the edited model as a Hugging Face folder, or the edit as a PEFT LoRA adapter."""
    from horse_plugin.cli import show
    from horse_plugin.editing.export import save_adapter, to_rank
    from horse_plugin.storage.files import check_empty, reserved

    if (rank or max_error) and not lora:
        raise UsageError("export: --rank and --max-error are for --lora.")
    with reserved(out):
        check_empty(out)
        editor, deltas = editor_of(hparams_of(hparams), delta)
        if lora:
            adapter = to_rank(editor, deltas, rank, max_error)
            save_adapter(adapter, editor.backbone, out, deltas)
            console.print(show.adapter(adapter))
        else:
            editor.apply_chain(deltas)
            editor.save_model(out)
    console.print(f"{'Adapter' if lora else 'Model'}: {out}", soft_wrap=True)


@command()
def push(
    folder: Annotated[Path, path_argument(help="Of an archive, edit, chain or adapter.")],
    name: Annotated[str, typer.Argument(help="Its name on the hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
):
    """Put an archive, an edit, a chain or an adapter on the Hugging Face hub, with a card."""
    from horse_plugin.editing.sharing import push

    console.print(f"Pushed: {push(folder, name, private)}", soft_wrap=True)


@command()
def pull(
    name: Annotated[str, typer.Argument(help="owner/name, or owner/name@revision.")],
    out: Annotated[Path, path_option(help="New folder for it.")],
):
    """Copy an archive, an edit, a chain or an adapter from the hub, and check it."""
    from horse_plugin.editing.sharing import pull

    console.print(f"Pulled: {pull(name, out)}, into {out}", soft_wrap=True)
