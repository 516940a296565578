"""Commands that measure: a model, an edit, methods side by side, the code itself."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from horse_plugin.assets import DEFAULT_MODEL, FACTS
from horse_plugin.cli.app import app, console, say
from horse_plugin.cli.options import (
    AnotherModel,
    Datas,
    Delta,
    Hparams,
    NEdits,
    Seeds,
    Trains,
    Vals,
    batches_of,
    command_line,
    editor_of,
    hparams_of,
    names_of,
    numbers_of,
    path_option,
)
from horse_plugin.errors import UsageError, visible

if TYPE_CHECKING:
    from horse_plugin.hparams import HORSEHyperParams

command = functools.partial(app.command, rich_help_panel="Measure")


@command(name="eval")
def evaluate(
    data: Annotated[
        str | None, typer.Option(help="Facts; none: those of the edits in --delta.")
    ] = None,
    hparams: Hparams = DEFAULT_MODEL,
    delta: Delta = None,
    n_edits: NEdits = None,
    out: Annotated[
        Path | None, path_option(help="Where to write the row, and beside it OUT-facts.csv.")
    ] = None,
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
    from horse_plugin.evaluation import probability, results, written
    from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
    from horse_plugin.evaluation.facts import fact_rows, save_facts
    from horse_plugin.evaluation.judge import Judge
    from horse_plugin.evaluation.metrics import Evaluator
    from horse_plugin.storage.files import reserved

    if data is None and (delta is None or n_edits or generate or probabilities):
        raise UsageError("eval: give --data, or --delta for the facts of its edits.")
    settings = hparams_of(hparams)
    generate = generate or bool(data and settings.evaluation_type)
    if judge and not (generate and out):
        raise UsageError("eval: --judge needs --generate, and --out for the answers to keep.")
    if data is None:
        _evaluate_edits(settings, delta, out)
        return
    records = load_records(data, n_edits)
    if probabilities:
        probability.comparisons(records)  # refuses facts that have none before the work
    grader = Judge(judge, judge_model) if judge else None
    beside = ("facts.csv", "written.csv", "judged.jsonl")
    facts, texts_file, judged = (out and out.with_name(f"{out.stem}-{name}") for name in beside)
    with contextlib.ExitStack() as stack:
        for path in (out, facts, texts_file, judged) if out else ():
            stack.enter_context(reserved(path))
        editor, deltas = editor_of(settings, delta)
        text = OrdinaryText(editor.backbone, heldout_pieces())
        evaluator = Evaluator(editor.backbone, records, text=text, writing=True)
        editor.apply_chain(deltas)
        evaluation = evaluator.evaluate() if deltas else evaluator.before
        name = deltas[-1].about["hparams"]["alg_name"] if deltas else "unedited"
        rows = [results.row(name, visible(Path(data).stem), settings, evaluation)]
        texts = written.write_answers(editor.backbone, records) if generate else []
        if probabilities:
            parts = editor.backbone, records
            rows[0]["probabilities"] = probability.success_and_magnitude(*parts)
        if grader and is_main_process():  # the others, if any, have nothing left to do
            say(f"The judge gets {grader.cost(texts, judged)}.")
            yes or typer.confirm("Go on?", abort=True, err=True)
            texts = grader.grade(texts, judged)
        if generate:
            rows[0]["generated"] = written.figures(texts)
        if out and is_main_process():
            results.save(out, rows)
            parts = editor.backbone.tokenizer, evaluator.before, evaluation
            save_facts(facts, fact_rows(evaluator.edits, *parts))
            if texts:
                save_facts(texts_file, written.rows(texts))
    console.print(show.figures(rows))
    if generate:
        console.print(show.printed(written.table(rows[0]["generated"])))
    if probabilities:
        console.print(show.printed(probability.table(rows[0]["probabilities"])))


def _evaluate_edits(settings: "HORSEHyperParams", delta: Path, out: Path | None):
    """Measure each edit in the folder ``delta`` on its own facts; a chain keeps what was found."""
    from horse_plugin.cli import show
    from horse_plugin.distributed import is_main_process
    from horse_plugin.editing.chain import Chain
    from horse_plugin.editing.delta import CHAIN_FILE
    from horse_plugin.editing.standing import measure_again
    from horse_plugin.evaluation import results
    from horse_plugin.storage.files import locked_folder, reserved

    with contextlib.ExitStack() as stack:
        if out:
            stack.enter_context(reserved(out))
        chain = None
        if (delta / CHAIN_FILE).exists():
            chain = Chain(stack.enter_context(locked_folder(delta)))
        editor, deltas = editor_of(settings, delta)
        rows = measure_again(editor, deltas)
        if not is_main_process():
            return
        if chain:
            chain.save_now(rows)
        if out:
            results.save(out, rows)
    console.print(show.figures(rows))


@command()
def compare(
    out: Annotated[Path, path_option(help="Folder for tables, report and results.json.")],
    methods: Annotated[str, typer.Option(help="Names, comma-separated; all by default.")] = "",
    data: Datas = None,
    train: Trains = None,
    val: Vals = None,
    n_edits: Annotated[str, typer.Option(help="Numbers of edits: 100,500.")] = "",
    sequential: Annotated[
        str, typer.Option(help="Batches one after the other, instead: 20x100.")
    ] = "",
    models: Annotated[str, typer.Option(help="Stems of YAMLs in <hparams-dir>/<method>.")] = "",
    hparams_dir: Annotated[Path | None, path_option(help="Folder of YAMLs.")] = None,
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

    numbers, batch = numbers_of("n-edits", n_edits), None
    if sequential:
        if numbers:
            raise UsageError("--sequential: says how many edits there are; leave --n-edits out.")
        numbers, batch = batches_of(sequential)
    rows = experiments.compare(
        out,
        methods=names_of(methods),
        models=names_of(models),
        datasets=experiments.data_sets(data or (), train or (), val or ()),
        n_edits=numbers,
        seeds=numbers_of("seeds", seeds, least=0),
        hparams_dir=hparams_dir,
        corpus=corpus,
        quick=quick,
        check=check,
        batch=batch,
        command=command_line(),
        probabilities=probabilities,
    )
    _compared(out, rows)


@command()
def ablate(
    out: Annotated[Path, path_option(help="Folder for tables, report and results.json.")],
    hparams: Hparams = DEFAULT_MODEL,
    archive: Annotated[Path | None, path_option(help="The full method's; else trained.")] = None,
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
        hparams=hparams,
        datasets=experiments.data_sets(data or (), train or (), val or ()),
        n_edits=numbers_of("n-edits", n_edits),
        seeds=numbers_of("seeds", seeds, least=0),
        archive=archive and str(archive),
        rows=names_of(rows),
        command=command_line(),
    )
    _compared(out, measured)


@command()
def general(
    out: Annotated[Path, path_option(help="Folder for results.json and table.md.")],
    hparams: Hparams = DEFAULT_MODEL,
    delta: Annotated[Path | None, path_option(help="An edit, or a chain of them.")] = None,
    model: Annotated[Path | None, path_option(help="Or a folder with the edited model.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "mmlu,nli,mrpc,qnli,qqp,commonsenseqa",
    data: Annotated[
        Path | None, path_option(help="Folder of <task>.jsonl; none: tasks from the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task, at most.", min=1)] = None,
    include: Annotated[
        Path | None, path_option(help="Folder of the harness's YAMLs: tasks of your own.")
    ] = None,
    text: Annotated[Path | None, path_option(help="A text, for drift and perplexity.")] = None,
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
        editor, deltas = editor_of(hparams_of(hparams), delta)
        asked = {"tasks": names_of(tasks), "data": data, "limit": limit, "include": include}
        edited = editor.backbone
        if model:  # before the work, so that a wrong name costs nothing
            edited = Backbone.load(replace(editor.hparams, model_name=str(model)))
        ordinary = text and OrdinaryText(editor.backbone, heldout_pieces(text))
        before = general_ability.measure(editor.backbone, **asked)
        editor.apply_chain(deltas)
        after = general_ability.measure(edited, **asked)
        for when, found in (("before", before), ("after", after)):
            found.save(out, when)
        rows = general_ability.rows(before, after)
        if ordinary:
            costs = ordinary.before, ordinary.measure(edited)
            rows += general_ability.rows_of_text(text.stem, *costs)
        rows = [row | {"command": command_line()} for row in rows]
        results.save(out / "results.json", rows)
        table = general_ability.table(rows)
        write(out / "table.md", table.markdown())
    found = general_ability.verdict(rows)
    for part in (*(show.judged(found) if found else ()), show.printed(table)):
        console.print(part)
    for note in table.notes:
        console.print(note, soft_wrap=True)


@command()
def demo(
    out: Annotated[Path, path_option(help="Folder for the archive, the edit and the report.")],
    hparams: AnotherModel = None,
):
    """Train on real facts, edit 200 at once, show what happened. Needs no file of yours."""
    from horse_plugin.cli import show
    from horse_plugin.comparison.demo import run_demo

    settings = hparams_of(hparams) if hparams else None
    outcome = run_demo(out, settings, command=command_line())
    console.print(show.figures(outcome.rows))
    console.print(show.examples(outcome.examples))
    console.print(outcome.training)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@command()
def bench(
    out: Annotated[Path, path_option(help="Where to write the figures, as JSON.")],
    hparams: Hparams = DEFAULT_MODEL,
    config: Annotated[
        Path | None, path_option(help="Config of a model, which gets random weights.")
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

    settings = hparams_of(hparams)
    with reserved(out):
        records = load_records(data or FACTS / "train.json", n_edits)
        settings = settings.in_steps_of(len(records))
        if config:
            settings.inner_params, settings.archive = [], None
            backbone = Backbone.of(*random_model(config, settings), settings)
        else:
            backbone = Backbone.load(settings)
        found = run_bench(backbone, settings, records)
        results.save(out, [found])
    console.print(show.stages(found))


def _compared(out: Path, rows: list[dict]):
    from horse_plugin.cli import show

    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        console.print(show.figures([row for row in rows if row["dataset"] == dataset]))
    for row in rows:
        if row.get("reason"):
            say(f"{row['method']}, {row['n_edits']} edits: {row['reason']}")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
