"""Pictures of results, as SVG. Nothing else imports matplotlib, which takes a second to load."""

import io
import itertools
from collections.abc import Iterable, Sequence

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from horse_plugin.errors import visible
from horse_plugin.evaluation.metrics import COST, SHARES
from horse_plugin.evaluation.verdict import AT_MOST

# The lines that should stand out; the others take their turn among colours unlike these.
STANDING_OUT = {
    "unedited": {"ls": "--", "marker": "", "color": "gray"},
    "HORSE": {"lw": 2, "color": "black"},
}
COLORS = [color for i, color in enumerate(matplotlib.colormaps["tab10"].colors) if i != 7]  # gray

LEGEND = {"frameon": False, "fontsize": 8}
BELOW = LEGEND | {"loc": "outside lower center"}


def svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element, the same bytes for the same figure.

    What is black takes the colour of the text around it, so that it is seen on a dark page, too.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "horse", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    _, _, drawn = buffer.getvalue().partition("<svg")
    return '<svg fill="currentColor"' + drawn.replace("#000000", "currentColor")


def before_and_after(rows: list[dict]) -> Figure:
    """Draw the shares and the perplexity as groups of bars, one bar a row of ``results.json``.

    What a row has no figure of has no bar, and what no row has no place.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(4, 1))
    width = 0.8 / len(rows)
    for axes, names in zip(panels, (SHARES, ("perplexity",)), strict=True):
        names = [n for n in names if any(r.get(n) is not None for r in rows)]
        for i, r in enumerate(rows):
            known = [j for j, n in enumerate(names) if r.get(n) is not None]
            positions = [j + (i - (len(rows) - 1) / 2) * width for j in known]
            heights = [r[names[j]] for j in known]
            bars = axes.bar(positions, heights, width * 0.92, label=_label(r["method"]))
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(-0.5, max(1, len(names)) - 0.5)
        axes.set_visible(bool(names))
        _open(axes)
    panels[0].set(ylabel="percent", ylim=(0, 108))
    panels[1].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.legend(*panels[0].get_legend_handles_labels(), **BELOW, ncols=3)
    return figure


def learning_curves(history: list[dict]) -> list[Figure]:
    """Draw the losses of a training run over its steps, and the validation figures."""
    figures = [Figure(figsize=(5, 3.2), layout="constrained") for _ in range(2)]
    losses, validation = (figure.subplots() for figure in figures)
    steps = [h["step"] for h in history]
    for kind in ("edit", "rephrase", "unrelated", "ordinary"):
        if history[0].get(kind) is not None:
            losses.plot(steps, [h.get(kind) for h in history], label=kind)
    losses.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    validated = [h for h in history if "validation" in h]
    for name in SHARES:
        values = [h["validation"].get(name) for h in validated]
        style = {"marker": "o", "markersize": 3, "label": name}
        validation.plot([h["step"] for h in validated], values, **style)
    validation.set(xlabel="step", ylabel="percent", ylim=(0, 103))
    for axes in (losses, validation):
        axes.set_xlim(0, steps[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(**LEGEND)
        _open(axes)
    return figures


Curve = list[tuple[int, float]]


def over_edits(curves: dict[str, dict[str, Curve]], names: Sequence[str]) -> Figure:
    """Draw Fig. 2: one panel a figure, one line a method, over the number of edits.

    Args:
        curves: method → figure → (number of edits, value) of each point.
        names: the figures to draw, at most three side by side.
    """
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (3.4 * columns + 1.2, 2.7 * lines + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    styles = _lines(curves)
    for axes, name in zip(panels, names, strict=False):
        for method, of_figure in curves.items():
            if of_figure[name]:
                axes.plot(*zip(*of_figure[name], strict=True), **styles[method])
        axes.set(title=name, xlabel="edits", xscale="log")
        if name in COST:
            axes.set_yscale("log" if name == "perplexity" else "linear")
        else:
            axes.set(ylim=(0, 103), ylabel="percent")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        _open(axes)
    for axes in panels:  # left over in the last line
        axes.set_visible(False)
    _legend(figure, ncols=4)
    return figure


RETENTION = {  # what is drawn of batches → title, and what the axes say
    "by age": ("what is left of each batch", "batch, oldest first", "efficacy, percent"),
    "so far": ("all batches so far", "batches", "efficacy, percent"),
    "drift": ("ordinary text", "batches", "drift, nats a token"),
}


def retention(
    curves: dict[str, dict[str, Sequence[float]]], names: Sequence[str] = tuple(RETENTION)
) -> Figure:
    """Draw batches that were edited one after the other: what is left of them, and the drift.

    Args:
        curves: method → ``by age``, ``so far`` and ``drift``, one value a batch.
        names: which of the three to draw, side by side.
    """
    figure = Figure(figsize=(3.4 * len(names) + 1.2, 3.4), layout="constrained")
    panels, styles = figure.subplots(1, len(names), squeeze=False)[0], _lines(curves)
    for axes, name in zip(panels, names, strict=True):
        for method, of in curves.items():
            if of[name]:
                axes.plot(range(1, len(of[name]) + 1), of[name], **styles[method])
        axes.set(**dict(zip(("title", "xlabel", "ylabel"), RETENTION[name], strict=True)))
        axes.set_ylim(0, None if name == "drift" else 103)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _open(axes)
    _legend(figure, ncols=2 * len(names))
    return figure


def _lines(methods: Iterable[str]) -> dict[str, dict]:
    """Return method → how its line is drawn, in whichever panels it has points."""
    colors = itertools.cycle(COLORS)
    return {
        method: {"marker": "o", "ms": 3, "label": _label(method)}
        | (STANDING_OUT.get(method) or {"color": next(colors)})
        for method in methods
    }


def _legend(figure: Figure, ncols: int):
    """Name below all panels each line that any of them has."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    figure.legend(found.values(), found.keys(), **BELOW, ncols=ncols)


