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

Datas = Annotated[list[str] | None, typer.Option(help="Facts to edit; may be repeated.")]
Trains = Annotated[list[str] | None, typer.Option(help="Training facts, one for each --data.")]
Vals = Annotated[list[str] | None, typer.Option(help="Validation facts, one for each --data.")]
Seeds = Annotated[str, typer.Option(help="Seeds, comma-separated.")]


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
def compare(
    out: Annotated[Path, typer.Option(help="Folder for tables, report and results.json.")],
    methods: Annotated[str, typer.Option(help="Names, comma-separated; all by default.")] = "",
    data: Datas = None,
    train: Trains = None,
    val: Vals = None,
    n_edits: Annotated[str, typer.Option(help="Numbers of edits: 100,500.")] = "",
    models: Annotated[str, typer.Option(help="Stems of YAMLs in <hparams-dir>/<method>.")] = "",
    hparams_dir: Annotated[Path | None, typer.Option(help="Folder of YAMLs.")] = None,
    seeds: Seeds = "0",
    corpus: Annotated[
        str | None, typer.Option(help="Text for statistics; none: the training facts.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Three methods, 50 edits, a few minutes.")] = False,
):
    """Methods side by side, as the paper's Table 1. Run again, it goes on where it stopped."""
    from . import compare as sides

    rows = sides.compare(
        out,
        _names(methods),
        _names(models),
        sides.data_sets(data or (), train or (), val or ()),
        _numbers("n-edits", n_edits),
        _numbers("seeds", seeds, least=0),
        hparams_dir,
        corpus,
        quick,
    )
    _compared(out, rows)


@app.command()
def ablate(
    out: Annotated[Path, typer.Option(help="Folder for tables, report and results.json.")],
    hparams: Annotated[Path | None, typer.Option(help="YAML; the default model's if none.")] = None,
    archive: Annotated[Path | None, typer.Option(help="The full method's; none: trained.")] = None,
    data: Datas = None,
    train: Trains = None,
    val: Vals = None,
    n_edits: Annotated[str, typer.Option(help="Numbers of edits: 100,500.")] = "100",
    seeds: Seeds = "0",
    rows: Annotated[str, typer.Option(help="Names of rows, comma-separated; all if none.")] = "",
):
    """What each part of HORSE brings, as the paper's Table 2."""
    from . import compare as sides

    measured = sides.ablate(
        out,
        hparams,
        sides.data_sets(data or (), train or (), val or ()),
        _numbers("n-edits", n_edits),
        _numbers("seeds", seeds, least=0),
        archive and str(archive),
        _names(rows),
    )
    _compared(out, measured)


@app.command()
def stats(
    hparams: Annotated[list[Path], typer.Option(help="YAML of MEMIT, PMET, …; may be repeated.")],
    corpus: Annotated[str, typer.Option(help="File of text or facts, or a hub data-set id.")],
    out: Annotated[Path | None, typer.Option(help="Instead of the YAML's stats_dir.")] = None,
):
    """Second-moment statistics of any text, in the files that EasyEdit's MEMIT family reads."""
    from .compare.stats import from_yamls

    for path in from_yamls(hparams, corpus, out):
        console.print(f"Written: {path}", soft_wrap=True)


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


def _hparams(path: Path, **overrides):
    from . import HORSEHyperParams

    settings = HORSEHyperParams.from_hparams(path)
    return replace(settings, **{k: v for k, v in overrides.items() if v is not None})


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    numbers = _names(text)
    if not all(n.isdigit() and int(n) >= least for n in numbers):
        raise UsageError(f"--{option}: expected whole numbers from {least}, got {text!r}.")
    return [int(n) for n in numbers]


def _compared(out: Path, rows: list[dict]):
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        _table([row for row in rows if row["dataset"] == dataset])
    for row in rows:
        if row.get("reason"):
            _say(f"{row['method']}, {row['n_edits']} edits: {row['reason']}")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


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
