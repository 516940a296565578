"""Efficacy, generalization, specificity, locality and portability, in batches.

All are teacher-forced token accuracies, one per record, in percent when averaged: the share of
answer tokens that the model predicts when it reads the prompt and the answer before them. They
equal what EasyEdit computes one record at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F

from horse_plugin import distributed as parallel
from horse_plugin.data.prompts import Prompt
from horse_plugin.data.records import EditRecord, Query
from horse_plugin.errors import UsageError
from horse_plugin.model.backbone import Backbone


@torch.no_grad()
def predict(
    backbone: Backbone, queries: Sequence[Query], batch_tokens: int, max_length: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(predicted tokens, answer tokens) of each query, teacher-forced, on the CPU."""
    prompts = backbone.tokenize(queries, max_length)
    shares = parallel.shares(prompts)
    own = shares[parallel.rank()]
    found = [None] * len(own)
    with parallel.together():
        for batch in backbone.batches([prompts[i] for i in own], batch_tokens, "evaluate"):
            parts = backbone.logits(batch).argmax(-1).split([len(p.answer) for p in batch.prompts])
            for i, part in zip(batch.index, parts, strict=True):
                found[i] = part
        found = torch.cat(found or [torch.empty(0, dtype=torch.long)]).cpu()
    order = list(chain(*shares))
    parts = parallel.gather(found).split([len(prompts[i].answer) for i in order])
    predicted = dict(zip(order, parts, strict=True))
    return [(predicted[i], torch.tensor(p.answer)) for i, p in enumerate(prompts)]


@torch.no_grad()
def perplexity(backbone: Backbone, text: str, batch_tokens: int = 4096) -> float:
    """exp of the mean cross-entropy per token of a text, read in pieces of up to 256 tokens.

    Raises:
        UsageError: a text of less than two tokens.
    """
    ids = backbone.tokenizer(text)["input_ids"]
    size = min(256, backbone.limit() or 256)
    pieces = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    prompts = [Prompt(piece, 1) for piece in pieces if len(piece) > 1]
    if not prompts:
        raise UsageError("held-out text: less than two tokens; give a longer one.")
    losses = [
        F.cross_entropy(
            backbone.logits(b).to(backbone.edit_dtype).cpu(), b.labels.cpu(), reduction="none"
        )
        for b in backbone.batches(prompts, batch_tokens, "perplexity")
    ]
    return torch.cat(losses).mean().exp().item()


@dataclass
class Evaluation:
    """Figures of one model on a list of records.

    Attributes:
        records: a dict per record with its efficacy, generalization, specificity, locality and
            portability as shares (0 to 1), or None where the record has no such prompt.
    """

    records: list[dict[str, float | None]]

    def mean(self, name: str) -> float | None:
        """Mean over the records that have the figure, in percent."""
        values = [r[name] for r in self.records if r[name] is not None]
        return 100 * sum(values) / len(values) if values else None

    def summary(self) -> dict[str, float | None]:
        return {name: self.mean(name) for name in FIGURES}

    def score(self) -> float:
        """One number to choose by: the mean of efficacy, generalization and specificity."""
        means = [self.mean(n) for n in ("efficacy", "generalization", "specificity")]
        means = [m for m in means if m is not None]
        return sum(means) / len(means)


FIGURES = ("efficacy", "generalization", "specificity", "locality", "portability")


class Evaluator:
    """Measures an edit on its records. Make it before the edit: locality compares with the model
    as it is then.

    Args:
        backbone: the model, unedited.
        records: what will be edited, or any records to measure on.
        batch_tokens, max_length: as in the hparams.
    """

    def __init__(self, backbone, records: Sequence[EditRecord], batch_tokens=4096, max_length=None):
        self.backbone, self.records = backbone, list(records)
        self._limits = batch_tokens, max_length
        kinds = [self._queries(kind) for kind in ("edit", "equivalent", "unrelated", "portability")]
        queries = [q for groups in kinds for group in groups for q in group]
        backbone.keep(backbone.tokenize(queries, max_length), batch_tokens)
        self._before = self._predict("unrelated")

    def _queries(self, kind: str) -> list[tuple[Query, ...]]:
        return [(r.edit,) if kind == "edit" else getattr(r, kind) for r in self.records]

    def _predict(self, kind: str, backbone: Backbone | None = None) -> list[list]:
        """Predictions on one kind of prompt, grouped by record."""
        groups = self._queries(kind)
        flat = iter(
            predict(backbone or self.backbone, [q for g in groups for q in g], *self._limits)
        )
        return [[next(flat) for _ in g] for g in groups]

    def evaluate(self, backbone: Backbone | None = None) -> Evaluation:
        """Measure the model as it is now, or an edited copy of it."""
        shares = {
            name: [
                mean(_share(p, answer) for p, answer in record)
                for record in self._predict(kind, backbone)
            ]
            for name, kind in (
                ("efficacy", "edit"),
                ("generalization", "equivalent"),
                ("portability", "portability"),
            )
        }
        now = self._predict("unrelated", backbone)
        shares["specificity"] = [mean(_share(p, answer) for p, answer in r) for r in now]
        shares["locality"] = [
            mean(_share(p, q) for (p, _), (q, _) in zip(after, before, strict=True))
            for after, before in zip(now, self._before, strict=True)
        ]
        return Evaluation(
            [{name: shares[name][i] for name in FIGURES} for i in range(len(self.records))]
        )


def _share(predicted: torch.Tensor, wanted: torch.Tensor) -> float:
    return (predicted == wanted).double().mean().item()


def mean(values) -> float | None:
    """The mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None
