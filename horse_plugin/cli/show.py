"""What the ``horse`` command prints: tables of figures, of one edit, of a chain of edits."""

from collections.abc import Sequence

import torch
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from horse_plugin.editing.budget import Budget
from horse_plugin.editing.chain import Chain
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.export import Adapter
from horse_plugin.editing.memory import free_bytes
from horse_plugin.editing.standing import UNSETTLED, Since, is_unsettled, stale
from horse_plugin.errors import counted, visible
from horse_plugin.evaluation.generation import Example
from horse_plugin.evaluation.metrics import ALL_FIGURES
from horse_plugin.evaluation.tables import (
    Table,
    examples_table,
    figure,
    figures_of,
    kinds_table,
    minute,
    number,
)
from horse_plugin.evaluation.verdict import Verdict, judge
from horse_plugin.model.fingerprint import describe
from horse_plugin.training.trainer import Forecast


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
    """Return rows of ``results.json`` as a table, in percent; a few rows stand side by side."""
    table = figures_of(rows, ALL_FIGURES)
    return printed(table.transposed() if len(rows) <= 4 else table)


def verdict(delta: EditDelta) -> list[Text]:
    """Return the verdict on an edit in words and colours, or nothing if it was not measured."""
    measured = delta.about.get("figures")
    return judged(judge(measured)) if measured else []


def judged(found: Verdict) -> list[Text]:
    """Return a verdict in words and colours."""
    style = {"good": "green", "fair": "yellow", "bad": "bold red"}
    return [_styled(found.sentence, style[found.level]), *map(Text, found.advice)]


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
        parts.append(printed(kinds_table(kinds)))
    if budget := delta.about.get("budget"):
        parts.append(Budget(**budget).sentence())
    if written := measured.get("examples"):
        parts.append(examples([Example(**example) for example in written]))
    return parts


def stale_in(chain: Chain) -> list[Text]:
    """Return what to know of a chain that changed: figures that are stale, facts that may fall."""
    said = []
    if found := stale(chain):
        said.append(f"Stale since: the figures of {', '.join(found)}.")
        said[-1] += f" `horse eval --delta {chain.folder}` measures them again."
    if is_unsettled(chain):
        again = f"`horse edit --onto {chain.folder}`, with the options of the last edit"
        said.append(f"{UNSETTLED} {again}, writes all of them anew.")
    return [_styled(line, "yellow") for line in said]


def edit(
    delta: EditDelta, changed: Since | None = None, first: int = 0, n_records: int = 10
) -> list:
    """Return what says what an edit is for, on what, how, and what it did.

    Args:
        changed: what came and went since it was made, if anything did.
        first: how many facts to leave out at the start.
        n_records: the most facts to show after them.
    """
    about, measured = delta.about, delta.about.get("figures")
    size = sum(t.nbytes for t in delta.tensors.values()) / 2**20
    facts = [
        ("edit", delta.name),
        ("made", about.get("made") or "–"),
        ("onto", ", ".join(about.get("onto") or ()) or "–"),
        ("facts", f"{len(delta.records):,}" if delta.records else "those before it, anew"),
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
        conflicts = (measured.get("conflicts") or {}).items()
        facts += [(kind.replace("_", " "), f"{n:,}") for kind, n in conflicts]
    layers = []
    for module in delta.modules:
        keys = delta.tensors.get(f"{module}.keys")
        form = "whole" if keys is None else f"rank {len(keys)}"
        moved = (about.get("moved") or {}).get(module, float("nan"))
        layers.append([module, form, f"{moved:.2e}"])
    layers = Table(["module", "form", "moved, ‖ΔW‖/‖W‖"], layers, "Weights")
    if delta.records:
        lines = [[r.prompt, r.target_new] for r in delta.records[first : first + n_records]]
        shown = f"Facts {first + 1:,} to {first + len(lines):,} of {len(delta.records):,}"
        records = [printed(Table(["prompt", "answer"], lines, shown, is_text=True))]
        if not lines:
            records = [Text(f"None of {len(delta.records):,} facts comes after {first:,} others.")]
    else:
        records = []
    overview = RichTable(box=box.SIMPLE, show_header=False)
    for line in facts:
        overview.add_row(*line)
    notes = [_styled(f"These figures are stale; {changed}.", "yellow")] if changed else []
    return [
        overview,
        *notes,
        *verdict(delta),
        printed(layers),
        *tables,
        *outcome(delta),
        *records,
    ]


def failed(name: str, facts: Sequence[dict]) -> RichTable:
    """Return the facts of an edit that do not hold as a table."""
    lines = [
        [row["prompt"], row["wanted"], row["before"], row["after"]]
        for row in facts
        if row["holds"] != "True"
    ]
    title = f"{name}: {len(lines):,} of {len(facts):,} facts do not hold"
    return printed(Table(["prompt", "wanted", "before", "after"], lines, title, is_text=True))


def forecast(found: Forecast, device: torch.device) -> str:
    """Return what a training would take, in a sentence or two."""
    free, on = free_bytes(device), "GPU" if device.type == "cuda" else "machine"
    there = f"; {number(free / 10**9)} GB are free now" if free else ""
    return (
        f"{counted(found.steps, 'step')} of {number(found.step_seconds)} s, "
        f"{counted(found.validations, 'validation')}: about {_duration(found.seconds)} in all. "
        f"Memory of the {on}: about "
        f"{number(found.peak_memory_mb * 2**20 / 10**9)} GB, the model included{there}."
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def log(chain: Chain) -> RichTable:
    """Return the edits of a chain as a table, oldest first, with what changed around each."""
    now, others, lines = chain.now(), stale(chain), []
    for e in chain.entries:
        state, figures = "in force", "as made"
        if e["undone"]:
            state, figures = f"undone {minute(e['undone'])}", ""
        elif e["name"] in now:
            figures = f"efficacy {number(now[e['name']]['efficacy'])} now"
        elif e["name"] in others:
            figures = f"stale; {others[e['name']]}"
        onto = ", ".join(e.get("onto") or ())
        lines.append([e["name"], minute(e["made"]), f"{e['n_edits']:,}", onto, state, figures])
    names = ["edit", "made, UTC", "facts", "onto", "", "figures"]
    return printed(Table(names, lines, is_text=True))


def adapter(made: Adapter) -> RichTable:
    """Return what a LoRA adapter keeps of the edit as a table."""
    edited, kept = made.efficacy
    line = [str(made.rank), f"{made.error:.1e}", *map(number, (edited, kept, edited - kept))]
    names = ["rank", "relative error", "efficacy, edit", "adapter", "lost"]
    return printed(Table(names, [line]))


def _styled(text: str, style: str) -> Text:
    """Return text in a style; a console of ours escapes plain text only."""
    return Text(visible(text), style)
