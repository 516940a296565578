"""Efficacy, generalization, specificity, locality and portability, in batches.

They are teacher-forced token accuracies, one per record, in percent when averaged: the share of
answer tokens that the model predicts when it reads the prompt and the answer before them. They
equal what EasyEdit computes one record at a time.

Two more say what the model writes. Greedy decoding writes an answer exactly if it predicts every
token of it, so ``written`` and ``rephrase_written`` are the shares of prompts with no token wrong.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from horse_plugin.data.prompts import Prompt
from horse_plugin.distributed import gather_answers, local_indices
from horse_plugin.evaluation.drift import Cost, OrdinaryText
from horse_plugin.evaluation.generation import Example, Writing
from horse_plugin.method.losses import likeliest
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded

# figure → the kind of prompts that it is measured on
MEASURED_ON = {
    "efficacy": "edit",
    "generalization": "rephrase",
    "specificity": "unrelated",
    "locality": "unrelated",
    "portability": "portability",
    "written": "edit",
    "rephrase_written": "rephrase",
}
FIGURES = tuple(MEASURED_ON)
COST = ("drift", "perplexity")  # nats a token, and a perplexity: the less the better
ALL_FIGURES = (*FIGURES, *COST, "fluency")
SCORED = ("efficacy", "generalization", "specificity")  # the paper's three, whose mean is the score
SHARES = (*SCORED, "locality")  # in percent, the more the better


@guarded
@torch.no_grad()
def predict(backbone: Backbone, prompts: Sequence[Prompt]) -> dict[Prompt, torch.Tensor]:
    """Return the tokens that the model predicts for each prompt's answer, on the CPU.

    Every prompt runs through the model once, however often it is given.
    """
    prompts = list(dict.fromkeys(prompts))
    local = local_indices(prompts)
    predicted = [None] * len(local)
    with backbone.lockstep.loop():
        for batch in backbone.batches([prompts[i] for i in local], "evaluate"):
            tokens = likeliest(backbone.logits(batch)).split([len(p.answer) for p in batch.prompts])
            for i, part in zip(batch.index, tokens, strict=True):
                predicted[i] = part
    return dict(zip(prompts, gather_answers(prompts, predicted), strict=True))


@dataclass
class Evaluation:
    """Figures of one model on a list of records.

    Attributes:
        records: for each record, figure → share from 0 to 1, or None where the record has no
            prompt of that kind.
        cost: what the model is like on ordinary text, if that was measured.
        fluency: of what it writes, in bits, if that was measured.
        examples: some of what it writes.
        predicted: prompt → the tokens that the model predicts for its answer.
    """

    records: list[dict[str, float | None]]
    cost: Cost | None = None
    fluency: float | None = None
    examples: Sequence[Example] = ()
    predicted: dict[Prompt, torch.Tensor] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """Return the mean of a figure over the records that have it, in percent."""
        shares = [r[name] for r in self.records if r[name] is not None]
        return 100 * sum(shares) / len(shares) if shares else None

    def whole(self, name: str) -> tuple[int, int]:
        """Return for how many records a figure is 1, and how many records have it."""
        shares = [r[name] for r in self.records if r[name] is not None]
        return sum(share == 1 for share in shares), len(shares)

    def summary(self) -> dict[str, float | None]:
        """Return the mean of every figure, in percent, then drift, perplexity and fluency."""
        cost = self.cost.summary() if self.cost else dict.fromkeys(COST)
        return {n: self.mean(n) for n in FIGURES} | cost | {"fluency": self.fluency}

    def score(self) -> float:
        """Return the mean of efficacy, generalization and specificity, in percent."""
        return mean(m for name in SCORED if (m := self.mean(name)) is not None)

    def kept_score(self) -> float:
        """Return the mean of the three figures, of locality, and of what is left of ordinary text.

        The latter is 100·e^−drift: in the geometric mean, the share of a token's probability that
        the edit left. A user wants the facts to hold and the model to go on as before, and would
        not take a point of one for several of the other.
        """
        names = (*SCORED, "locality")
        shares = [m for name in names if (m := self.mean(name)) is not None]
        return mean(shares + ([100 * math.exp(-self.cost.drift)] if self.cost else []))


class Evaluator:
    """Measures a model on records, before and after it is edited.

    Make it before the edit: its predictions then are what ``locality`` compares with.

    Args:
        backbone: the unedited model.
        records: the records to measure on, prepared or anything that
            :func:`horse_plugin.load_records` takes.
        known: predictions of the unedited model that need not be computed again.
        text: ordinary text to measure, too; None leaves drift and perplexity out.
        writing: whether to let the model write, too.

    Attributes:
        edits: the prepared records.
        before: the figures of the unedited model.

    Raises:
        UsageError: a record's prompts cannot be tokenised.
    """

    def __init__(
        self,
        backbone: Backbone,
        records,
        *,
        known: dict[Prompt, torch.Tensor] | None = None,
        text: OrdinaryText | None = None,
        writing: bool = False,
    ):
        self.text = text
        self.backbone, self.edits = backbone, backbone.prepare(records)
        self.edits.check()
        prompts, known = self._prompts(), known or {}
        backbone.cache_trunk_states(prompts)
        self._unedited = known | predict(backbone, [p for p in prompts if p not in known])
        self._writing = Writing(backbone, self.edits.records) if writing else None
        self.before = self._evaluation(self._unedited, text.before if text else None)
        self.before.fluency = self._writing.before if writing else None

    def evaluate(self, backbone: Backbone | None = None) -> Evaluation:
        """Return the figures of the model as it is now, or of an edited copy of it."""
        with (backbone or self.backbone).held():
            predicted = predict(backbone or self.backbone, self._prompts())
            found = self._evaluation(predicted, self.text.measure(backbone) if self.text else None)
            if self._writing:
                found.fluency, found.examples = self._writing.measure(backbone)
        return found

    def efficacies(self, n: int, backbone: Backbone | None = None) -> list[float]:
        """Return the efficacy of each of the first n records, from 0 to 1, on the model now.

        Args:
            backbone: as in :meth:`evaluate`.
        """
        of_records = [self.edits.of("edit", i) for i in range(n)]
        prompts = _with_accepted(p for of in of_records for p in of)
        with (backbone or self.backbone).held():
            predicted = predict(backbone or self.backbone, prompts)
        return [mean(_share_right(predicted, p) for p in of) for of in of_records]

    def _prompts(self) -> list[Prompt]:
        return _with_accepted(self.edits.flat())

    def _evaluation(self, predicted: dict[Prompt, torch.Tensor], cost: Cost | None) -> Evaluation:
        def share(figure: str, prompt: Prompt) -> float:
            if figure == "locality":
                return _share_with(self._unedited[prompt], predicted, prompt)
            share = _share_right(predicted, prompt)
            return float(share == 1) if figure in ("written", "rephrase_written") else share

        return Evaluation(
            [
                {
                    figure: mean(share(figure, p) for p in self.edits.of(kind, i))
                    for figure, kind in MEASURED_ON.items()
                }
                for i in range(len(self.edits))
            ],
            cost,
            predicted=predicted,
        )


def _with_accepted(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts, each also with the other answers that it accepts."""
    return [q for p in prompts for q in (p, *p.accepted)]


def _share_with(right: torch.Tensor, predicted: dict[Prompt, torch.Tensor], prompt: Prompt):
    return (predicted[prompt] == right).double().mean().item()


def _share_right(predicted: dict[Prompt, torch.Tensor], prompt: Prompt) -> float:
    """Return the share of right tokens, by whichever accepted answer it is the largest."""
    accepted = _with_accepted([prompt])
    return max(_share_with(torch.tensor(p.answer, device="cpu"), predicted, p) for p in accepted)


def mean(values) -> float | None:
    """Return the mean, or None if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else None