def side_by_side(
    dataset: str, means: dict[str, Sequence[float | None]], perplexities: dict[str, float]
) -> Figure:
    """Draw the shares and the perplexity of one data set as horizontal bars, one group a method.

    Args:
        means: method → the shares, in percent; None has no bar.
        perplexities: method → the perplexity, of those that have one.
    """
    figure = Figure(figsize=(5.6, 1.3 + 0.55 * len(means)), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    methods = list(means)[::-1]
    shown = [i for i in range(len(SHARES)) if any(of[i] is not None for of in means.values())]
    for k, i in enumerate(shown):
        known = [j for j, m in enumerate(methods) if means[m][i] is not None]
        positions = [j - (k - (len(shown) - 1) / 2) * 0.21 for j in known]
        values = [means[methods[j]][i] for j in known]
        axes.barh(positions, values, 0.19, color=f"C{i}", label=SHARES[i])
    axes.set_yticks(range(len(methods)), map(_label, methods))
    axes.set(title=_label(dataset), xlabel="percent", xlim=(0, 100))
    places, values = [methods.index(m) for m in perplexities], list(perplexities.values())
    bars = beside.barh(places, values, 0.4, color="gray")
    beside.bar_label(bars, map(_short, values), fontsize=8, padding=2)
    beside.set(xlabel="perplexity", xscale="log", xlim=(1, 30 * max(values, default=1)), xticks=[])
    beside.minorticks_off()
    beside.set_visible(bool(perplexities))
    for panel in (axes, beside):
        _open(panel)
    figure.legend(*axes.get_legend_handles_labels(), **BELOW, ncols=4)
    return figure


def held_over_drift(points: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Draw facts held over drift, one panel a data set and one point a method.

    The upper left corner is the best: all facts held, and ordinary text as it was. Two lines stand
    where a verdict on the drift changes.

    Args:
        points: data set → method → (facts held in percent, drift in nats a token).
    """
    n_methods = max((len(of) for of in points.values()), default=1)
    size = 4.8 * max(1, len(points)), 3.6 + 0.2 * (n_methods // 2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(1, len(points)), squeeze=False)[0]
    for axes, (dataset, of) in zip(panels, points.items(), strict=True):
        axes.set_prop_cycle(cycler(marker="osD^vP*Xh") + cycler(color=COLORS))
        for method, (held, drift) in of.items():
            color = {k: v for k, v in STANDING_OUT.get(method, {}).items() if k == "color"}
            style = {"ls": "", "ms": 8, "alpha": 0.8, "label": _label(method)} | color
            axes.plot([max(drift, 1e-4)], [held], **style)
        axes.annotate("better", (0.02, 0.98), xycoords="axes fraction", va="top", color="gray")
        axes.set(title=_label(dataset), xscale="log", ylim=(0, 105))
        axes.margins(x=0.25)
        low, high = axes.get_xlim()
        low, high = min(low, AT_MOST["drift"][0] / 20), max(high, AT_MOST["drift"][1] * 3)
        axes.set_xlim(low, high)
        for limit, said in zip(AT_MOST["drift"], ("changed", "damaged"), strict=True):
            axes.axvline(limit, color="gray", lw=0.8, ls=":")
            axes.annotate(said, (limit, 2), rotation=90, ha="left", color="gray", fontsize=8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="drift of ordinary text, nats a token", ylabel="facts held, percent")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, **LEGEND)
        _open(axes)
    return figure


def _short(value: float) -> str:
    """Return a perplexity in few letters, however large it is."""
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _label(name: str) -> str:
    """Return a name as matplotlib shows it letter by letter, and reads no formula in it."""
    return visible(name).replace("$", r"\$")


def _open(axes: Axes):
    axes.spines[["top", "right"]].set_visible(False)
