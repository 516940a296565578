"""An edit with checks: find conflicts, measure, edit, measure again."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from horse_plugin.data.prompts import PreparedEdits, Prompt
from horse_plugin.editing.conflicts import Conflicts, find_conflicts, known_facts
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation import results
from horse_plugin.evaluation.drift import Pieces, heldout_pieces
from horse_plugin.evaluation.facts import fact_rows
from horse_plugin.evaluation.generation import LENGTH
from horse_plugin.evaluation.metrics import Evaluation, Evaluator
from horse_plugin.evaluation.verdict import BAD, judge
from horse_plugin.model.guard import guarded


@guarded
def checked_edit(
    editor: HorseEditor,
    records,
    dataset: str,
    name: str | None = None,
    strict: bool = False,
    heldout=None,
    max_rise: float = 20.0,
    unfinished=None,
) -> tuple[EditDelta, list[dict]]:
    """Edit the records, say what it brought and what it cost, and warn of conflicts.

    Args:
        records: prepared edits, edit records, or anything that
            :func:`horse_plugin.load_records` takes; None writes the facts in force anew, as
            :meth:`HorseEditor.edit` does, and measures those.
        dataset: the name of what the records came from, for the rows.
        name: the name of the edit; None is a number.
        strict: whether to refuse records with conflicts (:mod:`horse_plugin.editing.conflicts`),
            and to undo an edit with a bad verdict (:mod:`horse_plugin.evaluation.verdict`).
        heldout: a text file on which drift and perplexity are measured; None is the shipped text.
        max_rise: the largest rise of that perplexity without a warning, in percent.
        unfinished: as in :meth:`HorseEditor.edit`.

    Returns:
        The delta, with ``about["figures"]`` and ``facts``, and the rows of ``results.json``
        before and after.

    Raises:
        UsageError: the held-out text cannot be read, a record's prompts cannot be tokenised, or,
            with ``strict``, there are conflicts. The model is as it was.
        HorseError: with ``strict``, the facts do not hold or the model is damaged. The model is as
            it was, too.
    """
    hp, backbone = editor.hparams, editor.backbone
    pieces = heldout_pieces(heldout)

    def report(found: Conflicts) -> dict[str, int]:
        if strict and found.lines():
            raise UsageError(f"--strict: {'; '.join(found.lines())}.")
        for line in found.lines():
            warnings.warn(line, stacklevel=4)
        return {name: n for name, indices in asdict(found).items() if (n := len(indices))}

    earlier = editor.facts_in_force if records is not None else editor.facts_to_write_anew()
    edits = PreparedEdits.of_none() if records is None else backbone.prepare(records)
    unknown = backbone.tokenizer.unk_token_id
    unknown = None if unknown == backbone.tokenizer.eos_token_id else unknown  # as GPT-2 has it
    conflicts = report(find_conflicts(edits, unknown, earlier))
    edits.check()
    written = edits if records is not None else backbone.prepare(earlier, warn=False)
    prompts = editor.to_capture(edits)

    job = backbone.one_job("edit", _tokens(editor, written, prompts, pieces))
    with _undone_after_an_error(editor), job:
        backbone.cache_trunk_states(written.flat())
        captured = editor.capture_at_once(prompts)
        # A capture predicts the edit prompts' answers on its way, in the unedited model.
        known = captured.predicted if captured and not editor.history else None
        text = editor.ordinary_text(pieces)
        now = text.measure() if editor.history else text.before
        evaluator = Evaluator(backbone, written, known=known, text=text, writing=True)
        evaluator.before.cost = now
        if records is not None:
            conflicts |= report(known_facts(evaluator.before))

        asked = None if records is None else edits
        delta = editor.edit(asked, name, captured, unfinished)
        del captured  # gigabytes, for a large edit of a large model
        if backbone.job:
            backbone.job.finish("capture", "check")  # the facts may hold before the last sweep

        after = evaluator.evaluate()
    rise = 100 * (after.cost.perplexity / now.perplexity - 1)
    if not rise <= max_rise:
        warnings.warn(
            f"perplexity on the held-out text rose from {now.perplexity:.1f} to "
            f"{after.cost.perplexity:.1f}, by more than {max_rise:g}%: the edit harms what it "
            "should leave alone. max_drift sets a limit",
            stacklevel=3,
        )
    delta.about["figures"] = figures_of(evaluator.before, after) | {"conflicts": conflicts}
    delta.facts = fact_rows(written, backbone.tokenizer, evaluator.before, after)
    verdict = judge(delta.about["figures"])
    if strict and verdict.level == BAD:
        editor.undo()
        raise HorseError(f"--strict: undone. {verdict.sentence} {' '.join(verdict.advice)}")
    rows = [
        results.row("before" if editor.history[:-1] else "unedited", dataset, hp, evaluator.before),
        results.row(hp.alg_name, dataset, hp, after, delta.about["seconds"]),
    ]
    return delta, rows


@contextlib.contextmanager
def _undone_after_an_error(editor: HorseEditor) -> Iterator[None]:
    """Take back an edit that is made in a ``with`` which ends with an error."""
    n = len(editor.history)
    try:
        yield
    except BaseException:
        if len(editor.history) > n:
            editor.undo()
        raise


def figures_of(before: Evaluation, after: Evaluation) -> dict:
    """Return the figures of an edit as ``edit.json`` has them, with the verdict on them.

    Args:
        before, after: what an evaluator found that measures ordinary text and what is written.
    """
    kinds = before.cost.kinds
    figures = {
        "before": before.summary(),
        "after": after.summary(),
        "held": after.whole("written"),
        "kept": after.whole("locality"),
        "kinds": {k: {"before": kinds[k], "after": after.cost.kinds[k]} for k in kinds},
        "examples": [asdict(example) for example in after.examples],
    }
    return figures | {"verdict": judge(figures).to_dict()}


def _tokens(
    editor: HorseEditor, edits: PreparedEdits, prompts: Sequence[Prompt], pieces: Pieces
) -> dict[str, int]:
    """Return step → an estimate of the tokens that an edit with its figures takes there.

    Args:
        edits: what is measured.
        prompts: what is captured.
    """
    hp = editor.hparams
    read, every = (sum(len(p.ids) for p in of) for of in (prompts, edits.flat()))
    held_out = sum(len(text) for _, text in pieces) // 4  # characters in a token, about
    return {
        "trunk": every + held_out,
        "capture": read * (hp.edit_sweeps + 1) // 2,
        "check": read * (hp.edit_sweeps - 1) // 2,  # a sweep checks first what may hold by now
        "statistics": editor.unread(),
        "ordinary text": 2 * held_out,
        "evaluate": 2 * every,
        "writing": 2 * LENGTH,  # all prompts side by side
    }
