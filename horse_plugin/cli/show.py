"""What the ``horse`` command prints: tables of figures, of one edit, of a chain of edits."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from horse_plugin.editing.budget import Budget
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.export import Adapter
from horse_plugin.errors import visible
from horse_plugin.evaluation.generation import Example
from horse_plugin.evaluation.metrics import ALL_FIGURES
from horse_plugin.evaluation.tables import Table, examples_table, figure, figures_of, number
from horse_plugin.model.fingerprint import describe


class PlainConsole(Console):
    """A console that shows text as it is: no markup, no emoji names, no control characters.

    What we print comes from files of others in many places: facts, names, paths, versions.
    """

    def __init__(self):
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **kwargs):
        return super().render_str(visible(text), **kwargs)


def printed(table: Table) -> RichTable:
    """Return a table for the terminal."""
    shown = RichTable(title=table.caption or None, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, name in enumerate(table.columns):
        is_text = table.is_text or i == 0
        shown.add_column(name, justify="left" if is_text else "right", no_wrap=not table.is_text)
    for line in table.lines:
        shown.add_row(*line)
    return shown


def figures(rows: list[dict]) -> RichTable:
    """Return rows of ``results.json`` as a table, in percent."""
    return printed(figures_of(rows, ALL_FIGURES))


def stages(found: dict) -> RichTable:
    """Return what ``bench`` found, in seconds; shares are of the whole edit."""
    total = sum(s["seconds"] for s in found["stages"])
    lines = [
        [
            s["name"],
            number(s["seconds"], 4),
            f"{100 * s['seconds'] / total:.0f}%" if s in found["stages"] else "",
            "" if s["floor_seconds"] is None else number(s["floor_seconds"], 4),
            number(s["peak_memory_mb"], 0),
        ]
        for s in found["stages"] + found["others"]
    ]
    caption = f"{found['n_edits']} edits, {found['dtype']}, {found['device']}"
    return printed(Table(["stage", "seconds", "share", "floor", "peak MB"], lines, caption))


def examples(found: Sequence[Example]) -> RichTable:
    """Return what the model writes before and after an edit as a table."""
    return printed(examples_table(found))


def outcome(delta: EditDelta) -> list:
    """Return what an edit cost each kind of text, what the model writes, and what a budget took."""
    measured = delta.about.get("figures") or {}
    parts = []
    if kinds := measured.get("kinds"):
        lines = [
            [kind, *map(number, (of["before"]["perplexity"], of["after"]["perplexity"])), drift]
            for kind, of in kinds.items()
            for drift in [figure("drift", of["after"]["drift"])]
        ]
        names = ["held-out text", "perplexity before", "after", "drift"]
        parts.append(printed(Table(names, lines)))
    if budget := delta.about.get("budget"):
        parts.append(Budget(**budget).sentence())
    if written := measured.get("examples"):
        parts.append(examples([Example(**example) for example in written]))
    return parts


def edit(delta: EditDelta, first: int = 0, n_records: int = 10) -> list:
    """Return tables that say what an edit is for, on what, how, and what it did.

    Args:
        first: how many facts to leave out at the start.
        n_records: the most facts to show after them.
    """
    about, measured = delta.about, delta.about.get("figures")
    size = sum(t.nbytes for t in delta.tensors.values()) / 2**20
    facts = [
        ("edit", delta.name),
        ("made", about.get("made") or "–"),
        ("facts", f"{len(delta.records):,}"),
        ("model", describe(about["model"])),
        ("method", about["hparams"]["alg_name"]),
        ("archive", str(about["hparams"].get("archive") or "untrained")),
        ("size", f"{number(size)} MB"),
        *((name, str(version)) for name, version in about["versions"].items()),
    ]
    tables = []
    if measured:
        lines = []
        for name in ALL_FIGURES:
            both = [measured[when].get(name) for when in ("before", "after")]
            if any(value is not None for value in both):
                lines.append([name.replace("_", " "), *(figure(name, value) for value in both)])
        caption = "Figures: percent; drift in nats a token, perplexity, fluency in bits"
        tables.append(printed(Table(["", "before", "after"], lines, caption)))
        conflicts = measured.get("conflicts", {}).items()
        facts += [(kind.replace("_", " "), f"{n:,}") for kind, n in conflicts]
    layers = []
    for module in delta.modules:
        keys = delta.tensors.get(f"{module}.keys")
        form = "whole" if keys is None else f"rank {len(keys)}"
        moved = about.get("moved", {}).get(module, float("nan"))
        layers.append([module, form, f"{moved:.2e}"])
    layers = Table(["module", "form", "moved, ‖ΔW‖/‖W‖"], layers, "Weights")
    records = [[r.prompt, r.target_new] for r in delta.records[first : first + n_records]]
    shown = f"Facts {first + 1:,} to {first + len(records):,} of {len(delta.records):,}"
    records = Table(["prompt", "answer"], records, shown, is_text=True)
    overview = RichTable(box=box.SIMPLE, show_header=False)
    for line in facts:
        overview.add_row(*line)
    return [overview, printed(layers), *tables, *outcome(delta), printed(records)]


def log(entries: list[dict]) -> RichTable:
    """Return the edits of a chain as a table, oldest first."""
    states = (f"undone {e['undone']}" if e["undone"] else "in force" for e in entries)
    lines = [
        [e["name"], e["made"], f"{e['n_edits']:,}", state]
        for e, state in zip(entries, states, strict=True)
    ]
    return printed(Table(["edit", "made", "facts", ""], lines, is_text=True))


def adapter(made: Adapter) -> RichTable:
    """Return what a LoRA adapter keeps of the edit as a table."""
    edited, kept = made.efficacy
    line = [str(made.rank), f"{made.error:.1e}", *map(number, (edited, kept, edited - kept))]
    names = ["rank", "relative error", "efficacy, edit", "adapter", "lost"]
    return printed(Table(names, [line]))
