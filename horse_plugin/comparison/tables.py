"""Rows of ``results.json`` as the paper's tables and Fig. 2."""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from horse_plugin.errors import visible
from horse_plugin.evaluation.metrics import ALL_FIGURES, COST, SCORED, SHARES, mean
from horse_plugin.evaluation.tables import DIGITS, UNEDITED, Table, not_computed, number
from horse_plugin.evaluation.verdict import judge
from horse_plugin.storage.digest import text_digest
from horse_plugin.storage.files import file_name

HEADINGS = {
    "efficacy": "Eff.",
    "generalization": "Gen.",
    "specificity": "Spe.",
    "mean": "Mean",
    "locality": "Loc.",
    "written": "Writ.",
    "drift": "Drift",
    "perplexity": "PPL",
    "first": "First",
}
LESS_IS_BETTER = COST
CURVES = (*SHARES, *COST)  # what is drawn over the number of edits
OURS = "HORSE"
AGES = 6  # the most batches that a table shows


class Page(NamedTuple):
    """What one table is about: edits of one model, at once or ``batch`` at a time.

    ``is_shared`` is whether another model of the rows has a folder of the same name.
    """

    model: str
    n_edits: int
    batch: int | None = None
    is_shared: bool = False

    @property
    def edits(self) -> str:
        """``1 edit``, ``500 edits``, or ``2,000 edits, 100 at a time``."""
        return edits(self.n_edits) + (f", {self.batch:,} at a time" if self.batch else "")

    @property
    def name(self) -> str:
        """The model, without the folders that it is in unless they tell it from another."""
        return self.model if self.is_shared else Path(self.model).name

    @property
    def heading(self) -> str:
        return f"{self.edits} on {self.name}"

    @property
    def model_file(self) -> str:
        """The model in the name of a file."""
        apart = f"-{text_digest(self.model, 6)}" if self.is_shared else ""
        return file_name(Path(self.model).name + apart)

    @property
    def file(self) -> str:
        """The page in the name of a file."""
        n = f"{self.n_edits}-by-{self.batch}" if self.batch else str(self.n_edits)
        return f"{self.model_file}-{n}"


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over the seeds; no deviation with one seed."""

    mean: float
    std: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Mean | None":
        """Return None where a value is missing."""
        if not values or None in values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 1) -> str:
        deviation = "" if self.std is None else f" ± {number(self.std, digits)}"
        return number(self.mean, digits) + deviation


def figures_table(rows: list[dict], page: Page) -> Table:
    """Return Table 1 of one model at one number of edits.

    It has the figures of every data set and the mean of the first three, then locality, the share
    of edits that the model writes, drift, perplexity and, where batches were edited one after the
    other, the efficacy that is left of the first; best bold, second underlined, and how far HORSE
    is from the best of the others.

    The unedited model is there to compare with, and takes no part in the ranking.
    """
    rows = [r | {"mean": score(r), "first": _first(r)} for r in of_page(rows, page)]
    datasets, methods = _values(rows, "dataset"), _values(rows, "method")
    shown = [f for f in HEADINGS if any(r.get(f) is not None for r in rows)]
    columns = [(d, f) for d in datasets for f in shown]
    means = {m: [_mean(rows, m, d, f) for d, f in columns] for m in methods}
    ranked = [m for m in methods if m != UNEDITED]
    marks = [_marks({m: means[m][i] for m in ranked}, f) for i, (_, f) in enumerate(columns)]
    digits = [DIGITS.get(f, 1) for _, f in columns]
    lines = [
        [m, *((_text(v, digits[i]), marks[i].get(m, "")) for i, v in enumerate(means[m]))]
        for m in methods
    ]
    compared = OURS in methods and len(ranked) > 1
    if compared:
        others = [[means[m][i] for m in ranked if m != OURS] for i in range(len(columns))]
        deltas = zip(means[OURS], others, columns, strict=True)
        lines.append(["Δ", *(_delta(v, o, f) for v, o, (_, f) in deltas)])
    how = ", each batch on top of those before it;" if page.batch else " at once;"
    first = " First: the efficacy that is left of the first batch." if page.batch else ""
    caption = (
        f"{page.edits}{how} {page.name}, percent; drift in nats a token and "
        f"perplexity (PPL), both on held-out text{_seeds(rows)}.{first} Best bold, second "
        f"underlined, the unedited model apart.{_budgets(rows)}{_checked(rows)}"
    )
    groups = [(d, len(shown)) for d in datasets]
    names = ["method", *(HEADINGS[f] for _, f in columns)]
    return Table(names, lines, caption, groups, _reasons(rows), rule_before_last=compared)


def edits(n: int) -> str:
    """Return ``1 edit``, or ``2,000 edits``."""
    return f"{n:,} edit{'s' * (n != 1)}"


def score(row: dict) -> float | None:
    """Return the mean of those of the three figures that the row has."""
    return mean(row[f] for f in SCORED if row[f] is not None)


def cost_table(rows: list[dict], page: Page) -> Table:
    """Return a table of edit seconds (no loading, no evaluation), training seconds and memory."""
    rows = of_page(rows, page)
    datasets = _values(rows, "dataset")
    kinds = {"edit_seconds": "edit s", "train_seconds": "train s", "peak_memory_mb": "peak MB"}
    columns = [(d, k) for d in datasets for k in kinds]
    lines = [
        [m, *(_text(_mean(done, m, d, k), 0 if k == "peak_memory_mb" else 1) for d, k in columns)]
        for done in [[r for r in rows if is_whole(r)]]
        for m in _values(done, "method")
    ]
    caption = f"Time and memory of {page.heading}{_seeds(rows)}."
    names = ["method", *(kinds[k] for _, k in columns)]
    return Table(names, lines, caption, [(d, len(kinds)) for d in datasets])


def probability_table(rows: list[dict], page: Page) -> Table:
    """Return success and magnitude of the new answers' probabilities, where they were measured."""
    done = [r | r["probabilities"] for r in of_page(rows, page) if r.get("probabilities")]
    shown = [f"{kind}_{what}" for kind in SCORED for what in ("success", "magnitude")]
    shown = [f for f in shown if any(f in r for r in done)]
    columns = [(d, f) for d in _values(done, "dataset") for f in shown]
    lines = [
        [m, *(_text(_mean(done, m, d, f)) for d, f in columns)] for m in _values(done, "method")
    ]
    kinds = (f.split("_") for _, f in columns)
    names = ["method", *(f"{HEADINGS[kind]} {what}" for kind, what in kinds)]
    caption = f"Probability of the new answer against the true one, percent; {page.heading}"
    caption += f"{_seeds(done)}."
    return Table(names, lines, caption, [(d, len(shown)) for d in _values(done, "dataset")])


