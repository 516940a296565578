"""Validations: edits of records that training has not seen, and the score of each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from horse_plugin.data.corpus import shipped_pieces
from horse_plugin.data.records import EditRecord
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.memory import check_edit_memory
from horse_plugin.editing.solve import Roots
from horse_plugin.evaluation.drift import OrdinaryText
from horse_plugin.evaluation.metrics import Evaluation, Evaluator, mean
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.preserve import Preserve


class Validation:
    """The edits of a validation, of ``val_edits`` records each.

    Args:
        backbone, hparams: those of the training.
        records: what to validate on.
    """

    def __init__(
        self, backbone: Backbone, hparams: HORSEHyperParams, records: Sequence[EditRecord]
    ):
        self.backbone = backbone
        self.hparams = replace(hparams, max_drift=None)  # a search for each validation
        n = min(hparams.val_edits or hparams.edits_per_step, len(records))
        records = records[: hparams.val_records or n]
        self.chunks = [records[i : i + n] for i in range(0, len(records), n)]

    def evaluators(self) -> Iterator[Evaluator]:
        """Yield an evaluator for each edit, which knows the model before it."""
        text = OrdinaryText(self.backbone, shipped_pieces("choose"))
        for records in self.chunks:
            yield Evaluator(self.backbone, records, text=text)

    def check_memory(self, evaluators: Iterable[Evaluator]):
        """Refuse edits for which there is not room enough.

        Raises:
            UsageError: an edit would be in blocks, and there are several processes.
            HorseError: an edit would take more memory than is allowed, or than is free.
        """
        advice = "Validate on fewer facts in an edit (val_edits)"
        for evaluator in evaluators:
            prompts = evaluator.edits.to_capture(self.hparams.keep_next)
            check_edit_memory(self.backbone, prompts, self.hparams, advice=advice)

    def measure(
        self,
        evaluator: Evaluator,
        network: HyperNetwork,
        preserve: Preserve | None,
        roots: Roots,
    ) -> Evaluation:
        """Edit the evaluator's records with a network, measure, and undo the edit."""
        parts = self.hparams, network, preserve, roots
        editor = HorseEditor.from_backbone(self.backbone, *parts)
        editor.edit(evaluator.edits)
        try:
            return evaluator.evaluate()
        finally:
            editor.undo()

    def figures(self, evaluations: Iterable[Evaluation]) -> dict[str, float]:
        """Return the means of the edits' figures, with their ``score`` by ``val_score``."""
        figures, scores = [], []
        for evaluation in evaluations:
            figures.append(evaluation.summary() | {"mean": evaluation.score()})
            by = {"kept": evaluation.kept_score, "paper": evaluation.score}
            scores.append(by[self.hparams.val_score]())
        means = {name: mean(f[name] for f in figures if f[name] is not None) for name in figures[0]}
        return means | {"score": mean(scores)}
