"""Side by side: the paper's Table 1, Table 2 and Fig. 2 on one's own model and data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from horse_plugin.assets import DEFAULT_MODEL, FACTS, hparams_folder
from horse_plugin.comparison import output
from horse_plugin.comparison.methods import ABLATIONS, METHODS, EasyEdit, Engine, Method, choose
from horse_plugin.comparison.runner import DataSet, Plan, held, run
from horse_plugin.errors import UsageError

__all__ = ["ABLATIONS", "METHODS", "DataSet", "Method", "Plan", "ablate", "compare", "run"]

# `--quick`: three methods and the model itself, trained briefly.
QUICK = {"methods": ("unedited", "FT", "MALMEN", "HORSE"), "n_edits": (50,)}
QUICK_TRAINING = {"n_edits": 100, "max_iters": 10, "val_interval": 10}


def compare(
    out,
    methods: Sequence[str] = (),
    models: Sequence[str] = (),
    datasets: Sequence[DataSet] = (),
    n_edits: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    hparams_dir=None,
    corpus: str | None = None,
    quick: bool = False,
    check: int = 0,
) -> list[dict]:
    """Measure methods side by side, and write tables and a report; what is left out is the
    default: all methods, 100 edits, the embedded model and facts.

    Args:
        out: folder for ``results.json`` and everything else; a run that stopped goes on from it,
            and the tables are of all that was ever measured into it.
        methods: names from :data:`METHODS`.
        models: stems of YAMLs: ``<hparams_dir>/<method>/<model>.yaml``.
        corpus: text for second-moment statistics; none: the training records.
        quick: fewer methods, fewer edits, less training.
        check: compute EasyEdit's own metrics too, on so many records of each cell.

    Returns:
        The rows, as in ``results.json``.
    """
    names = methods or (QUICK["methods"] if quick else METHODS)
    table = choose(names, METHODS)
    if quick:
        table = {name: _briefly_trained(method) for name, method in table.items()}
    folder = Path(hparams_dir or hparams_folder())
    plan = Plan(
        table,
        {m: folder / "HORSE" / f"{m}.yaml" for m in models or (DEFAULT_MODEL,)},
        datasets or [embedded_facts()],
        n_edits or (QUICK["n_edits"] if quick else (100,)),
        folder,
        Path(out),
        seeds,
        corpus,
        check,
    )
    return _measured(plan, "compare")


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
) -> list[dict]:
    """Table 2: HORSE with one part taken out or changed at a time.

    Args:
        hparams: path to the YAML; the default model's by default.
        archive: a trained archive for the full method, instead of training one.
        rows: names from :data:`ABLATIONS`; all by default.
    """
    yaml = Path(hparams or hparams_folder() / "HORSE" / f"{DEFAULT_MODEL}.yaml")
    table = choose(rows or tuple(ABLATIONS), ABLATIONS)
    if archive and "HORSE" in table:
        table["HORSE"] = replace(table["HORSE"], archive=str(archive))
    plan = Plan(
        {"unedited": METHODS["unedited"]} | table,
        {yaml.stem: yaml},
        datasets or [embedded_facts()],
        n_edits,
        yaml.parent.parent,
        Path(out),
        seeds,
    )
    return _measured(plan, "ablate")


def embedded_facts() -> DataSet:
    """The facts that come with the package."""
    files = (FACTS / f"{name}.json" for name in ("edit", "train", "val"))
    return replace(DataSet.load(*files), name="facts")


def data_sets(data: Sequence[str], train: Sequence[str], val: Sequence[str]) -> list[DataSet]:
    """Files to edit, each with its training and its validation file; those may be left out.

    Raises:
        UsageError: there are training or validation files, but not one for each.
    """
    for name, files in (("train", train), ("val", val)):
        if files and len(files) != len(data):
            raise UsageError(f"--{name}: {len(files)} files for {len(data)} data sets.")
    nothing = [None] * len(data)
    files = zip(data, train or nothing, val or nothing, strict=True)
    return [DataSet.load(*f) for f in files]


def _measured(plan: Plan, kind: str) -> list[dict]:
    """Run the plan; tables and report are of all that the folder holds, so that methods may be
    measured one after the other, and not all of them at every number of edits and seed."""
    rows = run(plan)
    place = list(METHODS | ABLATIONS).index
    output.write(plan.out, sorted(held(plan.out), key=lambda r: place(r["method"])), kind)
    return rows
