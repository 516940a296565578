"""What a comparison leaves in its folder, beside ``results.json``."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from horse_plugin.comparison.tables import (
    OURS,
    UNEDITED,
    Mean,
    cost_table,
    edits,
    figures_table,
    pages,
    to_csv,
)
from horse_plugin.evaluation.report import FIGURES, page, picture, svg
from horse_plugin.storage import archive

# Of the lines of Fig. 2: the others take their turn among colours unlike these.
STANDING_OUT = {
    UNEDITED: {"ls": "--", "marker": "", "color": "gray"},
    OURS: {"lw": 2, "color": "black"},
}
COLORS = [color for i, color in enumerate(matplotlib.colormaps["tab10"].colors) if i != 7]  # gray
TITLES = {"compare": "Side by side", "ablate": "What each part brings"}


def write(out: Path, rows: list[dict], kind: str = "compare"):
    """Write ``table.md``, ``table.tex``, ``results.csv``, ``report.html`` and, for each model and
    data set measured at several numbers of edits, ``edits-<model>-<data set>.svg`` (Fig. 2)."""
    at = pages(rows)
    grids = [figures_table(rows, *where) for where in at]
    costs = [cost_table(rows, *where) for where in at]
    both = [grid for pair in zip(grids, costs, strict=True) for grid in pair if grid.lines]
    archive.write(out / "table.md", "\n".join(g.markdown() for g in both))
    archive.write(out / "table.tex", "\n".join(g.latex() for g in both))
    archive.write(out / "results.csv", to_csv(rows))
    plots = {
        (Path(model).name, dataset): over_edits(rows, model, dataset)
        for model, dataset in dict.fromkeys((r["model"], r["dataset"]) for r in rows)
    }
    plots = {where: svg(figure) for where, figure in plots.items() if figure}
    for where, text in plots.items():
        archive.write(out / f"edits-{'-'.join(where)}.svg", text)
    curves = "".join(
        f"<h2>{dataset} on {model}, over the number of edits</h2>{picture(text)}"
        for (model, dataset), text in plots.items()
    )
    bars = "".join(
        f"<h2>{edits(n)} on {Path(model).name}</h2>"
        f"{grid.html()}{_bars(rows, model, n)}{cost.html()}"
        for (model, n), grid, cost in zip(at, grids, costs, strict=True)
    )
    title = TITLES[kind]
    archive.write(out / "report.html", page(title, f"<h1>{title}</h1>{_READING}{curves}{bars}"))


_READING = """<p>Every figure is the share of answer tokens predicted right, in percent, averaged
over the edits: efficacy on the edited prompts, generalization on their rephrasings, specificity on
unrelated prompts. Locality is the share of tokens on unrelated prompts that the edit left as they
were. All methods start from the same weights, edit the same records, all at once, and are measured
by the same code.</p>"""


def over_edits(rows: list[dict], model: str, dataset: str) -> Figure | None:
    """Fig. 2: figures over the number of edits, a line a method, the unedited model dashed. None
    if only one number of edits was measured."""
    rows = [r for r in rows if (r["model"], r["dataset"]) == (model, dataset)]
    if len({r["n_edits"] for r in rows}) < 2:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(FIGURES), sharey=True), FIGURES, strict=True):
        axes.set_prop_cycle(color=COLORS)
        for method in dict.fromkeys(r["method"] for r in rows):
            line = _line([r for r in rows if r["method"] == method], name)
            style = {"marker": "o", "ms": 3} | STANDING_OUT.get(method, {})
            axes.plot(*zip(*line, strict=True), label=method, **style) if line else None
        axes.set(title=name, xlabel="edits", xscale="log", ylim=(0, 103))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("percent")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return figure


def _line(rows: list[dict], figure: str) -> list[tuple[int, float]]:
    at = {n: Mean.of([r[figure] for r in rows if r["n_edits"] == n]) for n in _edits(rows)}
    return [(n, mean.mean) for n, mean in at.items() if mean]


def _edits(rows) -> list[int]:
    return sorted({r["n_edits"] for r in rows})


def _bars(rows, model: str, n_edits: int) -> str:
    """A picture of the three figures for each data set; rows without figures are left out."""
    rows = [r for r in rows if (r["model"], r["n_edits"]) == (model, n_edits)]
    datasets = list(dict.fromkeys(r["dataset"] for r in rows))
    figure = Figure(
        figsize=(9, 1.1 + 0.45 * len({r["method"] for r in rows})), layout="constrained"
    )
    for axes, dataset in zip(
        figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True
    ):
        of = [r for r in rows if r["dataset"] == dataset and not r.get("reason")]
        methods = list(dict.fromkeys(r["method"] for r in of))[::-1]
        for i, name in enumerate(FIGURES):
            means = [Mean.of([r[name] for r in of if r["method"] == m]) for m in methods]
            places = [j - (i - 1) * 0.27 for j in range(len(methods))]
            axes.barh(places, [m.mean if m else 0 for m in means], 0.25, label=name)
        axes.set_yticks(range(len(methods)), methods)
        axes.set(title=dataset, xlabel="percent", xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return picture(svg(figure))
