"""A report that opens from disk: one HTML file with its pictures inside."""

import html

from horse_plugin.errors import visible
from horse_plugin.evaluation.charts import (
    before_and_after,
    held_over_drift,
    learning_curves,
    svg,
)
from horse_plugin.evaluation.metrics import COST, SCORED
from horse_plugin.evaluation.tables import examples_table, figures_of, held_and_drift
from horse_plugin.storage.files import write

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
        path: of the HTML file.
        rows: rows of ``results.json``.
        history: the trainer's, a dict per step with losses, some with ``validation``.
        examples: what the model writes before and after the edit.
    """
    first = rows[0]
    body = f"""
<h1>{first["n_edits"]} facts edited at once</h1>
<p>Model {_text(first["model"])}, data {_text(first["dataset"])}, seed {first["seed"]}.
Every figure is the share of answer tokens predicted right, in percent, averaged over the edits:
efficacy on the edited prompts, generalization on their rephrasings, specificity on unrelated
prompts. Locality is the share of tokens on unrelated prompts that the edit left as they were,
written the share of edits whose answer the model writes. Drift is how far the predictions on
held-out ordinary text moved, in nats a token; perplexity is on the same text. Fluency falls when
the model repeats itself.</p>
{figures_of(rows, (*SCORED, "locality", "written", *COST, "fluency")).html()}
<h2>Before and after</h2>{picture(svg(before_and_after(rows)))}
<h2>Facts held, and what it cost</h2>{picture(svg(held_over_drift(held_and_drift(rows))))}
<h2>Learning curve</h2>
<p class="note">Left: mean loss per answer token of the edited model at each training step. Right:
the same three figures when the validation facts are edited.</p>
{picture(svg(learning_curves(history)))}
<h2>What the model writes</h2>
{examples_table(examples).html()}
<p class="note">Versions: {_text(", ".join(f"{k} {v}" for k, v in first["versions"].items()))}.</p>
"""
    write(path, page("HORSE report", body))


def page(title: str, body: str) -> str:
    """Return a whole HTML page that needs no other file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def picture(drawn: str) -> str:
    """Return an ``<svg>`` that scrolls on a phone instead of shrinking."""
    return f'<div class="scroll">{drawn}</div>'


def _text(value) -> str:
    return html.escape(visible(value))
