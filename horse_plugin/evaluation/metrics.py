"""Efficacy, generalization, specificity, locality and portability, in batches.

All are teacher-forced token accuracies, one per record, in percent when averaged: the share of
answer tokens that the model predicts when it reads the prompt and the answer before them. They
equal what EasyEdit computes one record at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from horse_plugin.data.prompts import Prompt
from horse_plugin.distributed import gather_answers, local_indices, raise_on_all_ranks
from horse_plugin.model.backbone import Backbone

# figure → the kind of prompts that it is measured on
MEASURED_ON = {
    "efficacy": "edit",
    "generalization": "rephrase",
    "specificity": "unrelated",
    "locality": "unrelated",
    "portability": "portability",
}
FIGURES = tuple(MEASURED_ON)
SCORED = ("efficacy", "generalization", "specificity")  # the paper's three, whose mean is the score


@torch.no_grad()
def predict(backbone: Backbone, prompts: Sequence[Prompt]) -> dict[Prompt, torch.Tensor]:
    """Return the tokens that the model predicts for each prompt's answer, on the CPU.

    Every prompt runs through the model once, however often it is given.
    """
    prompts = list(dict.fromkeys(prompts))
    local = local_indices(prompts)
    predicted = [None] * len(local)
    with raise_on_all_ranks():
        for batch in backbone.batches([prompts[i] for i in local], "evaluate"):
            tokens = backbone.logits(batch).argmax(-1).split([len(p.answer) for p in batch.prompts])
            for i, part in zip(batch.index, tokens, strict=True):
                predicted[i] = part
    return dict(zip(prompts, gather_answers(prompts, predicted), strict=True))


@dataclass
class Evaluation:
    """Figures of one model on a list of records.

    Attributes:
        records: for each record, figure → share from 0 to 1, or None where the record has no
            prompt of that kind.
    """

    records: list[dict[str, float | None]]

    def mean(self, name: str) -> float | None:
        """Return the mean of a figure over the records that have it, in percent."""
        shares = [r[name] for r in self.records if r[name] is not None]
        return 100 * sum(shares) / len(shares) if shares else None

    def summary(self) -> dict[str, float | None]:
        """Return the mean of every figure, in percent."""
        return {name: self.mean(name) for name in FIGURES}

    def score(self) -> float:
        """Return the mean of efficacy, generalization and specificity, in percent."""
        return mean(m for name in SCORED if (m := self.mean(name)) is not None)


class Evaluator:
    """Measures a model on records, before and after it is edited.

    Make it before the edit: its predictions then are what ``locality`` compares with.

    Args:
        backbone: the unedited model.
        records: the records to measure on, prepared or anything that
            :func:`horse_plugin.load_records` takes.
        known: predictions of the unedited model that need not be computed again.

    Attributes:
        edits: the prepared records.
        before: the figures of the unedited model.

    Raises:
        UsageError: a record's prompts cannot be tokenised.
    """

    def __init__(
        self, backbone: Backbone, records, *, known: dict[Prompt, torch.Tensor] | None = None
    ):
        self.backbone, self.edits = backbone, backbone.prepare(records)
        self.edits.check()
        prompts, known = self.edits.flat(), known or {}
        backbone.cache_trunk_states(prompts)
        self._unedited = known | predict(backbone, [p for p in prompts if p not in known])
        self.before = self._evaluation(self._unedited)

    def evaluate(self, backbone: Backbone | None = None) -> Evaluation:
        """Return the figures of the model as it is now, or of an edited copy of it."""
        return self._evaluation(predict(backbone or self.backbone, self.edits.flat()))

    def _evaluation(self, predicted: dict[Prompt, torch.Tensor]) -> Evaluation:
        def share(figure: str, prompt: Prompt) -> float:
            right = self._unedited[prompt] if figure == "locality" else torch.tensor(prompt.answer)
            return (predicted[prompt] == right).double().mean().item()

        return Evaluation(
            [
                {
                    figure: mean(share(figure, p) for p in self.edits.of(kind, i))
                    for figure, kind in MEASURED_ON.items()
                }
                for i in range(len(self.edits))
            ]
        )


def mean(values) -> float | None:
    """Return the mean, or None if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else None