def to_csv(rows: list[dict]) -> str:
    """Return one line a row, with every plain value of it; no spreadsheet computes a text."""
    nested = {k for r in rows for k, v in r.items() if isinstance(v, (dict, list))}
    names = list(dict.fromkeys(k for r in rows for k in r if k not in nested))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows(
        map(_as_text, line) for line in [names, *([r.get(n) for n in names] for r in rows)]
    )
    return buffer.getvalue()


def _as_text(value):
    return not_computed(visible(value)) if isinstance(value, str) else value


def retention(rows: list[dict], page: Page) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return what happened over the batches of a page, as means over the seeds.

    It is data set → method → ``by age``, the efficacy of each batch after the last one, oldest
    first; ``so far``, the efficacy of all batches after each one; and ``drift`` after each one. Of
    a seed that stopped, the latter two have the batches that there are, and the first nothing.
    """
    found = {}
    for r in of_page(rows, page):
        if r.get("batches"):
            found.setdefault(r["dataset"], {}).setdefault(r["method"], []).append(r)

    def over_seeds(runs: list[list[float]]) -> list[float]:
        known = ([v for v in at if v is not None] for at in itertools.zip_longest(*runs))
        return [mean(values) if values else math.nan for values in known]

    def of_method(runs: list[dict]) -> dict[str, list[float]]:
        after = [r["batches"] for r in runs]
        return {
            "by age": over_seeds([r["batches"][-1]["efficacy"] for r in runs if is_whole(r)]),
            "so far": over_seeds([[mean(a["efficacy"]) for a in run] for run in after]),
            "drift": over_seeds([[a["drift"] for a in run] for run in after]),
        }

    return {
        dataset: {method: of_method(runs) for method, runs in methods.items()}
        for dataset, methods in found.items()
    }


def is_whole(row: dict) -> bool:
    """Return whether a row has figures: its method neither failed nor stopped."""
    return not row.get("reason")


def retention_table(rows: list[dict], page: Page) -> Table:
    """Return the efficacy that is left of each batch after the last, of at most six batches."""
    found = retention(rows, page)
    methods = list(dict.fromkeys(m for of in found.values() for m in of))
    n = -(-page.n_edits // (page.batch or page.n_edits))
    shown = sorted({round(i * (n - 1) / (AGES - 1)) for i in range(AGES)})
    columns = [(of, i) for of in found.values() for i in shown]

    def left(method: str, of: dict, i: int) -> str:
        held = of.get(method, {"by age": []})["by age"]
        return number(held[i]) if held else "–"

    lines = [[m, *(left(m, of, i) for of, i in columns)] for m in methods]
    caption = f"Efficacy of each batch after the last, the oldest first; {page.heading}."
    names = ["method", *(f"batch {i + 1}" for _, i in columns)]
    return Table(names, lines, caption, [(dataset, len(shown)) for dataset in found])


def of_page(rows: list[dict], page: Page) -> list[dict]:
    """Return the rows of one page."""
    return [r for r in rows if (r["model"], r["n_edits"], r.get("batch")) == page[:3]]


def pages(rows: list[dict]) -> list[Page]:
    """Return every table to write, most edits last, and those of batches after those at once."""
    names = [Path(model).name for model in _values(rows, "model")]
    found = {
        Page(r["model"], r["n_edits"], r.get("batch"), names.count(Path(r["model"]).name) > 1)
        for r in rows
    }
    return sorted(found, key=lambda page: (page.model, page.batch or 0, page.n_edits))


def curves(rows: list[dict], model: str, dataset: str) -> dict[str, dict] | None:
    """Return method → figure → (number of edits, mean) of each point of Fig. 2.

    None if only one number of edits at once was measured.
    """
    rows = [r for r in rows if (r["model"], r["dataset"]) == (model, dataset)]
    rows = [r for r in rows if not r.get("batch")]
    numbers = sorted({r["n_edits"] for r in rows})
    if len(numbers) < 2:
        return None

    def curve(method: str, figure: str) -> list[tuple[int, float]]:
        of = [r for r in rows if r["method"] == method]
        at = {n: Mean.of([r.get(figure) for r in of if r["n_edits"] == n]) for n in numbers}
        return [(n, m.mean) for n, m in at.items() if m]

    return {m: {figure: curve(m, figure) for figure in CURVES} for m in _values(rows, "method")}


def drawn_in(curves: dict[str, dict], names: Iterable[str] = CURVES) -> list[str]:
    """Return those names of :func:`curves`, or of :func:`retention`, that any method has."""
    return [name for name in names if any(of[name] for of in curves.values())]


def means(rows: list[dict], page: Page) -> dict[str, dict]:
    """Return data set → method → the shares, None where one was not measured.

    Rows without figures are left out.
    """
    rows = of_page(rows, page)
    done = [r for r in rows if is_whole(r)]
    return {
        dataset: {
            method: [m and m.mean for m in (_mean(done, method, dataset, f) for f in SHARES)]
            for method in _values([r for r in done if r["dataset"] == dataset], "method")
        }
        for dataset in _values(rows, "dataset")
    }


def _first(row: dict) -> float | None:
    """Return the efficacy that is left of the first batch after the last, if it came to that."""
    known = is_whole(row) and row.get("batches")
    return row["batches"][-1]["efficacy"][0] if known else None


def perplexities(rows: list[dict], page: Page, dataset: str) -> dict[str, float]:
    """Return method → perplexity, of those that were measured, in the order of the rows."""
    done = [r for r in of_page(rows, page) if r["dataset"] == dataset and is_whole(r)]
    found = {m: _mean(done, m, dataset, "perplexity") for m in _values(done, "method")}
    return {m: value.mean for m, value in found.items() if value}


def verdicts(rows: list[dict], page: Page) -> list[Table]:
    """Return what each method comes to, in words as of an edit, one table a data set."""
    rows, found = of_page(rows, page), []
    for dataset in _values(rows, "dataset"):
        done = [r for r in rows if r["dataset"] == dataset and is_whole(r)]
        means = {
            method: {f: v and v.mean for f, v in zip(ALL_FIGURES, values, strict=True)}
            for method in _values(done, "method")
            for values in [[_mean(done, method, dataset, f) for f in ALL_FIGURES]]
        }
        before = means.pop(UNEDITED, {}) | {"drift": 0.0}
        unmeasured = {r["method"] for r in done if "drift" not in r}  # as release 0.1 left rows
        lines = [
            [method, judge({"before": before, "after": after}).sentence]
            for method, after in means.items()
            if method not in unmeasured
        ]
        caption = f"{visible(dataset)}, {page.heading}{_seeds(rows)}."
        found.append(Table(["method", "verdict"], lines, caption, is_text=True))
    return [table for table in found if table.lines]


def _values(rows, key: str) -> list:
    return list(dict.fromkeys(r[key] for r in rows))


def _mean(rows, method, dataset, figure) -> Mean | None:
    of = [r for r in rows if (r["method"], r["dataset"]) == (method, dataset)]
    return Mean.of([r.get(figure) for r in of])


def _text(value: Mean | None, digits: int = 1) -> str:
    return "–" if value is None else value.text(digits)


def _marks(column: dict[str, Mean | None], figure: str) -> dict[str, str]:
    """Return the best and the second by what the table prints: equal figures are equally good.

    One method alone is no better than others.
    """
    if len(column) < 2:
        return {}
    digits = DIGITS.get(figure, 1)
    shown = {m: round(v.mean, digits) for m, v in column.items() if v is not None}
    first, *rest = sorted(set(shown.values()), reverse=figure not in LESS_IS_BETTER) or [None]
    marks = {first: "best", **({rest[0]: "second"} if rest else {})}
    return {m: marks.get(v, "") for m, v in shown.items()}


def _delta(ours: Mean | None, others: list[Mean | None], figure: str) -> str:
    choose = min if figure in LESS_IS_BETTER else max
    best = choose((o.mean for o in others if o is not None), default=None)
    digits = DIGITS.get(figure, 1)
    return "–" if ours is None or best is None else f"{ours.mean - best:+,.{digits}f}"


def _seeds(rows) -> str:
    n = len(_values(rows, "seed"))
    return f", mean ± standard deviation over {n} seeds" if n > 1 else ""


def _budgets(rows) -> str:
    """Return what trained methods trained on, once for methods with the same budget."""
    by_budget = {}
    for r in rows:
        if r.get("budget"):
            by_budget.setdefault((r["dataset"], r["budget"]), {})[r["method"]] = None
    said = [f"{', '.join(m)} ({d}): {budget}" for (d, budget), m in by_budget.items()]
    return f" Trained: {'; '.join(said)}." if said else ""


def _checked(rows) -> str:
    """Return how far EasyEdit's own metrics are from ours where both were computed."""
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
    said = {f"{r['method']} ({r['dataset']}): {r['reason']}": None for r in rows if not is_whole(r)}
    return list(said)
