"""The ``horse`` command. It parses and prints; everything else happens in the package.

Each command imports what it needs when it runs. Torch takes seconds to load, and help, versions and
completions need none of it.
"""

import contextlib
import os
import shlex
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from horse_plugin.assets import DEFAULT_MODEL, FACTS, shipped_yamls
from horse_plugin.cli.console import PlainConsole
from horse_plugin.errors import HorseError, UsageError, first_line, reason, visible

if TYPE_CHECKING:
    from horse_plugin.editing.delta import EditDelta
    from horse_plugin.editing.editor import HorseEditor
    from horse_plugin.hparams import HORSEHyperParams


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


def _yamls(begun: str) -> list[str]:
    """Complete the name of a shipped YAML."""
    return [name for name in shipped_yamls() if name.startswith(begun)]


Hparams = Annotated[
    str,
    typer.Option(help="YAML with settings, or a shipped one's name.", autocompletion=_yamls),
]
AnotherModel = Annotated[
    str | None, typer.Option(help="Another model's YAML.", autocompletion=_yamls)
]
Data = Annotated[str, typer.Option(help="Facts: JSON, JSONL, Parquet, or a hub data-set id.")]
Folder = Annotated[Path, typer.Argument(help="The folder of an edit, or of a chain of them.")]
Delta = Annotated[
    Path | None,
    typer.Option(help="An edit, or a chain of them, also owner/name on the hub; none: the model."),
]
NEdits = Annotated[int | None, typer.Option(help="How many records, from the start.", min=1)]

Datas = Annotated[list[str] | None, typer.Option(help="Facts to edit; may be repeated.")]
Trains = Annotated[list[str] | None, typer.Option(help="Training facts, one for each --data.")]
Vals = Annotated[list[str] | None, typer.Option(help="Validation facts, one for each --data.")]
Seeds = Annotated[str, typer.Option(help="Seeds, comma-separated.")]


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="The model's folder, or its hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path(),
):
    """Write a YAML for a model, with what is found in it, and facts.json to fill in."""
    from horse_plugin.editing.settings import EXAMPLE_FACTS, yaml_for
    from horse_plugin.storage.files import reserved, write

    yaml, facts = out / f"{Path(model).expanduser().resolve().name}.yaml", out / "facts.json"
    with reserved(yaml):
        if yaml.exists():
            raise UsageError(f"{yaml}: there is something already; choose another --out.")
        write(yaml, yaml_for(model))
    if not facts.exists():
        write(facts, EXAMPLE_FACTS)
    console.print(
        f"Written: {yaml}. Put your facts into {facts}, and then: "
        f"horse edit --hparams {yaml} --data {facts} --out edit",
        soft_wrap=True,
    )


@app.command()
def train(
    train: Annotated[str, typer.Option(help="Training facts.")],
    val: Annotated[str, typer.Option(help="Validation facts: they choose the archive to keep.")],
    out: Annotated[Path, typer.Option(help="Folder for the archive.")],
    hparams: Hparams = DEFAULT_MODEL,
    edits_per_step: Annotated[
        int | None,
        typer.Option("--edits-per-step", "--n-edits", help="Facts in one training step.", min=1),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the facts.", min=1)] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUT.")] = False,
    log: Annotated[
        str | None, typer.Option(help="Where to watch it: tensorboard, trackio or wandb.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Only say steps, memory and time, after one step of it.")
    ] = False,
):
    """Train a hypernetwork; the best archive by validation score stays in OUT."""
    from horse_plugin.cli import show
    from horse_plugin.editing.archive import ARCHIVE
    from horse_plugin.evaluation.tables import number
    from horse_plugin.storage.files import locked_folder
    from horse_plugin.training.logs import ready_log
    from horse_plugin.training.trainer import HORSETrainer

    settings = _hparams(hparams, edits_per_step=edits_per_step, max_epochs=epochs)
    if not resume and (out / ARCHIVE).exists():
        raise UsageError(f"{out}: holds an archive already; --resume, or name another folder.")
    if dry_run:
        trainer = HORSETrainer(settings, train, val, out=out, resume=resume)
        console.print(show.forecast(trainer.dry_run(), trainer.backbone.edit_device))
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_folder(out))
        watched = stack.enter_context(ready_log(log, out, settings.to_dict())) if log else None
        trainer = HORSETrainer(settings, train, val, out=out, resume=resume, log=watched)
        folder = trainer.run()
    if best := trainer.best:
        console.print(
            f"Best at step {best['step']}: efficacy {number(best['efficacy'])}, generalization "
            f"{number(best['generalization'])}, specificity {number(best['specificity'])}, "
            f"locality {number(best['locality'])}, drift {number(best['drift'], 3)} nats a token."
        )
    console.print(f"Archive: {folder}", soft_wrap=True)


