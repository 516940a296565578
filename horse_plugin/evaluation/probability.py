"""CounterFact's success and magnitude: the new answer's probability against the true one's.

The probability of an answer is the geometric mean of those of its tokens, as in ROME's and MEMIT's
evaluation, so that a longer answer is not less likely for its length alone. Success is the share of
prompts where the answer that should be likelier is, and magnitude the mean difference of the two
probabilities. On edit prompts and rephrasings the new answer should be likelier, and on unrelated
prompts their own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from horse_plugin.data.prompts import Prompt
from horse_plugin.data.records import EditRecord, Query
from horse_plugin.errors import UsageError
from horse_plugin.evaluation.metrics import mean
from horse_plugin.evaluation.tables import Table, number
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded

KINDS = ("efficacy", "generalization", "specificity")


@guarded
@torch.no_grad()
def answer_probabilities(backbone: Backbone, prompts: Sequence[Prompt]) -> list[float]:
    """Return the geometric mean of the probabilities of each prompt's answer tokens."""
    found = [None] * len(prompts)
    with backbone.lockstep.loop():
        for batch in backbone.batches(prompts, "evaluate"):
            logits = backbone.logits(batch).to(backbone.edit_dtype).log_softmax(-1)
            logprobs = logits.gather(1, batch.labels.to(logits.device)[:, None])[:, 0]
            of_prompts = logprobs.split([len(p.answer) for p in batch.prompts])
            for i, of_answer in zip(batch.index, of_prompts, strict=True):
                found[i] = of_answer.mean()
    return torch.stack(found).exp().tolist()


def comparisons(records: Sequence[EditRecord]) -> list[list[tuple[str, Query, Query]]]:
    """Return what is compared for each record: kind, the likelier answer, and the other one.

    Raises:
        UsageError: there is nothing to compare.
    """
    found = []
    for r in records:
        texts = [("efficacy", r.prompt), *(("generalization", text) for text in r.rephrases)]
        texts = texts if r.ground_truth else []
        found.append(
            [(kind, Query(t, r.target_new), Query(t, r.ground_truth)) for kind, t in texts]
            + [
                ("specificity", Query(q.prompt, q.answer), Query(q.prompt, r.target_new))
                for q in r.unrelated
            ]
        )
    if not any(found):
        raise UsageError("probabilities: no record has its true answer, or an unrelated prompt.")
    return found


def success_and_magnitude(backbone: Backbone, records: Sequence[EditRecord]) -> dict[str, float]:
    """Return ``<kind>_success`` and ``<kind>_magnitude`` in percent, the mean over the records.

    The true answer of edit prompts and rephrasings is the record's ``ground_truth``; without one,
    the record counts for unrelated prompts only.

    Raises:
        UsageError: a prompt cannot be tokenised, or nothing can be compared.
    """
    compared = comparisons(records)
    pairs = [
        replace(r, unrelated=tuple(query for _, *pair in of_record for query in pair))
        for r, of_record in zip(records, compared, strict=True)
    ]
    edits = backbone.prepare(pairs, ["unrelated"], warn=False)
    edits.check()
    probabilities = iter(answer_probabilities(backbone, edits.flat()))
    differences = {}  # kind → record → of each of its prompts
    for i, of_record in enumerate(compared):
        for kind, *_ in of_record:
            difference = next(probabilities) - next(probabilities)
            differences.setdefault(kind, {}).setdefault(i, []).append(difference)
    found = {}
    for kind, of_records in differences.items():
        of_records = of_records.values()
        found[f"{kind}_success"] = 100 * mean(mean(d > 0 for d in of) for of in of_records)
        found[f"{kind}_magnitude"] = 100 * mean(map(mean, of_records))
    return found


def table(found: dict[str, float]) -> Table:
    """Return the figures as a table, one row a kind of prompt."""
    lines = [
        [kind, number(found[f"{kind}_success"]), number(found[f"{kind}_magnitude"])]
        for kind in KINDS
        if f"{kind}_success" in found
    ]
    caption = "Probability of the answer against the other one, percent"
    return Table(["", "success", "magnitude"], lines, caption)
