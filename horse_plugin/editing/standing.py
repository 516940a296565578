"""Whether the figures of an edit in a chain still hold: what came and went since it was made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from horse_plugin.editing.chain import Chain
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import UsageError
from horse_plugin.evaluation import results
from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.model.guard import guarded

UNSETTLED = (
    "Edits now lie on others than they were made on, and some of their facts may hold no more."
)


@dataclass(frozen=True)
class Since:
    """The names of edits that were put into the model or taken out of it since an edit was made."""

    added: tuple[str, ...]
    undone: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.undone)

    def __str__(self) -> str:
        changes = {"added": self.added, "undone": self.undone}
        return "; ".join(f"since then {what}: {', '.join(n)}" for what, n in changes.items() if n)


def since(name: str, onto: Sequence[str] | None, in_force: Sequence[str]) -> Since:
    """Return what changed around an edit in force.

    Args:
        name: its name.
        onto: the edits in force when it was made; None, as release 0.1 did not say, is those below.
        in_force: the edits in force now, oldest first.
    """
    onto = in_force[: in_force.index(name)] if onto is None else onto
    added = tuple(n for n in in_force if n not in onto and n != name)
    return Since(added, tuple(n for n in onto if n not in in_force))


def stale(chain: Chain) -> dict[str, Since]:
    """Return those edits in force whose figures are of another set of edits, and what changed."""
    names = chain.in_force
    found = {  # one that wrote others' facts anew has no facts to measure
        e["name"]: since(e["name"], e.get("onto"), names)
        for e in chain.entries
        if not e["undone"] and e["n_edits"]
    }
    return {name: changed for name, changed in found.items() if changed}


def is_unsettled(chain: Chain) -> bool:
    """Return whether edits in force lie on others than they were made on.

    The last one was made with all under it in place. If some of them were undone since, or put
    back, facts may hold no more, until an edit on top of all writes them anew.
    """
    names = chain.in_force
    onto = {e["name"]: e.get("onto") for e in chain.entries}
    return bool(names) and onto[names[-1]] not in (None, names[:-1])


@guarded
def measure_again(editor: HorseEditor, deltas: Sequence[EditDelta]) -> list[dict]:
    """Put a chain into an unedited model, and return a row of figures for the facts of each edit.

    Each row's ``method`` is the name of the edit. Locality, drift and perplexity compare with the
    unedited model.

    Raises:
        UsageError: no edit with facts is in force.
    """
    if not any(delta.records for delta in deltas):
        raise UsageError("no edit is in force that has facts to measure.")
    backbone = editor.backbone
    text = OrdinaryText(backbone, heldout_pieces())
    of_facts = [d for d in deltas if d.records]  # one that wrote others' facts anew has none
    evaluators = [Evaluator(backbone, d.records) for d in of_facts]
    editor.apply_chain(deltas)
    cost = text.measure()
    rows = []
    for delta, evaluator in zip(of_facts, evaluators, strict=True):
        found = replace(evaluator.evaluate(), cost=cost)
        rows.append(results.row(delta.name, "facts of each edit", editor.hparams, found))
    return rows