@app.command()
def edit(
    data: Annotated[
        str | None, typer.Option(help="Facts; none, with --onto: those in force, anew.")
    ] = None,
    hparams: Hparams = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option(help="Folder for the edit, by itself.")] = None,
    onto: Annotated[Path | None, typer.Option(help="Chain of edits to put it on top of.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name; else a number, or OUT's.")] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Trained archive, shipped, or untrained; none: the YAML's.")
    ] = None,
    n_edits: NEdits = None,
    save_model: Annotated[
        Path | None, typer.Option(help="Also save the edited model here.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Refuse conflicts; undo a bad edit.")] = False,
    max_drift: Annotated[
        float | None, typer.Option(help="Most drift of ordinary text, in nats a token: 0.05.")
    ] = None,
    heldout: Annotated[Path | None, typer.Option(help="Text for drift and perplexity.")] = None,
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
    settings = _hparams(hparams, archive=archive and str(archive), max_drift=max_drift)
    records = None if data is None else load_records(data, n_edits)
    with contextlib.ExitStack() as stack:
        if save_model:
            stack.enter_context(reserved(save_model))
            check_empty(save_model)
        folder = stack.enter_context(locked_folder(out or onto))
        chain = Chain(folder) if onto else None
        name = chain.new_name(name) if chain else name or folder.name
        if not chain:
            check_free(folder)
        if settings.archive in (None, UNTRAINED):
            _say("No archive: the hypernetwork is untrained. `horse train` makes one.")
        editor = HorseEditor.from_hparams(settings, progress=True)
        if chain:
            editor.apply_chain(chain.deltas())
        dataset = "facts in force" if data is None else visible(Path(data).stem)
        options = dataset, name, strict, heldout, max_rise
        delta, rows = checked_edit(editor, records, *options, unfinished=folder)
        delta.about["command"] = _command()
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


@app.command(name="eval")
def evaluate(
    data: Annotated[
        str | None, typer.Option(help="Facts; none: those of the edits in --delta.")
    ] = None,
    hparams: Hparams = DEFAULT_MODEL,
    delta: Delta = None,
    n_edits: NEdits = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the row, and facts.csv.")] = None,
    generate: Annotated[bool, typer.Option(help="Let the model write its answers, too.")] = False,
    probabilities: Annotated[
        bool, typer.Option(help="CounterFact's success and magnitude, too.")
    ] = False,
    judge: Annotated[
        str | None, typer.Option(help="With --generate: URL of an OpenAI-style API that grades.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The name of the model there.")] = "default",
    yes: Annotated[bool, typer.Option("--yes", help="Ask the judge without asking you.")] = False,
):
    """Measure the model, or an edit of it, on facts; without --data, on each edit's own."""
    from horse_plugin.cli import show
    from horse_plugin.data.formats import load_records
    from horse_plugin.distributed import is_main_process
    from horse_plugin.editing.chain import Chain
    from horse_plugin.editing.delta import CHAIN_FILE
    from horse_plugin.editing.standing import measure_again
    from horse_plugin.evaluation import probability, results, written
    from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
    from horse_plugin.evaluation.facts import fact_rows, save_facts
    from horse_plugin.evaluation.judge import Judge
    from horse_plugin.evaluation.metrics import Evaluator
    from horse_plugin.storage.files import locked_folder, reserved

    if data is None and (delta is None or n_edits or generate or probabilities):
        raise UsageError("eval: give --data, or --delta for the facts of its edits.")
    settings, records = _hparams(hparams), load_records(data, n_edits) if data else []
    generate = generate or bool(data and settings.evaluation_type)
    if judge and not (generate and out):
        raise UsageError("eval: --judge needs --generate, and --out for the answers to keep.")
    grader = Judge(judge, judge_model) if judge else None
    beside = ("facts.csv", "written.csv", "judged.jsonl")
    files = [out, *(out.with_name(f"{out.stem}-{name}") for name in beside)] if out else []
    with contextlib.ExitStack() as stack:
        for path in files:
            stack.enter_context(reserved(path))
        chain = None
        if data is None and (delta / CHAIN_FILE).exists():
            chain = Chain(stack.enter_context(locked_folder(delta)))
        editor, deltas = _editor(settings, delta)
        if data is None:
            rows = measure_again(editor, deltas)
            if not is_main_process():
                return
            if chain:
                chain.save_now(rows)
            if out:
                results.save(out, rows)
            console.print(show.figures(rows))
            return
        text = OrdinaryText(editor.backbone, heldout_pieces())
        evaluator = Evaluator(editor.backbone, records, text=text, writing=True)
        editor.apply_chain(deltas)
        evaluation = evaluator.evaluate() if deltas else evaluator.before
        name = deltas[-1].about["hparams"]["alg_name"] if deltas else "unedited"
        rows = [results.row(name, visible(Path(data).stem), settings, evaluation)]
        texts = written.write_answers(editor.backbone, records) if generate else []
        if grader:
            _say(f"The judge gets {grader.cost(texts, files[3])}.")
            yes or typer.confirm("Go on?", abort=True, err=True)
            texts = grader.grade(texts, files[3])
        if generate:
            rows[0]["generated"] = written.figures(texts)
        if probabilities:
            parts = editor.backbone, records
            rows[0]["probabilities"] = probability.success_and_magnitude(*parts)
        if out and is_main_process():
            results.save(out, rows)
            parts = editor.backbone.tokenizer, evaluator.before, evaluation
            save_facts(files[1], fact_rows(evaluator.edits, *parts))
            if texts:
                save_facts(files[2], list(map(asdict, texts)))
    console.print(show.figures(rows))
    if generate:
        console.print(show.printed(written.table(rows[0]["generated"])))
    if probabilities:
        console.print(show.printed(probability.table(rows[0]["probabilities"])))


