"""Reports that open from disk: one HTML file with its pictures inside, and one look for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2

from horse_plugin.errors import visible
from horse_plugin.evaluation import charts
from horse_plugin.evaluation.generation import Example
from horse_plugin.evaluation.metrics import ALL_FIGURES
from horse_plugin.evaluation.tables import (
    UNEDITED,
    Table,
    examples_table,
    figures_of,
    held_and_drift,
    kinds_table,
    minute,
    number,
)
from horse_plugin.evaluation.verdict import Verdict

READING = (
    "Efficacy, generalization, specificity and locality are shares of answer tokens, in percent: "
    "right on the edited prompts, on their rephrasings and on unrelated prompts, and as before the "
    "edit on the latter. Facts held are the mean of the first two. Written is the share of edits "
    "whose answer the model writes. Drift is how far predictions on held-out ordinary text moved, "
    "in nats a token; perplexity is on the same text. Fluency falls when the model repeats itself."
)


@dataclass
class Section:
    """A part of a report: a text, then pictures side by side, then tables."""

    heading: str
    text: str = ""
    pictures: Sequence[str] = ()
    tables: Sequence[Table] = ()


@dataclass
class Report:
    """What a report says, from the top to the bottom of its page.

    Attributes:
        meta: one line on the model and the data.
        facts: rows of :func:`horse_plugin.evaluation.facts.fact_rows`, or of ``facts.csv``.
        commands: the command lines that repeat it.
        versions: package → version.
    """

    title: str
    meta: str = ""
    verdict: Verdict | None = None
    sections: list[Section] = field(default_factory=list)
    facts: Sequence[Mapping] = ()
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """Return the whole page, which needs no other file."""
        folder = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(
            loader=folder,
            autoescape=True,
            finalize=_visible,
            trim_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        page = environment.get_template("report.html.j2")
        return page.render(vars(self) | {"versions": versions, "percent": _percent})


def _visible(value):
    """Return what stands in the page for a value: markup of ours as it is, text as it is seen."""
    return value if hasattr(value, "__html__") else visible(value)


def _date(made: str | None) -> str:
    """Return when an edit was made, as people write it; release 0.1 did not say."""
    return f"{minute(made)} UTC" if made else "in 0.1"


def _percent(value) -> str:
    return "" if value in (None, "") else number(float(value), 0)


def commands_of(rows: list[dict]) -> list[str]:
    """Return the command lines that rows of ``results.json`` are of, each once."""
    return list(dict.fromkeys(r["command"] for r in rows if r.get("command")))


def held_and_cost(rows: list[dict]) -> Section:
    """Return what some models hold and what it costs, as a section.

    Args:
        rows: rows of ``results.json`` of one data set.
    """
    pictures = [charts.svg(charts.before_and_after(rows))]
    if points := held_and_drift(rows):
        pictures.insert(0, charts.svg(charts.held_over_drift(points)))
    table = figures_of(rows, ALL_FIGURES)
    return Section("Held, and at what cost", READING, pictures, [table])


def of_edit(about: Mapping, n_facts: int, verdict: Verdict | None, facts=()) -> Report:
    """Return the report of one edit, as its ``edit.json`` describes it.

    Args:
        n_facts: the number of its facts.
        verdict: the one on its figures, if it was measured.
        facts: its rows of ``facts.csv``.
    """
    hp, measured = about["hparams"], about.get("figures")
    report = Report(
        f"{about.get('name') or 'edit'}: {n_facts:,} facts edited",
        f"Model {about['model']['name']}, {hp['alg_name']}, made {_date(about.get('made'))}, "
        f"archive: {hp.get('archive') or 'untrained'}.",
        verdict,
        facts=facts,
        commands=[about["command"]] if about.get("command") else [],
        versions=about["versions"],
    )
    if not measured:
        return report
    row = {"dataset": "the facts of this edit", "n_edits": n_facts, "edit_seconds": None}
    names = {"before": "before" if about.get("onto") else UNEDITED, "after": hp["alg_name"]}
    rows = [row | {"method": names[when]} | measured[when] for when in names]
    rows[1]["edit_seconds"] = about.get("seconds")
    report.sections.append(held_and_cost(rows))
    if kinds := measured.get("kinds"):
        heading = "What ordinary text feels of it"
        report.sections.append(Section(heading, tables=[kinds_table(kinds)]))
    if written := measured.get("examples"):
        report.sections.append(written_section([Example(**example) for example in written]))
    lines = [[name, f"{share:.2e}"] for name, share in (about.get("moved") or {}).items()]
    moved = Table(["module", "‖ΔW‖/‖W‖"], lines)
    report.sections.append(Section("How far the weights moved", tables=[moved]))
    return report


def written_section(examples: Sequence[Example]) -> Section:
    """Return what the model writes before and after an edit as a section."""
    table = examples_table(examples)
    return Section(table.caption, tables=[replace(table, caption="")])


def learning_section(history: list[dict]) -> Section:
    """Return the losses and validations of a training as a section.

    Args:
        history: the trainer's, a dict per step with losses, some with ``validation``.
    """
    text = (
        "The loss is the mean per answer token of the edited model at each training step. The "
        "figures are those of the validation facts when they are edited."
    )
    return Section("Learning", text, [charts.svg(f) for f in charts.learning_curves(history)])
