"""What a comparison leaves in its folder, beside ``results.json``."""

import html
from pathlib import Path

from horse_plugin.comparison import tables
from horse_plugin.evaluation.tables import held_and_drift
from horse_plugin.storage.files import file_name, write

TITLES = {"compare": "Side by side", "ablate": "What each part brings"}
_READING = """<p>Every figure is the share of answer tokens predicted right, in percent, averaged
over the edits: efficacy on the edited prompts, generalization on their rephrasings, specificity on
unrelated prompts. Locality is the share of tokens on unrelated prompts that the edit left as they
were. "Writ." is the share of edits whose answer the model writes, token for token. Drift is how far
the edited model's predictions are from the unedited model's on held-out ordinary text, in nats a
token; perplexity is on the same text. A method that holds the facts and wrecks the model has a high
drift. All methods start from the same weights, edit the same records, all at once, and are measured
by the same code.</p>"""


def write_output(out: Path, rows: list[dict], kind: str = "compare"):
    """Write ``table.md``, ``table.tex``, ``results.csv`` and ``report.html``.

    For each model and number of edits there is ``held-<model>-<edits>.svg``, facts held over drift,
    and for each model and data set that was measured at several numbers of edits
    ``edits-<model>-<data set>.svg`` (Fig. 2).

    Args:
        out: the folder.
        rows: rows of ``results.json``.
        kind: ``compare`` or ``ablate``.
    """
    from horse_plugin.evaluation import charts, report  # matplotlib takes a second to load

    pages = tables.pages(rows)
    figures = [tables.figures_table(rows, *page) for page in pages]
    costs = [tables.cost_table(rows, *page) for page in pages]
    both = [t for pair in zip(figures, costs, strict=True) for t in pair if t.lines]
    write(out / "table.md", "\n".join(t.markdown() for t in both))
    write(out / "table.tex", "\n".join(t.latex() for t in both))
    write(out / "results.csv", tables.to_csv(rows))
    body = f"<h1>{TITLES[kind]}</h1>{_READING}"
    for model, dataset in dict.fromkeys((r["model"], r["dataset"]) for r in rows):
        if curves := tables.curves(rows, model, dataset):
            drawn, name = charts.svg(charts.over_edits(curves)), Path(model).name
            write(out / f"edits-{file_name(name)}-{file_name(dataset)}.svg", drawn)
            body += f"<h2>{html.escape(f'{dataset} on {name}')}, over the number of edits</h2>"
            body += report.picture(drawn)
    for (model, n), figure, cost in zip(pages, figures, costs, strict=True):
        bars = charts.svg(charts.side_by_side(tables.means(rows, model, n)))
        body += f"<h2>{tables.edits(n)} on {html.escape(Path(model).name)}</h2>"
        body += figure.html()
        if points := held_and_drift(tables.of_page(rows, model, n)):
            drawn = charts.svg(charts.held_over_drift(points))
            write(out / f"held-{file_name(Path(model).name)}-{n}.svg", drawn)
            body += f"<h3>Facts held, and what it cost</h3>{report.picture(drawn)}"
        body += report.picture(bars) + cost.html()
    write(out / "report.html", report.page(TITLES[kind], body))
