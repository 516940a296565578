"""The whole way on real facts and a real model: train, edit 200 facts, measure, report."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from horse_plugin.assets import FACTS
from horse_plugin.data.records import EditRecord, load_records
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.evaluation import results
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.evaluation.report import write_report
from horse_plugin.hparams import HORSEHyperParams, default_hparams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import quiet_transformers
from horse_plugin.storage import archive
from horse_plugin.training.trainer import HORSETrainer

N_EDITS = 200


@dataclass
class Outcome:
    """What the demo found: rows of ``results.json``, and (prompt, before, after, target) texts."""

    rows: list[dict]
    examples: list[tuple[str, str, str, str]]


def run(out, hparams: HORSEHyperParams | None = None, n_edits: int = N_EDITS) -> Outcome:
    """Train on the embedded facts, edit ``n_edits`` others at once, write everything to ``out``.

    Leaves ``archive/``, ``edit/``, ``results.json`` and ``report.html`` in the folder.
    """
    out = Path(out)
    hparams = replace(hparams or default_hparams(), archive=None)
    archive.check_writable(out)
    backbone = Backbone.load(hparams)
    records = load_records(FACTS / "edit.json", n_edits)
    evaluator = Evaluator(backbone, records, hparams.batch_tokens, hparams.max_length)
    shown = _examples(records)
    rows = [results.row("unedited", "facts", hparams, evaluator.evaluate())]
    before = _continuations(backbone, shown)

    def measured(name: str, editor: HorseEditor):
        delta = editor.edit(records)
        evaluation = evaluator.evaluate()
        rows.append(results.row(name, "facts", hparams, evaluation, delta.about["seconds"]))
        return delta

    editor = HorseEditor.from_backbone(backbone, hparams)
    measured("HORSE, untrained", editor)
    editor.undo()

    trainer = HORSETrainer(
        hparams, FACTS / "train.json", FACTS / "val.json", out=out / "archive", backbone=backbone
    )
    hparams = replace(hparams, archive=str(trainer.run()))
    editor = HorseEditor.from_backbone(backbone, hparams)
    delta = measured("HORSE, trained", editor)
    shutil.rmtree(out / "edit", ignore_errors=True)  # of an earlier demo
    delta.save(out / "edit")
    after = _continuations(backbone, shown)

    examples = [
        (r.prompt, b, a, r.target_new) for r, b, a in zip(shown, before, after, strict=True)
    ]
    results.save(out / "results.json", rows)
    write_report(out / "report.html", rows, trainer.history, examples)
    return Outcome(rows, examples)


def _examples(records: list[EditRecord], n: int = 10) -> list[EditRecord]:
    """Ten records spread over the edit."""
    step = max(1, len(records) // n)
    return records[::step][:n]


@torch.no_grad()
def _continuations(backbone: Backbone, records: list[EditRecord], n_tokens: int = 8) -> list[str]:
    """What the model itself writes after each prompt, greedily."""
    texts = []
    tokenizer = backbone.tokenizer
    for record in records:
        inputs = tokenizer(record.prompt, return_tensors="pt").to(backbone.device)
        with quiet_transformers():
            ids = backbone.model.generate(
                **inputs,
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(" ".join(tokenizer.decode(new, skip_special_tokens=True).split()))
    return texts
