"""One table, written as Markdown or LaTeX; the report's template writes it as HTML."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from horse_plugin.errors import visible
from horse_plugin.evaluation.metrics import mean

Cell = str | tuple[str, str]  # a text, or a text and its mark: "best" or "second"


def number(value: float | None, digits: int = 1) -> str:
    """Return a figure as all tables print it; a missing one is a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def minute(written: str) -> str:
    """Return a time of our files, such as ``2026-11-26T11:46:12+00:00``, as people write it."""
    return written[:16].replace("T", " ")


@dataclass(frozen=True)
class Style:
    """How a kind of file marks the best and the second best, and escapes plain text."""

    best: str
    second: str
    escape: Callable[[str], str]

    def cell(self, cell: Cell) -> str:
        text, mark = (cell, "") if isinstance(cell, str) else cell
        pattern = {"": "{}", "best": self.best, "second": self.second}[mark]
        return pattern.format(self.escape(text))


_LATEX = {c: f"\\{c}" for c in "&%#_{}"} | {"\\": r"\textbackslash{}", "$": r"\$"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
_LATEX |= {">": r"\textgreater{}", "λ": r"$\lambda$", "Δ": r"$\Delta$", "±": r"$\pm$", "–": "--"}
_SYMBOLS = {"c_i": "$c_i$", "C̄": r"$\bar{C}$", "C₀": "$C_0$"}  # of the paper, and of the metric
_SYMBOL = re.compile(f"({'|'.join(_SYMBOLS)})")
_MARKDOWN = {c: f"\\{c}" for c in "\\`*[]|$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def _latex(text: str) -> str:
    parts = _SYMBOL.split(visible(text))
    return "".join(_SYMBOLS.get(part) or "".join(_LATEX.get(c, c) for c in part) for part in parts)


def _markdown(text: str) -> str:
    return "".join(_MARKDOWN.get(c, c) for c in visible(text))


_COMPUTED = re.compile(r"[\s']*[=+@-]")


def not_computed(text: str) -> str:
    """Return a text for CSV, led by an apostrophe where a spreadsheet would compute it."""
    return f"'{text}" if _COMPUTED.match(text) else text


def as_written(cell: str) -> str:
    """Return the text that :func:`not_computed` may have led by an apostrophe."""
    return cell[1:] if cell[:1] == "'" and _COMPUTED.match(cell) else cell


MARKDOWN = Style("**{}**", "<u>{}</u>", _markdown)
LATEX = Style(r"\textbf{{{}}}", r"\underline{{{}}}", _latex)


@dataclass
class Table:
    """A table whose first column names the rows.

    Attributes:
        columns: the headings, of the first column too.
        lines: the cells of each row.
        caption: what the table shows.
        groups: (heading, number of columns) over the columns after the first.
        notes: sentences below the table.
        rule_before_last: whether the last row is set apart.
        is_text: whether the cells are text, to be aligned left.
    """

    columns: list[str]
    lines: list[Sequence[Cell]]
    caption: str = ""
    groups: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rule_before_last: bool = False
    is_text: bool = False

    def transposed(self) -> "Table":
        """Return the table with its columns as rows; without groups."""
        first, *others = zip(self.columns, *self.lines, strict=True)
        return Table(list(first), others, self.caption, notes=self.notes, is_text=self.is_text)

    def cells(self, style: Style) -> list[list[str]]:
        return [[style.cell(cell) for cell in line] for line in self.lines]

    def markdown(self) -> str:
        head = self.labels()
        align = ["---", *(["---" if self.is_text else "--:"] * (len(head) - 1))]
        lines = [list(map(_markdown, head)), align, *self.cells(MARKDOWN)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        notes = "".join(f"- {_markdown(note)}\n" for note in self.notes)
        caption = f"{_markdown(self.caption)}\n"
        return "\n".join(part for part in (caption, table, notes) if part.strip())

    def latex(self) -> str:
        spans, at = [], 2
        for heading, n in self.groups:
            spans.append((rf"\multicolumn{{{n}}}{{c}}{{{_latex(heading)}}}", at, at + n - 1))
            at += n
        rules = "".join(rf"\cmidrule(lr){{{a}-{b}}}" for _, a, b in spans)
        body = [" & ".join(line) + r" \\" for line in self.cells(LATEX)]
        if self.rule_before_last:
            body.insert(-1, r"\midrule")
        notes = " ".join(_latex(note) for note in self.notes)
        return "\n".join(
            [
                r"\begin{table}[t]\centering\small",
                r"\begin{tabular}{l" + "r" * (len(self.columns) - 1) + "}",
                r"\toprule",
                " & ".join(["", *(s for s, _, _ in spans)]) + r" \\ " + rules,
                " & ".join(_latex(c) for c in self.columns) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                rf"\caption{{{_latex(self.caption)} {notes}}}".replace(" }", "}"),
                r"\end{table}",
                "",
            ]
        )

    def marked(self) -> list[list[tuple[str, str]]]:
        """Return the cells of each line as (text, mark); the mark of a plain text is empty."""
        return [[(c, "") if isinstance(c, str) else c for c in line] for line in self.lines]

    def labels(self) -> list[str]:
        """Return what names each column where no head stands over it, as on a phone."""
        over = ["", *(heading for heading, n in self.groups for heading in [heading] * n)]
        over += [""] * (len(self.columns) - len(over))
        return [f"{g} {c}".strip() for g, c in zip(over, self.columns, strict=True)]


UNEDITED = "unedited"  # the row of the model as it is
DIGITS = {"drift": 3, "fluency": 2}  # of the figures that are not shown with one


def figure(name: str, value: float | None) -> str:
    """Return a figure of that name as all tables print it."""
    return number(value, DIGITS.get(name, 1))


def figures_of(rows: list[dict], figures: Sequence[str]) -> Table:
    """Return the figures of rows of ``results.json``, those that any row has."""
    shown = [f for f in figures if any(r.get(f) is not None for r in rows)]
    lines = [
        [
            r["method"],
            f"{r['n_edits']:,}",
            *(figure(f, r.get(f)) for f in shown),
            "" if r["edit_seconds"] is None else number(r["edit_seconds"]),
        ]
        for r in rows
    ]
    names = [f.replace("_", " ") for f in shown]
    caption = f"{rows[0]['dataset']}, percent"
    if "drift" in shown:
        caption += "; drift in nats a token and perplexity, both on held-out text"
    if "fluency" in shown:
        caption += "; fluency in bits"
    return Table(["method", "edits", *names, "edit seconds"], lines, caption)


def held_and_drift(rows: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return data set → method → (mean of efficacy and generalization, drift), over the seeds.

    Rows without figures and the unedited model are left out.
    """
    found = {}
    for r in rows:
        if r.get("drift") is not None and r["method"] != UNEDITED:
            held = mean(r[f] for f in ("efficacy", "generalization") if r[f] is not None)
            of = found.setdefault(r["dataset"], {}).setdefault(r["method"], [])
            of.append((held, r["drift"]))
    return {
        dataset: {m: tuple(map(mean, zip(*points, strict=True))) for m, points in of.items()}
        for dataset, of in found.items()
    }


def examples_table(examples) -> Table:
    """Return what the model writes before and after an edit.

    Args:
        examples: :class:`horse_plugin.evaluation.generation.Example` objects.
    """
    lines = [(e.kind, e.prompt, e.before, e.after, e.answer) for e in examples]
    names = ["", "prompt", "before", "after", "answer"]
    return Table(names, lines, "What the model writes", is_text=True)


def kinds_table(kinds: dict[str, dict]) -> Table:
    """Return the perplexity before and after, and the drift, of each kind of held-out text."""
    lines = [
        [
            kind,
            *map(number, (of["before"]["perplexity"], of["after"]["perplexity"])),
            figure("drift", of["after"]["drift"]),
        ]
        for kind, of in kinds.items()
    ]
    return Table(["held-out text", "perplexity before", "after", "drift"], lines)
