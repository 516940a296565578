"""What a comparison leaves in its folder, beside ``results.json``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from horse_plugin.comparison import tables
from horse_plugin.comparison.methods import ABLATIONS, METHODS
from horse_plugin.evaluation.tables import Table, held_and_drift
from horse_plugin.storage.files import file_name, write

if TYPE_CHECKING:
    from horse_plugin.evaluation.report import Report

_READING = (
    "All methods start from the same weights, edit the same records, and are measured by the same "
    "code. The upper left corner of a picture of facts held over drift is the best: a "
    "method that holds the facts and wrecks the model has a high drift."
)


def write_output(out: Path, rows: list[dict]):
    """Write ``table.md``, ``table.tex``, ``results.csv`` and ``report.html``.

    For each model and number of edits there is ``held-<model>-<edits>.svg``, facts held over drift,
    and for each model and data set that was measured at several numbers of edits
    ``edits-<model>-<data set>.svg`` (Fig. 2). Where batches were edited one after the other,
    ``retention-<model>-<edits>-by-<batch>-<data set>.svg`` shows what is left of each.

    Args:
        out: the folder.
        rows: rows of ``results.json``.
    """
    from horse_plugin.evaluation import charts  # matplotlib takes a second to load

    both = [t for page in _tables(rows) for t in page[1:]]
    write(out / "table.md", "\n".join(t.markdown() for t in both))
    write(out / "table.tex", "\n".join(t.latex() for t in both))
    write(out / "results.csv", tables.to_csv(rows))
    for page in tables.pages(rows):
        if points := held_and_drift(tables.of_page(rows, page)):
            drawn = charts.svg(charts.held_over_drift(points))
            write(out / f"held-{page.file}.svg", drawn)
        for dataset, of in tables.retention(rows, page).items():
            drawn = charts.svg(charts.retention(of, tables.drawn_in(of, charts.RETENTION)))
            write(out / f"retention-{page.file}-{file_name(dataset)}.svg", drawn)
    for page, dataset, curves in _curves(rows):
        drawn = charts.svg(charts.over_edits(curves, tables.drawn_in(curves)))
        write(out / f"edits-{page.model_file}-{file_name(dataset)}.svg", drawn)
    write(out / "report.html", comparison_report(rows).html())


def comparison_report(rows: list[dict]) -> "Report":
    """Return the report of a comparison or an ablation.

    Args:
        rows: rows of ``results.json``.
    """
    from horse_plugin.evaluation import charts, report

    commands, versions = report.commands_of(rows), rows[-1].get("versions") or {}
    made = report.Report(_title(rows), commands=commands, versions=versions)
    said = [table for page in tables.pages(rows) for table in tables.verdicts(rows, page)]
    if said:
        made.sections.append(report.Section("What each comes to", tables=said))
    made.sections.append(report.Section("How to read this", f"{report.READING} {_READING}"))
    for page, *found in _tables(rows):
        held = held_and_drift(tables.of_page(rows, page))
        drawn = [charts.held_over_drift({dataset: points}) for dataset, points in held.items()]
        for of in tables.retention(rows, page).values():
            names = tables.drawn_in(of, charts.RETENTION)
            drawn += [charts.retention(of, [name]) for name in names]
        for dataset, of in tables.means(rows, page).items():
            if of:
                perplexities = tables.perplexities(rows, page, dataset)
                drawn.append(charts.side_by_side(dataset, of, perplexities))
        pictures = [charts.svg(figure) for figure in drawn]
        made.sections.append(report.Section(page.heading, "", pictures, found))
    for page, dataset, curves in _curves(rows):
        drawn = [charts.over_edits(curves, [name]) for name in tables.drawn_in(curves)]
        heading = f"{dataset} on {page.name}, over the number of edits"
        made.sections.append(report.Section(heading, "", [charts.svg(f) for f in drawn]))
    return made


def _title(rows: list[dict]) -> str:
    """Return a title by the methods: an ablation has rows that a comparison has not."""
    is_ablation = any(r["method"] in ABLATIONS and r["method"] not in METHODS for r in rows)
    return "What each part brings" if is_ablation else "Side by side"


def _tables(rows: list[dict]) -> list[tuple]:
    """Return each page and its tables that have a line.

    They are of figures, of what is left of each batch, of probabilities and of costs.
    """

    def of(page: tables.Page) -> list[Table]:
        retention = [tables.retention_table(rows, page)] if page.batch else []
        made = tables.figures_table, tables.probability_table, tables.cost_table
        first, *others = (table(rows, page) for table in made)
        return [table for table in (first, *retention, *others) if table.lines]

    return [(page, *of(page)) for page in tables.pages(rows)]


def _curves(rows: list[dict]) -> Iterator[tuple[tables.Page, str, dict]]:
    """Yield a page of the model, data set and curves where several numbers were measured."""
    of_model = {page.model: page for page in tables.pages(rows)}
    for model, dataset in dict.fromkeys((r["model"], r["dataset"]) for r in rows):
        if curves := tables.curves(rows, model, dataset):
            yield of_model[model], dataset, curves
