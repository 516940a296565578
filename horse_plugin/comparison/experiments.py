"""The paper's Table 1, Table 2 and Fig. 2 on one's own model and data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from horse_plugin.assets import DEFAULT_MODEL, FACTS, hparams_folder
from horse_plugin.comparison.methods import ABLATIONS, METHODS, EasyEdit, Engine, Method, choose
from horse_plugin.comparison.output import write_output
from horse_plugin.comparison.plan import DataSet, Plan
from horse_plugin.comparison.runner import held_rows, run
from horse_plugin.distributed import is_main_process
from horse_plugin.errors import UsageError, counted
from horse_plugin.hparams import find_yaml
from horse_plugin.storage.files import locked_folder

# `--quick`: three methods and the model itself, trained briefly.
QUICK = {"methods": ("unedited", "FT", "MALMEN", "HORSE"), "n_edits": (50,)}
QUICK_TRAINING = {
    "edits_per_step": 100,
    "min_edits_per_step": None,
    "max_iters": 10,
    "val_interval": 10,
}


def compare(
    out,
    methods: Sequence[str] = (),
    models: Sequence[str] = (),
    datasets: Sequence[DataSet] = (),
    n_edits: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    hparams_dir=None,
    corpus: str = "shipped",
    quick: bool = False,
    check: int = 0,
    batch: int | None = None,
    command: str | None = None,
    probabilities: bool = False,
) -> list[dict]:
    """Measure methods side by side, and write tables and a report.

    What is left out has a default: all methods, 100 edits, the default model, the shipped facts.

    Args:
        out: the folder for ``results.json`` and everything else. A run that stopped goes on from
            it, and the tables show all that was ever measured into it.
        methods: names from :data:`horse_plugin.comparison.methods.METHODS`.
        models: stems of YAMLs, ``<hparams_dir>/<method>/<model>.yaml``.
        datasets: the records to edit, and to train on.
        n_edits: the numbers of facts to edit.
        seeds: the seeds to train and edit with.
        hparams_dir: the folder of the YAMLs; None is the shipped one.
        corpus: text for the second moments of the baselines; by default the shipped text that HORSE
            preserves.
        quick: whether to take fewer methods, fewer edits and less training.
        check: on how many records of each cell EasyEdit's own metrics are computed too.
        batch: how many facts to edit at once, one batch on top of those before it. Then it is
            measured, too, what each new batch leaves of the earlier ones. None is all at once.
        command: the command line that asks for it, for the report.
        probabilities: whether to measure CounterFact's success and magnitude, too.

    Returns:
        The rows, as in ``results.json``.
    """
    names = methods or (QUICK["methods"] if quick else METHODS)
    table = choose(names, METHODS)
    if quick:
        table = {name: _briefly_trained(method) for name, method in table.items()}
    folder = Path(hparams_dir or hparams_folder()).expanduser()
    plan = Plan(
        table,
        {m: folder / "HORSE" / f"{m}.yaml" for m in models or (DEFAULT_MODEL,)},
        datasets or [shipped_facts()],
        n_edits or (QUICK["n_edits"] if quick else (100,)),
        folder,
        Path(out).expanduser(),
        seeds,
        corpus,
        check,
        batch,
        command,
        probabilities,
    )
    return _measured(plan)


def _briefly_trained(method: Method) -> Method:
    if isinstance(method, Engine):
        return replace(method, changes=QUICK_TRAINING)
    if isinstance(method, EasyEdit):
        return replace(method, training=QUICK_TRAINING)
    return method


def ablate(
    out,
    hparams=None,
    datasets: Sequence[DataSet] = (),
    n_edits: Sequence[int] = (100,),
    seeds: Sequence[int] = (0,),
    archive: str | None = None,
    rows: Sequence[str] = (),
    command: str | None = None,
) -> list[dict]:
    """Measure HORSE with one part taken out or changed at a time (Table 2).

    Args:
        out, datasets, n_edits, seeds, command: as in :func:`compare`.
        hparams: the YAML, or the name of a shipped one; None is the default model's.
        archive: the folder of a trained archive for the full method, instead of training one.
        rows: names from :data:`horse_plugin.comparison.methods.ABLATIONS`; none is all.

    Returns:
        The rows, as in ``results.json``.
    """
    yaml = find_yaml(hparams or DEFAULT_MODEL)
    table = choose(rows or tuple(ABLATIONS), ABLATIONS)
    if archive and "HORSE" in table:
        table["HORSE"] = replace(table["HORSE"], archive=str(archive))
    plan = Plan(
        {"unedited": METHODS["unedited"]} | table,
        {yaml.stem: yaml},
        datasets or [shipped_facts()],
        n_edits,
        yaml.parent.parent,
        Path(out).expanduser(),
        seeds,
        command=command,
    )
    return _measured(plan)


def shipped_facts() -> DataSet:
    """Return the facts that ship with the package."""
    files = (FACTS / f"{name}.json" for name in ("edit", "train", "val"))
    return DataSet.load(*files, name="facts")


def data_sets(data: Sequence[str], train: Sequence[str], val: Sequence[str]) -> list[DataSet]:
    """Return the data sets of files to edit, with their training and validation files, if any.

    Raises:
        UsageError: there are training or validation files, but not one for each data set.
    """
    for name, files in (("train", train), ("val", val)):
        if files and len(files) != len(data):
            given, wanted = counted(len(files), "file"), counted(len(data), "data set")
            raise UsageError(f"--{name}: {given} for {wanted}.")
    nothing = [None] * len(data)
    files = zip(data, train or nothing, val or nothing, strict=True)
    return [DataSet.load(*f) for f in files]


def _measured(plan: Plan) -> list[dict]:
    """Run the plan, and write tables and report of all rows that the folder holds.

    Methods may so be measured one after the other, some at fewer numbers of edits or seeds. The
    folder is locked meanwhile: of two runs at the same time, one would lose the other's rows. What
    was measured before an error, or before somebody stopped the run, is in tables and report, too.
    """
    with locked_folder(plan.out):
        try:
            return run(plan)
        finally:
            order = {name: i for i, name in enumerate(METHODS | ABLATIONS)}
            if is_main_process() and (held := held_rows(plan.out)):
                held.sort(key=lambda row: order.get(row["method"], len(order)))
                write_output(plan.out, held)
