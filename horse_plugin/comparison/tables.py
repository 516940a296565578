"""Rows of ``results.json`` as the paper's tables: Markdown, LaTeX, HTML and CSV."""

import csv
import html
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from horse_plugin.evaluation.metrics import mean

FIGURES = {
    "efficacy": "Eff.",
    "generalization": "Gen.",
    "specificity": "Spe.",
    "mean": "Mean",
    "locality": "Loc.",
}
SCORED = ("efficacy", "generalization", "specificity")  # what "mean" is the mean of
UNEDITED = "unedited"
OURS = "HORSE"


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over the seeds; no deviation with one seed."""

    mean: float
    std: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Mean | None":
        """None where a value is missing."""
        if not values or None in values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 1) -> str:
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Style:
    """How a kind of file marks the best and the second best, and escapes plain text."""

    best: str
    second: str
    escape: Callable[[str], str]


def _latex(text: str) -> str:
    plain = {"λ": r"$\lambda$", "Δ": r"$\Delta$", "±": r"$\pm$", "–": "--", "c_i": "$c_i$"}
    for old in "&%#_":
        if old != "_":
            text = text.replace(old, f"\\{old}")
    for old, new in plain.items():
        text = text.replace(old, new)
    return text.replace("$c_i$", "\0").replace("_", r"\_").replace("\0", "$c_i$")


MARKDOWN = Style("**{}**", "<u>{}</u>", lambda text: text.replace("|", "\\|"))
LATEX = Style(r"\textbf{{{}}}", r"\underline{{{}}}", _latex)
HTML = Style("<b>{}</b>", "<u>{}</u>", html.escape)


@dataclass
class Grid:
    """A table with a mark on its cells: ``""``, ``"best"`` or ``"second"``.

    Attributes:
        groups: (heading, number of columns) over the columns after the first.
        lines: name of the row, then (text, mark) of each column.
        notes: why a row has no figures.
    """

    caption: str
    groups: list[tuple[str, int]]
    columns: list[str]
    lines: list[tuple[str, list[tuple[str, str]]]]
    notes: list[str]

    def cells(self, style: Style) -> list[list[str]]:
        marked = {"": "{}", "best": style.best, "second": style.second}
        return [
            [style.escape(name), *(marked[m].format(style.escape(t)) for t, m in cells)]
            for name, cells in self.lines
        ]

    def markdown(self) -> str:
        names = [h for heading, n in self.groups for h in [heading] * n]
        head = [f"{g} {c}".strip() for g, c in zip(names, self.columns, strict=True)]
        lines = [["method", *head], ["---", *["--:"] * len(head)], *self.cells(MARKDOWN)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"{self.caption}\n\n{table}\n" + (f"\n{notes}" if notes else "")

    def latex(self) -> str:
        spans, at = [], 2
        for heading, n in self.groups:
            spans.append((rf"\multicolumn{{{n}}}{{c}}{{{_latex(heading)}}}", at, at + n - 1))
            at += n
        rules = "".join(rf"\cmidrule(lr){{{a}-{b}}}" for _, a, b in spans)
        body = [" & ".join(line) + r" \\" for line in self.cells(LATEX)]
        if self.lines[-1][0].startswith("Δ"):
            body.insert(-1, r"\midrule")
        notes = " ".join(_latex(note) for note in self.notes)
        return "\n".join(
            [
                r"\begin{table}[t]\centering\small",
                r"\begin{tabular}{l" + "r" * len(self.columns) + "}",
                r"\toprule",
                " & ".join(["", *(s for s, _, _ in spans)]) + r" \\ " + rules,
                " & ".join(["Method", *map(_latex, self.columns)]) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                rf"\caption{{{_latex(self.caption)} {notes}}}".replace(" }", "}"),
                r"\end{table}",
                "",
            ]
        )

    def html(self) -> str:
        groups = "".join(f'<th colspan="{n}">{html.escape(g)}</th>' for g, n in self.groups)
        names = "".join(f"<th>{html.escape(c)}</th>" for c in ("method", *self.columns))
        body = "".join(
            "<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in self.cells(HTML)
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f'<div class="scroll"><table><tr><th></th>{groups}</tr><tr>{names}</tr>{body}</table>'
            f'</div><p class="note">{html.escape(self.caption)}</p>'
            + (f'<ul class="note">{notes}</ul>' if notes else "")
        )


def figures_table(rows: list[dict], model: str, n_edits: int) -> Grid:
    """Table 1 of one model at one number of edits: figures of every data set and the mean of the
    first three, best bold, second underlined, and how far HORSE is from the best of the others.

    The unedited model is there to compare with, and takes no part in the ranking.
    """
    rows = [r for r in rows if (r["model"], r["n_edits"]) == (model, n_edits)]
    rows = [r | {"mean": score(r)} for r in rows]
    datasets, methods = _values(rows, "dataset"), _values(rows, "method")
    shown = [f for f in FIGURES if any(r[f] is not None for r in rows)]
    columns = [(d, f) for d in datasets for f in shown]
    means = {m: [_mean(rows, m, d, f) for d, f in columns] for m in methods}
    ranked = [m for m in methods if m != UNEDITED]
    marks = [_marks({m: means[m][i] for m in ranked}) for i in range(len(columns))]
    lines = [
        (m, [(_text(v), marks[i].get(m, "")) for i, v in enumerate(means[m])]) for m in methods
    ]
    if OURS in methods and len(ranked) > 1:
        others = [[means[m][i] for m in ranked if m != OURS] for i in range(len(columns))]
        lines.append(("Δ", [(_delta(v, o), "") for v, o in zip(means[OURS], others, strict=True)]))
    caption = (
        f"{edits(n_edits)} at once on {_name(model)}, percent{_seeds(rows)}. Best bold, second "
        f"underlined, the unedited model apart.{_budgets(rows)}{_checked(rows)}"
    )
    groups = [(d, len(shown)) for d in datasets]
    return Grid(caption, groups, [FIGURES[f] for _, f in columns], lines, _reasons(rows))


def edits(n: int) -> str:
    """``1 edit``, ``2,000 edits``."""
    return f"{n:,} edit{'s' * (n != 1)}"


def score(row: dict) -> float | None:
    """The mean of those of the three figures that the row has."""
    return mean(row[f] for f in SCORED if row[f] is not None)


def cost_table(rows: list[dict], model: str, n_edits: int) -> Grid:
    """Edit seconds (loading and evaluation left out), training seconds and peak memory."""
    rows = [r for r in rows if (r["model"], r["n_edits"]) == (model, n_edits)]
    datasets = _values(rows, "dataset")
    kinds = {"edit_seconds": "edit s", "train_seconds": "train s", "peak_memory_mb": "peak MB"}
    columns = [(d, k) for d in datasets for k in kinds]
    lines = [
        (
            m,
            [
                (_text(_mean(done, m, d, k), 0 if k == "peak_memory_mb" else 1), "")
                for d, k in columns
            ],
        )
        for done in [[r for r in rows if not r.get("reason")]]
        for m in _values(done, "method")
    ]
    caption = f"Time and memory of {edits(n_edits)} on {_name(model)}{_seeds(rows)}."
    return Grid(
        caption, [(d, len(kinds)) for d in datasets], [kinds[k] for _, k in columns], lines, []
    )


def to_csv(rows: list[dict]) -> str:
    """One line a cell, with every plain value of its row."""
    names = list(dict.fromkeys(k for r in rows for k, v in r.items() if not isinstance(v, dict)))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def pages(rows: list[dict]) -> list[tuple[str, int]]:
    """(model, number of edits) of every table to write, most edits last."""
    return sorted({(r["model"], r["n_edits"]) for r in rows})


def _values(rows, key: str) -> list:
    return list(dict.fromkeys(r[key] for r in rows))


def _mean(rows, method, dataset, figure) -> Mean | None:
    of = [r for r in rows if (r["method"], r["dataset"]) == (method, dataset)]
    return Mean.of([r[figure] for r in of])


def _text(value: Mean | None, digits: int = 1) -> str:
    return "–" if value is None else value.text(digits)


def _marks(column: dict[str, Mean | None]) -> dict[str, str]:
    """Best and second, by what the table prints: equal figures are equally good."""
    shown = {m: round(v.mean, 1) for m, v in column.items() if v is not None}
    first, *rest = sorted(set(shown.values()), reverse=True) or [None]
    marks = {first: "best", **({rest[0]: "second"} if rest else {})}
    return {m: marks.get(v, "") for m, v in shown.items()}


def _delta(ours: Mean | None, others: list[Mean | None]) -> str:
    best = max((o.mean for o in others if o is not None), default=None)
    return "–" if ours is None or best is None else f"{ours.mean - best:+.1f}"


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _seeds(rows) -> str:
    n = len(_values(rows, "seed"))
    return f", mean ± standard deviation over {n} seeds" if n > 1 else ""


def _budgets(rows) -> str:
    """What trained methods trained on, said once for methods with the same budget."""
    by_budget = {}
    for r in rows:
        if r.get("budget"):
            by_budget.setdefault((r["dataset"], r["budget"]), {})[r["method"]] = None
    said = [f"{', '.join(m)} ({d}): {budget}" for (d, budget), m in by_budget.items()]
    return f" Trained: {'; '.join(said)}." if said else ""


def _checked(rows) -> str:
    """How far EasyEdit's own metrics are from ours where both were computed."""
    checks = [r["check"] for r in rows if r.get("check")]
    if not checks:
        return ""
    off = max(
        abs(check["ours"][f] - theirs)
        for check in checks
        for f, theirs in check["easyedit"].items()
        if theirs is not None
    )
    n = max(check["records"] for check in checks)
    return f" EasyEdit's own metrics, on {n} of the records, are within {off:.2f} of these."


def _reasons(rows) -> list[str]:
    said = {f"{r['method']} ({r['dataset']}): {r['reason']}": None for r in rows if r.get("reason")}
    return list(said)
