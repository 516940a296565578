"""Pictures of results, as SVG. Nothing else imports matplotlib, which takes a second to load."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from horse_plugin.errors import visible
from horse_plugin.evaluation.metrics import SCORED

# The lines that should stand out; the others take their turn among colours unlike these.
STANDING_OUT = {
    "unedited": {"ls": "--", "marker": "", "color": "gray"},
    "HORSE": {"lw": 2, "color": "black"},
}
COLORS = [color for i, color in enumerate(matplotlib.colormaps["tab10"].colors) if i != 7]  # gray


def svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element, the same bytes for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "horse", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def before_and_after(rows: list[dict]) -> Figure:
    """Draw the three figures as groups of bars, one bar a row of ``results.json``."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, r in enumerate(rows):
        positions = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(SCORED))]
        bars = axes.bar(positions, [r[n] or 0 for n in SCORED], width * 0.92, label=r["method"])
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(SCORED)), SCORED)
    axes.set_ylabel("percent")
    axes.set_ylim(0, 108)
    axes.legend(frameon=False)
    _open(axes)
    return figure


def learning_curves(history: list[dict]) -> Figure:
    """Draw the losses and the validation figures of a training run over its steps."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, validation = figure.subplots(1, 2)
    steps = [h["step"] for h in history]
    for kind in ("edit", "rephrase", "unrelated", "ordinary"):
        if history[0].get(kind) is not None:
            losses.plot(steps, [h[kind] for h in history], label=kind)
    losses.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    validated = [h for h in history if "validation" in h]
    for name in SCORED:
        values = [h["validation"][name] for h in validated]
        style = {"marker": "o", "markersize": 3, "label": name}
        validation.plot([h["step"] for h in validated], values, **style)
    validation.set(xlabel="step", ylabel="percent", ylim=(0, 100))
    for axes in (losses, validation):
        axes.legend(frameon=False, fontsize=8)
        _open(axes)
    return figure


Curve = list[tuple[int, float]]


def over_edits(curves: dict[str, dict[str, Curve]]) -> Figure:
    """Draw Fig. 2: one panel a figure, one line a method, over the number of edits.

    Args:
        curves: method → figure → (number of edits, percent) of each point.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SCORED), sharey=True), SCORED, strict=True):
        axes.set_prop_cycle(color=COLORS)
        for method, of_figure in curves.items():
            style = {"marker": "o", "ms": 3} | STANDING_OUT.get(method, {})
            if of_figure[name]:
                axes.plot(*zip(*of_figure[name], strict=True), label=_label(method), **style)
        axes.set(title=name, xlabel="edits", xscale="log", ylim=(0, 103))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        _open(axes)
    figure.axes[0].set_ylabel("percent")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return figure


def side_by_side(means: dict[str, dict[str, Sequence[float]]]) -> Figure:
    """Draw the three figures as horizontal bars, one panel a data set, one group a method.

    Args:
        means: data set → method → the three figures, in percent.
    """
    n_methods = len({method for of in means.values() for method in of})
    figure = Figure(figsize=(9, 1.1 + 0.45 * n_methods), layout="constrained")
    panels = figure.subplots(1, len(means), squeeze=False)[0]
    for axes, (dataset, of) in zip(panels, means.items(), strict=True):
        methods = list(of)[::-1]
        for i, name in enumerate(SCORED):
            positions = [j - (i - 1) * 0.27 for j in range(len(methods))]
            axes.barh(positions, [of[m][i] for m in methods], 0.25, label=name)
        axes.set_yticks(range(len(methods)), map(_label, methods))
        axes.set(title=_label(dataset), xlabel="percent", xlim=(0, 100))
        _open(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def held_over_drift(points: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Draw facts held over drift, one panel a data set and one point a method.

    The upper left corner is the best: all facts held, and ordinary text as it was.

    Args:
        points: data set → method → (facts held in percent, drift in nats a token).
    """
    figure = Figure(figsize=(4.8 * max(1, len(points)), 3.8), layout="constrained")
    panels = figure.subplots(1, max(1, len(points)), squeeze=False)[0]
    for axes, (dataset, of) in zip(panels, points.items(), strict=True):
        axes.set_prop_cycle(color=COLORS)
        for method, (held, drift) in of.items():
            color = STANDING_OUT.get(method, {}).get("color")
            point = axes.plot([max(drift, 1e-4)], [held], "o", color=color)[0]
            axes.annotate(
                _label(method),
                (max(drift, 1e-4), held),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=point.get_color(),
            )
        axes.annotate("better", (0.02, 0.98), xycoords="axes fraction", va="top", color="gray")
        axes.set(title=_label(dataset), xscale="log", ylim=(0, 105))
        axes.margins(x=0.25)
        axes.set(xlabel="drift of ordinary text, nats a token", ylabel="facts held, percent")
        _open(axes)
    return figure


def _label(name: str) -> str:
    """Return a name as matplotlib shows it letter by letter, and reads no formula in it."""
    return visible(name).replace("$", r"\$")


def _open(axes: Axes):
    axes.spines[["top", "right"]].set_visible(False)
