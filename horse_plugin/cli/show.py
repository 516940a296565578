"""What the ``horse`` command prints: tables of figures, of one edit, of a chain of edits."""

from rich import box
from rich.table import Table

from horse_plugin.editing.delta import EditDelta
from horse_plugin.evaluation.metrics import FIGURES


def figures(rows: list[dict]) -> Table:
    """Rows of ``results.json``, in percent."""
    shown = [f for f in FIGURES if any(r[f] is not None for r in rows)]
    title = f"{rows[0]['dataset']}, percent"
    table = Table(title=title, box=box.SIMPLE, padding=0)
    table.add_column("method", no_wrap=True)
    for name in ("edits", *shown, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        seconds = "" if r["edit_seconds"] is None else f"{r['edit_seconds']:.1f}"
        table.add_row(r["method"], str(r["n_edits"]), *(figure(r[f]) for f in shown), seconds)
    return table


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def stages(found: dict) -> Table:
    """What ``bench`` found, in seconds; shares are of the whole edit."""
    total = sum(s["seconds"] for s in found["stages"])
    title = f"{found['n_edits']} edits, {found['dtype']}, {found['device']}"
    table = Table("stage", title=title, box=box.SIMPLE)
    for name in ("seconds", "share", "floor", "peak MB"):
        table.add_column(name, justify="right")
    for s in found["stages"] + found["others"]:
        share = f"{100 * s['seconds'] / total:.0f}%" if s in found["stages"] else ""
        floor = "" if s["floor_seconds"] is None else f"{s['floor_seconds']:.4f}"
        table.add_row(s["name"], f"{s['seconds']:.4f}", share, floor, f"{s['peak_memory_mb']:.0f}")
    return table


def general(rows: list[dict]) -> Table:
    """General ability before and after an edit, in percent."""
    table = Table("task", "metric", title="General ability, percent", box=box.SIMPLE)
    for name in ("before", "after", "difference"):
        table.add_column(name, justify="right")
    for r in rows:
        change = f"{r['difference']:+.1f}"
        table.add_row(r["task"], r["metric"], figure(r["before"]), figure(r["after"]), change)
    return table


def examples(rows) -> Table:
    """(prompt, before, after, target) texts of the demo."""
    names = ("prompt", "before", "after", "asked for")
    table = Table(*names, title="Ten of the edited facts", box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    return table


def edit(delta: EditDelta, n_records: int = 10) -> list:
    """All there is to know of an edit: what for, on what, how, and what it did."""
    about = delta.about
    model = "{name} ({architecture}, {n_blocks} blocks, width {hidden_size})"
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("edit", delta.name)
    table.add_row("made", about.get("made") or "–")
    table.add_row("facts", str(len(delta.records)))
    table.add_row("model", model.format(**about["model"]))
    table.add_row("method", about["hparams"]["alg_name"])
    table.add_row("archive", str(about["hparams"].get("archive") or "untrained"))
    size = sum(t.nbytes for t in delta.tensors.values()) / 2**20
    table.add_row("size", f"{size:.1f} MB")
    for name, version in about["versions"].items():
        table.add_row(name, str(version))
    layers = Table("module", "form", box=box.SIMPLE, title="Weights")
    layers.add_column("moved, ‖ΔW‖/‖W‖", justify="right")
    for module in delta.modules:
        keys = delta.tensors.get(f"{module}.keys")
        form = "whole" if keys is None else f"rank {len(keys)}"
        layers.add_row(module, form, f"{about.get('moved', {}).get(module, float('nan')):.2e}")
    parts = [table, layers]
    if measured := about.get("figures"):
        shown = Table("", title="Figures: percent, and perplexity", box=box.SIMPLE)
        for when in ("before", "after"):
            shown.add_column(when, justify="right")
        for name in (*FIGURES, "perplexity"):
            both = [measured[when].get(name) for when in ("before", "after")]
            if any(value is not None for value in both):
                shown.add_row(name, *map(figure, both))
        parts.append(shown)
        for kind, n in measured.get("conflicts", {}).items():
            table.add_row(kind.replace("_", " "), str(n))
    facts = Table("prompt", "answer", box=box.SIMPLE, title=f"Facts, {n_records} at most")
    for r in delta.records[:n_records]:
        facts.add_row(r.prompt, r.target_new)
    return [*parts, facts]


def log(entries: list[dict]) -> Table:
    """A ledger's edits, oldest first."""
    table = Table("edit", "made", "facts", "", box=box.SIMPLE)
    for e in entries:
        state = f"undone {e['undone']}" if e["undone"] else "in force"
        table.add_row(e["name"], e["made"], str(e["n_edits"]), state)
    return table


def adapter(made) -> Table:
    """What a LoRA adapter keeps of the edit."""
    table = Table("rank", "relative error", "efficacy, edit", "adapter", "lost", box=box.SIMPLE)
    edited, kept = made.efficacy
    texts = f"{made.rank}", f"{made.error:.1e}", *map(figure, (edited, kept, edited - kept))
    table.add_row(*texts)
    return table
