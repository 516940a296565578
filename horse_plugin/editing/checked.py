"""One edit as a careful person makes it: look for trouble, measure, edit, measure again."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from horse_plugin.assets import HELDOUT_TEXT
from horse_plugin.data.records import EditRecord
from horse_plugin.editing import conflicts
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import UsageError
from horse_plugin.evaluation import results
from horse_plugin.evaluation.metrics import Evaluator, perplexity


def measured_edit(
    editor: HorseEditor,
    records: Sequence[EditRecord],
    dataset: str,
    name: str | None = None,
    strict: bool = False,
    heldout=None,
    max_rise: float = 20.0,
) -> tuple[EditDelta, list[dict]]:
    """Edit the records, with a warning for whatever a user should know.

    Args:
        dataset: what the records came from, for the rows.
        name: of the edit.
        strict: refuse records in which :mod:`horse_plugin.editing.conflicts` finds a conflict.
        heldout: a text file on which the model's perplexity is compared; a short text of our own
            by default.
        max_rise: how much that perplexity may rise, in percent, without a warning.

    Returns:
        The delta, with ``about["figures"]``, and the rows of ``results.json`` before and after.

    Raises:
        UsageError: an unreadable held-out text; with ``strict``, conflicts. The model is as it was.
    """
    hp, backbone = editor.hparams, editor.backbone
    try:
        text = Path(heldout or HELDOUT_TEXT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{heldout}: not readable as UTF-8 text ({error}).") from None

    def tell(found: conflicts.Conflicts) -> dict:
        if strict and found.lines():
            raise UsageError(f"--strict: {'; '.join(found.lines())}.")
        for line in found.lines():
            warnings.warn(line, stacklevel=3)
        return {name: n for name, indices in asdict(found).items() if (n := len(indices))}

    earlier = [r for delta in editor.history for r in delta.records]
    told = tell(conflicts.find(backbone, records, hp.max_length, earlier))
    evaluator = Evaluator(backbone, records, hp.batch_tokens, hp.max_length)
    before = evaluator.evaluate()
    told |= tell(conflicts.known(before))
    calm = perplexity(backbone, text, hp.batch_tokens)
    delta = editor.edit(records, name)
    now = perplexity(backbone, text, hp.batch_tokens)
    if not now <= calm * (1 + max_rise / 100):
        warnings.warn(
            f"perplexity on the held-out text rose from {calm:.1f} to {now:.1f}, by more than "
            f"{max_rise:g}%: the edit harms what it should leave alone",
            stacklevel=2,
        )
    after = evaluator.evaluate()
    delta.about["figures"] = {
        "before": before.summary() | {"perplexity": calm},
        "after": after.summary() | {"perplexity": now},
        "conflicts": told,
    }
    rows = [
        results.row("before" if earlier else "unedited", dataset, hp, before),
        results.row(hp.alg_name, dataset, hp, after, delta.about["seconds"]),
    ]
    return delta, rows
