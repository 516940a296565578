"""A report that opens from disk: one HTML file with its pictures inside."""

import html
import io

import matplotlib
from matplotlib.figure import Figure

from horse_plugin.storage import archive

FIGURES = ("efficacy", "generalization", "specificity")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff } p, ul { max-width: 60rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .35rem .5rem; border-bottom: 1px solid #ddd; text-align: right }
td { white-space: nowrap } .text td { white-space: normal }
th:first-child, td:first-child, .text td, .text th { text-align: left }
th[colspan] { text-align: center; border-left: 1px solid #ddd }
svg { max-width: 100%; height: auto } p.note, ul.note { color: #555 }
@media screen and (max-width: 40rem) {
  table { font-size: .85rem } th, td { padding: .3rem .4rem }
  .scroll svg { max-width: none; width: 38rem }
  th:first-child, td:first-child { position: sticky; left: 0; background: #fff } }
@media print {
  body { margin: 0; padding: 0; font-size: .8rem } .scroll { overflow: visible }
  table { font-size: .6rem } th, td { padding: .2rem .3rem }
  h2 { break-after: avoid } svg, tr { break-inside: avoid } }
"""


def write_report(path, rows: list[dict], history: list[dict], examples):
    """Write the demo's report.

    Args:
        rows: rows of ``results.json``.
        history: of the trainer: a dict per step with losses, some with ``validation``.
        examples: (prompt, before, after, target) texts.
    """
    first = rows[0]
    body = f"""
<h1>{first["n_edits"]} facts edited at once</h1>
<p>Model {_text(first["model"])}, data {_text(first["dataset"])}, seed {first["seed"]}.
Every figure is the share of answer tokens predicted right, in percent, averaged over the edits:
efficacy on the edited prompts, generalization on their rephrasings, specificity on unrelated
prompts. Locality is the share of tokens on unrelated prompts that the edit left as they were.</p>
<div class="scroll">{_table(rows)}</div>
<h2>Before and after</h2>{picture(svg(_bars(rows)))}
<h2>Learning curve</h2>
<p class="note">Left: mean loss per answer token of the edited model at each training step. Right:
the same three figures when the validation facts are edited.</p>{picture(svg(_curve(history)))}
<h2>What the model writes</h2>
<div class="scroll">{_examples(examples)}</div>
<p class="note">Versions: {_text(", ".join(f"{k} {v}" for k, v in first["versions"].items()))}.</p>
"""
    archive.write(path, page("HORSE report", body))


def page(title: str, body: str) -> str:
    """A whole HTML page that needs nothing but itself."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _text(value) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _table(rows) -> str:
    names = (*FIGURES, "locality")
    head = "".join(f"<th>{n}</th>" for n in ("method", "edits", *names, "seconds"))
    lines = []
    for r in rows:
        cells = [r["method"], r["n_edits"], *(_number(r[n]) for n in names)]
        seconds = "" if r["edit_seconds"] is None else _number(r["edit_seconds"])
        lines.append("".join(f"<td>{_text(c)}</td>" for c in (*cells, seconds)))
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _examples(examples) -> str:
    head = "".join(f"<th>{n}</th>" for n in ("prompt", "before", "after", "asked for"))
    lines = ["".join(f"<td>{_text(t)}</td>" for t in example) for example in examples]
    return (
        f'<table class="text"><tr>{head}</tr>'
        + "".join(f"<tr>{x}</tr>" for x in lines)
        + "</table>"
    )


def _bars(rows) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, r in enumerate(rows):
        places = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(FIGURES))]
        bars = axes.bar(places, [r[n] or 0 for n in FIGURES], width * 0.92, label=r["method"])
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(FIGURES)), FIGURES)
    axes.set_ylabel("percent")
    axes.set_ylim(0, 108)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(history) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, validation = figure.subplots(1, 2)
    steps = [h["step"] for h in history]
    for kind in ("edit", "rephrase", "unrelated"):
        if history[0][kind] is not None:
            losses.plot(steps, [h[kind] for h in history], label=kind)
    losses.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    checked = [h for h in history if "validation" in h]
    for name in FIGURES:
        validation.plot(
            [h["step"] for h in checked],
            [h["validation"][name] for h in checked],
            marker="o",
            markersize=3,
            label=name,
        )
    validation.set(xlabel="step", ylabel="percent", ylim=(0, 100))
    for axes in (losses, validation):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def picture(drawn: str) -> str:
    """An ``<svg>`` that a phone scrolls, as its labels would be too small to read if it shrank."""
    return f'<div class="scroll">{drawn}</div>'


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, the same bytes for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "horse", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
