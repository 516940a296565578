"""EasyEdit's own figures of an edited model, one prompt at a time, beside ours."""

import warnings
from collections.abc import Sequence
from copy import deepcopy

from horse_plugin.data.records import EditRecord
from horse_plugin.data.seam import PLAIN
from horse_plugin.easyedit.patches import ReadDevice, compute_rewrite_or_rephrase_quality
from horse_plugin.evaluation.metrics import Evaluation, mean
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import pad_with_eos

QUERIES = {"efficacy": "edit", "generalization": "equivalent", "specificity": "unrelated"}


def easyedit_figures(backbone: Backbone, hparams: HORSEHyperParams, records: Sequence[EditRecord]):
    """Return the records' figures as EasyEdit computes them."""
    tokenizer = pad_with_eos(deepcopy(backbone.tokenizer))
    device = str(backbone.device)

    def share(query) -> float:
        asked = hparams, tokenizer, query.prompt, query.answer, device
        with ReadDevice(f"cuda:{device}", backbone.device):  # what the EasyEdit on PyPI writes
            found = compute_rewrite_or_rephrase_quality(backbone.model, "", *asked)
        return float(found["rewrite_acc"][0])

    def figure(record, kind: str) -> float | None:
        queries = (record.edit,) if kind == "edit" else getattr(record, kind)
        return mean(share(q) for q in queries)

    return Evaluation([{name: figure(r, kind) for name, kind in QUERIES.items()} for r in records])


def both(backbone, hparams, records, ours: Evaluation) -> dict | None:
    """Return means over the first records, EasyEdit's and ours, in percent, for a row.

    EasyEdit puts a space between any prompt and its answer, and nothing after it. Where the model
    is asked otherwise it measures other tokens; then a warning says so, and None is returned.
    """
    if backbone.seam != PLAIN:
        warnings.warn(
            "--check: EasyEdit measures plain prompts only, so that its figures are left out where "
            "the model's YAML has chat_template, separator or append_eos.",
            stacklevel=2,
        )
        return None
    theirs = easyedit_figures(backbone, hparams, records)
    ours = Evaluation(ours.records[: len(records)])
    found = {"easyedit": theirs, "ours": ours}
    means = {name: {n: e.mean(n) for n in QUERIES} for name, e in found.items()}
    return {"records": len(records), **means}