@app.command()
def ask(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to ask; none: a conversation.")
    ] = None,
    hparams: Hparams = DEFAULT_MODEL,
    delta: Delta = None,
    file: Annotated[Path | None, typer.Option(help="File of prompts, one a line.")] = None,
    chat: Annotated[bool, typer.Option(help="Ask through the model's chat template.")] = False,
    before: Annotated[bool, typer.Option(help="Show the unedited model's answer, too.")] = False,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 50,
):
    """Ask the model, or an edit of it, and read what it writes."""
    from horse_plugin.cli.asking import answer, converse, prompts_of
    from horse_plugin.distributed import is_main_process

    prompts = [*(prompts or ()), *(prompts_of(file) if file else ())]
    editor, deltas = _editor(_hparams(hparams, chat_template=chat or None), delta)
    editor.apply_chain(deltas)
    if prompts:
        answer(editor, prompts, before, tokens)
    elif editor.backbone.lockstep.is_sharded:
        raise UsageError("ask: name what to ask; shard_trunk has no conversation.")
    elif is_main_process():  # who alone has the terminal
        converse(editor, before, tokens)


@app.command()
def play(
    hparams: Hparams = DEFAULT_MODEL,
    onto: Annotated[Path | None, typer.Option(help="Chain of edits; none: nothing stays.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; else a free one from 7860 on.")] = None,
):
    """Ask, switch edits on and off, and add facts, on a page in your browser."""
    from horse_plugin.cli.play import Session, page_of, serve
    from horse_plugin.editing.chain import Chain
    from horse_plugin.editing.editor import HorseEditor

    settings = _hparams(hparams)
    with tempfile.TemporaryDirectory() as folder:
        editor = HorseEditor.from_hparams(settings, progress=True)
        if editor.backbone.lockstep.is_sharded:
            raise UsageError("play: shard_trunk has no page; horse ask takes what to ask.")
        page = page_of(Session(editor, Chain(onto or folder)), Path(settings.model_name).name)
        console.print(f"Open {serve(page, port)} in a browser; Ctrl-C ends it.", soft_wrap=True)
        page.block_thread()


@app.command(name="show")
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


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of an edit, a chain, a comparison, a demo …")],
    out: Annotated[Path | None, typer.Option(help="The page; else report.html in it.")] = None,
):
    """Draw the report of a folder, or draw it again."""
    from horse_plugin.comparison.again import report_of
    from horse_plugin.storage.files import reserved, write

    page, made = out or folder / "report.html", report_of(folder)
    with reserved(page):
        write(page, made.html())
    console.print(f"Report: {page}", soft_wrap=True)


@app.command()
def log(folder: Folder):
    """List the edits of a chain, oldest first."""
    from horse_plugin.cli import show
    from horse_plugin.editing.chain import Chain

    console.print(show.log(Chain.at(folder)))


