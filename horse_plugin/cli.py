"""The ``horse`` command. It parses and prints; everything else happens in the package."""

import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .errors import HorseError, UsageError

app = typer.Typer(
    help="Change thousands of facts in a language model at once, with HORSE.\n\n"
    "With --debug, anywhere on the line, errors show where they come from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Hparams = Annotated[Path, typer.Option(help="YAML with the settings, see hparams/HORSE.")]
Data = Annotated[str, typer.Option(help="Facts: JSON, JSONL, Parquet, or a hub data-set id.")]
NEdits = Annotated[int | None, typer.Option(help="How many records, from the start.", min=1)]


@app.command()
def train(
    hparams: Hparams,
    train: Annotated[str, typer.Option(help="Training facts.")],
    val: Annotated[str, typer.Option(help="Validation facts: they choose the archive to keep.")],
    out: Annotated[Path, typer.Option(help="Folder for the archive.")],
    n_edits: Annotated[int | None, typer.Option(help="Facts in one training step.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the facts.", min=1)] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUT.")] = False,
):
    """Train a hypernetwork; the best archive by validation score stays in OUT."""
    from . import HORSETrainer
    from . import archive as files

    settings = _hparams(hparams, n_edits=n_edits, max_epochs=epochs)
    if not resume and (out / files.ARCHIVE).exists():
        raise UsageError(f"{out}: holds an archive already; --resume, or name another folder.")
    files.check_writable(out)
    trainer = HORSETrainer(settings, train, val, out=out, resume=resume)
    folder = trainer.run()
    best = trainer.best
    console.print(
        f"Best at step {best['step']}: efficacy {_figure(best['efficacy'])}, generalization "
        f"{_figure(best['generalization'])}, specificity {_figure(best['specificity'])}."
    )
    console.print(f"Archive: {folder}", soft_wrap=True)


@app.command()
def edit(
    hparams: Hparams,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the delta and results.json.")],
    archive: Annotated[Path | None, typer.Option(help="Trained archive; none: untrained.")] = None,
    n_edits: NEdits = None,
    save_model: Annotated[
        Path | None, typer.Option(help="Also save the edited model here.")
    ] = None,
):
    """Edit all the facts at once, measure the edit, save it as a delta."""
    from . import Evaluator, HorseEditor, load_records, results
    from . import archive as files

    settings = _hparams(hparams, archive=archive and str(archive))
    records = load_records(data, n_edits)
    files.check_writable(out)
    if save_model:
        files.check_empty(save_model)
    if not settings.archive:
        _say("No archive: the hypernetwork is untrained. `horse train` makes one.")
    editor = HorseEditor.from_hparams(settings)
    editor.backbone.progress = True
    evaluator = Evaluator(editor.backbone, records, settings.batch_tokens, settings.max_length)
    before = evaluator.evaluate()
    delta = editor.edit(records)
    after = evaluator.evaluate()
    rows = [
        results.row("unedited", Path(data).stem, settings, before),
        results.row(settings.alg_name, Path(data).stem, settings, after, delta.about["seconds"]),
    ]
    delta.save(out)
    results.save(out / "results.json", rows)
    if save_model:
        editor.save_model(save_model)
    _table(rows)
    console.print(f"Delta: {out}", soft_wrap=True)


@app.command(name="eval")
def evaluate(
    hparams: Hparams,
    data: Data,
    delta: Annotated[Path | None, typer.Option(help="An edit to measure; none: the model.")] = None,
    n_edits: NEdits = None,
    out: Annotated[Path | None, typer.Option(help="Where to write results.json.")] = None,
):
    """Measure the model, or an edit of it, on facts."""
    from . import Evaluator, HorseEditor, load_records, results
    from . import archive as files

    settings = _hparams(hparams)
    settings.archive = None  # a delta is applied as it is; no network is needed
    records = load_records(data, n_edits)
    loaded = HorseEditor.load_delta(delta) if delta else None
    if out:
        files.check_writable(out.parent)
    editor = HorseEditor.from_hparams(settings)
    editor.backbone.progress = True
    evaluator = Evaluator(editor.backbone, records, settings.batch_tokens, settings.max_length)
    if loaded:
        editor.apply(loaded)
    name = loaded.about["hparams"]["alg_name"] if loaded else "unedited"
    rows = [results.row(name, Path(data).stem, settings, evaluator.evaluate())]
    if out:
        results.save(out, rows)
    _table(rows)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the archive, the edit and the report.")],
    hparams: Annotated[Path | None, typer.Option(help="Another model's YAML.")] = None,
):
    """Train on real facts, edit 200 at once, show what happened. Needs no file of yours."""
    from .demo import run

    settings = _hparams(hparams) if hparams else None
    outcome = run(out, settings)
    _table(outcome.rows)
    facts = Table(
        *("prompt", "before", "after", "asked for"), title="Ten of the edited facts", box=box.SIMPLE
    )
    for example in outcome.examples:
        facts.add_row(*example)
    console.print(facts)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Where to write the figures, as JSON.")],
    hparams: Annotated[Path | None, typer.Option(help="Another model's YAML.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A model's config: the same with random weights.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Facts; the embedded ones by default.")] = None,
    n_edits: Annotated[int, typer.Option(help="Facts edited at once.", min=1)] = 500,
):
    """Time and memory of every stage of an edit, beside the least this machine could take."""
    from . import archive as files
    from . import load_records, results
    from .backbone import Backbone
    from .bench import bench as measure
    from .demo import FACTS, default_hparams
    from .loading import random_model

    settings = _hparams(hparams) if hparams else default_hparams()
    files.check_writable(out.parent)
    records = load_records(data or FACTS / "train.json", n_edits)
    settings.n_edits = len(records)
    if config:
        settings.inner_params = []
        backbone = Backbone(*random_model(config, settings), (), settings.trunk_cache_gb)
    else:
        backbone = Backbone.load(settings)
    found = measure(backbone, settings, records)
    results.save(out, [found])
    total = sum(s["seconds"] for s in found["stages"])
    title = f"{found['n_edits']} edits, {found['dtype']}, {found['device']}"
    table = Table("stage", title=title, box=box.SIMPLE)
    for name in ("seconds", "share", "floor", "peak MB"):
        table.add_column(name, justify="right")
    for s in found["stages"] + found["others"]:
        share = f"{100 * s['seconds'] / total:.0f}%" if s in found["stages"] else ""
        floor = "" if s["floor_seconds"] is None else f"{s['floor_seconds']:.4f}"
        table.add_row(s["name"], f"{s['seconds']:.4f}", share, floor, f"{s['peak_memory_mb']:.0f}")
    console.print(table)


