"""The demo on real facts and a real model: train, edit 200 facts, measure, report."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from horse_plugin.assets import FACTS
from horse_plugin.data.formats import load_records
from horse_plugin.editing.checked import figures_of
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.evaluation import results
from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
from horse_plugin.evaluation.facts import fact_rows
from horse_plugin.evaluation.generation import Example
from horse_plugin.evaluation.metrics import Evaluation, Evaluator
from horse_plugin.hparams import HORSEHyperParams, default_hparams
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.files import locked_folder, write
from horse_plugin.training.trainer import HORSETrainer

N_EDITS = 200
# Seconds that a short training may take, by its first step, which is the longest, and its steps on
# a machine which is slower: 9 s with AVX512-bf16 on two cores, 12.8 s with AVX2. After five
# the edit holds as after twelve (99.5 and 99.0 % of the facts), at less locality (45 and 56 %).
SECONDS, FEWEST = 140.0, 5
# A short training, so that the demo takes minutes on slow processors, too. Half of the demo's facts
# share their subject, and residuals start longer than the YAML's for those that do not.
BRIEF = {
    "edits_per_step": 60,
    "min_edits_per_step": None,
    "max_iters": 12,
    "val_interval": 12,
    "val_edits": 200,
    "strength": 3.0,
}


@dataclass
class Outcome:
    """What the demo found: rows of ``results.json``, what the model writes, how it was trained."""

    rows: list[dict]
    examples: Sequence[Example]
    training: str


def run_demo(
    out, hparams: HORSEHyperParams | None = None, n_edits: int = N_EDITS, command: str | None = None
) -> Outcome:
    """Train on the shipped facts, and edit ``n_edits`` others at once.

    It leaves ``archive/``, ``edit/``, ``stats/``, ``results.json`` and ``report.html`` in ``out``.

    Args:
        hparams: the settings; None is the default model's, with a training that is shorter on a
            slow machine, and no untrained edit beside it there.
        command: the command line that asks for it, for the report.
    """
    out, seconds = Path(out).expanduser(), math.inf if hparams else SECONDS
    hparams = hparams or replace(default_hparams(), **BRIEF)
    hparams = replace(hparams, archive=None, stats_dir=str(out / "stats"))
    with locked_folder(out):
        return _run_demo(out, hparams, n_edits, seconds, command)


def _run_demo(
    out: Path, hparams: HORSEHyperParams, n_edits: int, seconds: float, command: str | None
) -> Outcome:
    from horse_plugin.comparison.again import report_of  # loads matplotlib

    backbone = Backbone.load(hparams)
    edits = backbone.prepare(load_records(FACTS / "edit.json", n_edits))
    edits.check()
    backbone.cache_trunk_states(edits.flat())
    untrained = HorseEditor.from_backbone(backbone, hparams)
    captured = untrained.capture(edits)  # serves both edits: each is one of the unedited model
    text = OrdinaryText(backbone, heldout_pieces())
    evaluator = Evaluator(backbone, edits, known=captured.predicted, text=text, writing=True)
    rows = [results.row("unedited", "facts", hparams, evaluator.before)]

    def edit_and_measure(name: str, editor: HorseEditor) -> tuple[EditDelta, Evaluation]:
        delta = editor.edit(edits, captured=captured)
        evaluation = evaluator.evaluate()
        rows.append(results.row(name, "facts", hparams, evaluation, delta.about["seconds"]))
        return delta, evaluation

    train, val = FACTS / "train.json", FACTS / "val.json"
    trainer = BriefTrainer(hparams, train, val, out=out / "archive", backbone=backbone)
    trainer.seconds = seconds
    hparams = replace(hparams, archive=str(trainer.run()))
    if not trainer.is_slow:
        edit_and_measure("HORSE, untrained", untrained)
        untrained.undo()
    trained = HorseEditor.from_backbone(backbone, hparams)
    delta, evaluation = edit_and_measure("HORSE, trained", trained)
    delta.facts = fact_rows(edits, backbone.tokenizer, evaluator.before, evaluation)
    shutil.rmtree(out / "edit", ignore_errors=True)  # of an earlier demo
    delta.about |= {"figures": figures_of(evaluator.before, evaluation), "command": command}
    delta.save(out / "edit")
    results.save(out / "results.json", rows)
    write(out / "report.html", report_of(out).html())
    return Outcome(rows, evaluation.examples, trainer.said)


class BriefTrainer(HORSETrainer):
    """A training whose first step sets how many follow.

    Attributes:
        seconds: how long all steps may take; where they would take longer, there are few.
        is_slow: whether they would.
        said: after the first step, what came of it.
    """

    seconds, is_slow, said = math.inf, False, ""

    def train_step(self, records) -> dict[str, float | None]:
        start = time.perf_counter()
        losses = super().train_step(records)
        if self.step == 0:
            took, most = time.perf_counter() - start, self.n_steps
            self.is_slow = took * most > self.seconds
            n = min(most, FEWEST) if self.is_slow else most
            self.hparams = replace(self.hparams, max_iters=n)
            self.said = f"Trained for {n} of at most {most} steps; the first took {took:.1f} s."
            if self.is_slow:
                self.said += " So the edit without training was left out."
        return losses