@app.command()
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


@app.command()
def redo(folder: Folder, name: Annotated[str, typer.Argument(help="The edit's name.")]):
    """Put an undone edit back into its place in a chain."""
    from horse_plugin.cli import show
    from horse_plugin.editing.chain import Chain

    chain = Chain.at(folder)
    chain.redo(name)
    console.print(f"In force again: {name}.", soft_wrap=True)
    for part in show.stale_in(chain):
        console.print(part, soft_wrap=True)


@app.command()
def export(
    delta: Annotated[Path, typer.Option(help="An edit, or a chain of them.")],
    out: Annotated[Path, typer.Option(help="New folder for the model or the adapter.")],
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
        editor, deltas = _editor(_hparams(hparams), delta)
        if lora:
            adapter = to_rank(editor, deltas, rank, max_error)
            save_adapter(adapter, editor.backbone, out, deltas)
            console.print(show.adapter(adapter))
        else:
            editor.apply_chain(deltas)
            editor.save_model(out)
    console.print(f"{'Adapter' if lora else 'Model'}: {out}", soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Of an archive, edit, chain or adapter.")],
    name: Annotated[str, typer.Argument(help="Its name on the hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
):
    """Put an archive, an edit, a chain or an adapter on the Hugging Face hub, with a card."""
    from horse_plugin.editing.sharing import push

    console.print(f"Pushed: {push(folder, name, private)}", soft_wrap=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="owner/name, or owner/name@revision.")],
    out: Annotated[Path, typer.Option(help="New folder for it.")],
):
    """Copy an archive, an edit, a chain or an adapter from the hub, and check it."""
    from horse_plugin.editing.sharing import pull

    console.print(f"Pulled: {pull(name, out)}, into {out}", soft_wrap=True)


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder for tables, report and results.json.")],
    methods: Annotated[str, typer.Option(help="Names, comma-separated; all by default.")] = "",
    data: Datas = None,
    train: Trains = None,
    val: Vals = None,
    n_edits: Annotated[str, typer.Option(help="Numbers of edits: 100,500.")] = "",
    sequential: Annotated[
        str, typer.Option(help="Batches one after the other, instead: 20x100.")
    ] = "",
    models: Annotated[str, typer.Option(help="Stems of YAMLs in <hparams-dir>/<method>.")] = "",
    hparams_dir: Annotated[Path | None, typer.Option(help="Folder of YAMLs.")] = None,
    seeds: Seeds = "0",
    corpus: Annotated[
        str, typer.Option(help="Text for the baselines' statistics: file, hub id or shipped.")
    ] = "shipped",
    quick: Annotated[bool, typer.Option(help="Three methods, 50 edits, a few minutes.")] = False,
    check: Annotated[
        int, typer.Option(help="Records on which EasyEdit's metrics are computed as well.", min=0)
    ] = 0,
    probabilities: Annotated[
        bool, typer.Option(help="CounterFact's success and magnitude, too.")
    ] = False,
):
    """Methods side by side, as the paper's Table 1. Run again, it goes on where it stopped."""
    from horse_plugin.comparison import experiments

    numbers, batch = _numbers("n-edits", n_edits), None
    if sequential:
        if numbers:
            raise UsageError("--sequential: says how many edits there are; leave --n-edits out.")
        numbers, batch = _batches(sequential)
    rows = experiments.compare(
        out,
        _names(methods),
        _names(models),
        experiments.data_sets(data or (), train or (), val or ()),
        numbers,
        _numbers("seeds", seeds, least=0),
        hparams_dir,
        corpus,
        quick,
        check,
        batch,
        _command(),
        probabilities,
    )
    _compared(out, rows)


@app.command()
def ablate(
    out: Annotated[Path, typer.Option(help="Folder for tables, report and results.json.")],
    hparams: Hparams = DEFAULT_MODEL,
    archive: Annotated[Path | None, typer.Option(help="The full method's; else trained.")] = None,
    data: Datas = None,
    train: Trains = None,
    val: Vals = None,
    n_edits: Annotated[str, typer.Option(help="Numbers of edits: 100,500.")] = "100",
    seeds: Seeds = "0",
    rows: Annotated[str, typer.Option(help="Names of rows, comma-separated; all if none.")] = "",
):
    """What each part of HORSE brings, as the paper's Table 2."""
    from horse_plugin.comparison import experiments

    measured = experiments.ablate(
        out,
        hparams,
        experiments.data_sets(data or (), train or (), val or ()),
        _numbers("n-edits", n_edits),
        _numbers("seeds", seeds, least=0),
        archive and str(archive),
        _names(rows),
        _command(),
    )
    _compared(out, measured)


