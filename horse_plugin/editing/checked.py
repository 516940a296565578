"""An edit with checks: find conflicts, measure, edit, measure again."""

import warnings
from dataclasses import asdict
from pathlib import Path

from horse_plugin.assets import HELDOUT_TEXT
from horse_plugin.editing.conflicts import Conflicts, find_conflicts, known_facts
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import UsageError
from horse_plugin.evaluation import results
from horse_plugin.evaluation.drift import perplexity
from horse_plugin.evaluation.metrics import Evaluator


def checked_edit(
    editor: HorseEditor,
    records,
    dataset: str,
    name: str | None = None,
    strict: bool = False,
    heldout=None,
    max_rise: float = 20.0,
) -> tuple[EditDelta, list[dict]]:
    """Edit the records, and warn about conflicts and about a rise of perplexity.

    Args:
        records: prepared edits, edit records, or anything that
            :func:`horse_plugin.load_records` takes.
        dataset: the name of what the records came from, for the rows.
        name: the name of the edit; None is a number.
        strict: whether to refuse records with conflicts (:mod:`horse_plugin.editing.conflicts`).
        heldout: a text file whose perplexity is compared; None is the shipped text.
        max_rise: the largest rise of that perplexity without a warning, in percent.

    Returns:
        The delta, with ``about["figures"]``, and the rows of ``results.json`` before and after.

    Raises:
        UsageError: the held-out text cannot be read, a record's prompts cannot be tokenised, or,
            with ``strict``, there are conflicts. The model is as it was.
    """
    hp, backbone = editor.hparams, editor.backbone
    try:
        text = Path(heldout or HELDOUT_TEXT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{heldout}: not readable as UTF-8 text ({error}).") from None

    def report(found: Conflicts) -> dict[str, int]:
        if strict and found.lines():
            raise UsageError(f"--strict: {'; '.join(found.lines())}.")
        for line in found.lines():
            warnings.warn(line, stacklevel=3)
        return {name: n for name, indices in asdict(found).items() if (n := len(indices))}

    edits = backbone.prepare(records)
    earlier = [r for delta in editor.history for r in delta.records]
    conflicts = report(find_conflicts(edits, backbone.tokenizer.unk_token_id, earlier))
    edits.check()

    backbone.cache_trunk_states(edits.flat())
    captured = editor.capture(edits)  # which predicts the edit prompts' answers on its way
    evaluator = Evaluator(backbone, edits, known=captured.predicted)
    conflicts |= report(known_facts(evaluator.before))
    perplexity_before = perplexity(backbone, text)

    delta = editor.edit(edits, name, captured)
    del captured  # gigabytes, for a large edit of a large model

    perplexity_after = perplexity(backbone, text)
    if not perplexity_after <= perplexity_before * (1 + max_rise / 100):
        warnings.warn(
            f"perplexity on the held-out text rose from {perplexity_before:.1f} to "
            f"{perplexity_after:.1f}, by more than {max_rise:g}%: the edit harms what it should "
            "leave alone",
            stacklevel=2,
        )
    after = evaluator.evaluate()
    delta.about["figures"] = {
        "before": evaluator.before.summary() | {"perplexity": perplexity_before},
        "after": after.summary() | {"perplexity": perplexity_after},
        "conflicts": conflicts,
    }
    rows = [
        results.row("before" if earlier else "unedited", dataset, hp, evaluator.before),
        results.row(hp.alg_name, dataset, hp, after, delta.about["seconds"]),
    ]
    return delta, rows