def _hparams(path: Path, **overrides):
    from . import HORSEHyperParams

    settings = HORSEHyperParams.from_hparams(path)
    return replace(settings, **{k: v for k, v in overrides.items() if v is not None})


def _table(rows: list[dict]):
    figures = ("efficacy", "generalization", "specificity", "locality", "portability")
    shown = [f for f in figures if any(r[f] is not None for r in rows)]
    table = Table(title=f"{rows[0]['dataset']}, percent", box=box.SIMPLE)
    table.add_column("method")
    for name in ("edits", *shown, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        seconds = "" if r["edit_seconds"] is None else f"{r['edit_seconds']:.1f}"
        table.add_row(r["method"], str(r["n_edits"]), *(_figure(r[f]) for f in shown), seconds)
    console.print(table)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _say(message: str):
    print(message, file=sys.stderr)


def run():
    """Entry point: exit code 0 done, 1 failed, 2 bad usage; one line on an error."""
    debug = "--debug" in sys.argv[1:]
    if debug:  # anywhere on the line, not only before the command
        sys.argv = [a for a in sys.argv if a != "--debug"]
    else:
        warnings.showwarning = lambda message, *args, **kwargs: _say(f"warning: {message}")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except KeyboardInterrupt:
        _say("horse: stopped.")
        sys.exit(1)
    except Exception as error:  # ours, or a bug of ours or of a library below: one line
        if debug:
            traceback.print_exc()
        _say(f"horse: {_one_line(error)}")
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _one_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or ["no reason given"])[0]
    known = isinstance(error, HorseError)
    return line if known else f"{type(error).__name__}: {line} (--debug shows where)"