@app.command()
def stats(
    hparams: Annotated[list[Path], typer.Option(help="YAML of MEMIT, PMET, …; may be repeated.")],
    corpus: Annotated[
        str, typer.Option(help="File of text or facts, a hub data-set id, or shipped.")
    ] = "shipped",
    out: Annotated[Path | None, typer.Option(help="Instead of the YAML's stats_dir.")] = None,
):
    """Second-moment statistics of any text, in the files that EasyEdit's MEMIT family reads."""
    from horse_plugin.comparison.baselines.stats import statistics_of_yamls

    for path in statistics_of_yamls(hparams, corpus, out):
        console.print(f"Written: {path}", soft_wrap=True)


@app.command()
def general(
    out: Annotated[Path, typer.Option(help="Folder for results.json and table.md.")],
    hparams: Hparams = DEFAULT_MODEL,
    delta: Annotated[Path | None, typer.Option(help="An edit, or a chain of them.")] = None,
    model: Annotated[Path | None, typer.Option(help="Or a folder with the edited model.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "mmlu,nli,mrpc,qnli,qqp,commonsenseqa",
    data: Annotated[
        Path | None, typer.Option(help="Folder of <task>.jsonl; none: tasks from the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task, at most.", min=1)] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder of the harness's YAMLs: tasks of your own.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text, for drift and perplexity.")] = None,
):
    """General ability before and after an edit, as the paper's Table 3."""
    from horse_plugin.cli import show
    from horse_plugin.evaluation import general as general_ability
    from horse_plugin.evaluation import results
    from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
    from horse_plugin.model.backbone import Backbone
    from horse_plugin.storage.files import locked_folder, write

    if (delta is None) == (model is None):
        raise UsageError("general: give --delta for an edit, or --model for an edited model.")
    with locked_folder(out):
        editor, deltas = _editor(_hparams(hparams), delta)
        asked = {"tasks": _names(tasks), "data": data, "limit": limit, "include": include}
        ordinary = text and OrdinaryText(editor.backbone, heldout_pieces(text))
        before = general_ability.measure(editor.backbone, **asked)
        editor.apply_chain(deltas)
        edited = editor.backbone
        if model:
            edited = Backbone.load(replace(editor.hparams, model_name=str(model)))
        after = general_ability.measure(edited, **asked)
        for when, found in (("before", before), ("after", after)):
            found.save(out, when)
        rows = general_ability.rows(before, after)
        if ordinary:
            costs = ordinary.before, ordinary.measure(edited)
            rows += general_ability.rows_of_text(text.stem, *costs)
        rows = [row | {"command": _command()} for row in rows]
        results.save(out / "results.json", rows)
        table = general_ability.table(rows)
        write(out / "table.md", table.markdown())
    found = general_ability.verdict(rows)
    for part in (*(show.judged(found) if found else ()), show.printed(table)):
        console.print(part)
    for note in table.notes:
        console.print(note, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the archive, the edit and the report.")],
    hparams: AnotherModel = None,
):
    """Train on real facts, edit 200 at once, show what happened. Needs no file of yours."""
    from horse_plugin.cli import show
    from horse_plugin.comparison.demo import run_demo

    settings = _hparams(hparams) if hparams else None
    outcome = run_demo(out, settings, command=_command())
    console.print(show.figures(outcome.rows))
    console.print(show.examples(outcome.examples))
    console.print(outcome.training)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Where to write the figures, as JSON.")],
    hparams: Hparams = DEFAULT_MODEL,
    config: Annotated[
        Path | None, typer.Option(help="Config of a model, which gets random weights.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Facts; the shipped ones by default.")] = None,
    n_edits: Annotated[int, typer.Option(help="Facts edited at once.", min=1)] = 500,
):
    """Time and memory of every stage of an edit, beside the least this machine could take."""
    from horse_plugin.cli import show
    from horse_plugin.comparison.bench import bench as run_bench
    from horse_plugin.data.formats import load_records
    from horse_plugin.evaluation import results
    from horse_plugin.model.backbone import Backbone
    from horse_plugin.model.loading import random_model
    from horse_plugin.storage.files import reserved

    settings = _hparams(hparams)
    with reserved(out):
        records = load_records(data or FACTS / "train.json", n_edits)
        settings.edits_per_step = len(records)
        if config:
            settings.inner_params, settings.archive = [], None
            backbone = Backbone.of(*random_model(config, settings), settings)
        else:
            backbone = Backbone.load(settings)
        found = run_bench(backbone, settings, records)
        results.save(out, [found])
    console.print(show.stages(found))


@app.command()
def convert_hparams(
    files: Annotated[list[Path], typer.Argument(help="Settings of MEND, MALMEN, MEMIT or HORSE.")],
    out: Annotated[Path, typer.Option(help="The YAML to write.")],
):
    """Write a YAML of ours from other methods' of EasyEdit, or from the released code's files."""
    import yaml

    from horse_plugin.foreign import converted
    from horse_plugin.hparams import HORSEHyperParams, read_keys
    from horse_plugin.storage.files import reserved, write

    with reserved(out):
        if out.exists():
            raise UsageError(f"{out}: there is something already; choose a new name.")
        names = [f.name for f in fields(HORSEHyperParams)]
        keys, left_out = converted([read_keys(file) for file in files], names)
        HORSEHyperParams.from_dict(keys)  # names a value that does not do
        lines = [
            f"# from {', '.join(file.name for file in files)}",
            yaml.safe_dump(keys, sort_keys=False),
        ]
        lines += [f"# {key}: {why}." for key, why in left_out.items()]
        write(out, "\n".join(lines).rstrip() + "\n")
    console.print(f"{out}: {len(keys)} keys, and why {len(left_out)} others were left out.")


def _hparams(name: str, **overrides) -> "HORSEHyperParams":
    from horse_plugin.hparams import HORSEHyperParams

    settings = HORSEHyperParams.from_hparams(name)
    return replace(settings, **{k: v for k, v in overrides.items() if v is not None})


def _command() -> str:
    """Return the command line that is running, for the reports."""
    return shlex.join(["horse", *sys.argv[1:]])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    numbers = _names(text)
    if not all(n.isdigit() and int(n) >= least for n in numbers):
        raise UsageError(f"--{option}: expected whole numbers from {least}, got {text!r}.")
    return [int(n) for n in numbers]


def _batches(text: str) -> tuple[list[int], int]:
    """Return (number of edits,) and how many of them at once, of a text such as 20x100."""
    times, _, size = text.lower().partition("x")
    if not (times.isdigit() and size.isdigit() and int(times) and int(size)):
        raise UsageError(f"--sequential: expected batches x facts, such as 20x100, got {text!r}.")
    return [int(times) * int(size)], int(size)


def _compared(out: Path, rows: list[dict]):
    from horse_plugin.cli import show

    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        console.print(show.figures([row for row in rows if row["dataset"] == dataset]))
    for row in rows:
        if row.get("reason"):
            _say(f"{row['method']}, {row['n_edits']} edits: {row['reason']}")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


def _editor(
    settings: "HORSEHyperParams", delta: Path | None
) -> tuple["HorseEditor", list["EditDelta"]]:
    """Return an editor without a network, and the edits in the folder ``delta``."""
    from horse_plugin.editing.chain import read_edits
    from horse_plugin.editing.editor import HorseEditor

    deltas = read_edits(delta) if delta else []
    return HorseEditor.from_hparams(replace(settings, archive=None), progress=True), deltas


def _say(message: str, file=None):
    print(visible(message), file=file or sys.stderr)


def run():
    """Entry point: exit code 0 done, 1 failed, 2 bad usage; one line on an error."""
    # Before torch loads. Threads that spin while they wait crawl beside another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug, errors = "--debug" in sys.argv[1:], sys.stderr
    if debug:  # anywhere on the line, not only before the command
        sys.argv = [a for a in sys.argv if a != "--debug"]
    else:
        warnings.showwarning = lambda message, *args, **kwargs: _say(f"warning: {message}")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():  # of a launcher
            _join()
        app()
    except Exception as error:  # ours, or a bug of ours or of a library below: one line
        if debug:
            traceback.print_exc()
        _say(f"horse: {_one_line(error)}", errors)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _join():
    """Join the other processes; all but the main one print nothing but their errors."""
    from horse_plugin import distributed

    distributed.initialize()
    if not distributed.is_main_process():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _one_line(error: Exception) -> str:
    if isinstance(error, HorseError):
        return first_line(error)
    return f"{reason(error)} (--debug shows where)"
