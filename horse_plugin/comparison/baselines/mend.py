"""MEND's network, trained by EasyEdit's ``EditTrainer`` on what HORSE is trained on.

The budget is HORSE's: the same records, as many steps, and as many records in a step, or about the
mean of them where HORSE's steps differ. EasyEdit adds up the gradients of ``accumulate_bs`` batches
of ``batch_size`` records before it steps; the latter is the YAML's, or the next smaller one that
divides a step's records, and the former fits it.
"""

import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import torch

from horse_plugin.comparison.task import Task, records_digest
from horse_plugin.data.records import EditRecord
from horse_plugin.easyedit.patches import EditTrainer, hparams_class
from horse_plugin.errors import UsageError, counted
from horse_plugin.model.loading import copy_of, pad_with_eos
from horse_plugin.storage.digest import text_digest
from horse_plugin.storage.files import write
from horse_plugin.storage.schema import read_json
from horse_plugin.training.schedule import Schedule

VAL_RECORDS = 20


class Facts(torch.utils.data.Dataset):
    """Records in the batches that ``EditTrainer`` takes.

    Its own data sets read two layouts of files only, and a tokenizer from a folder.
    """

    def __init__(self, records: Sequence[EditRecord], tokenizer, max_length: int, device):
        self.records, self.tokenizer = records, tokenizer
        self.max_length, self.device = max_length, device

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> EditRecord:
        return self.records[i]

    def collate_gpt_fn(self, batch: list[EditRecord]) -> dict:
        unrelated = [random.choice(r.unrelated) for r in batch]
        loc = self._tokenized([(q.prompt, q.answer) for q in unrelated])
        # On these, as many as the longest answer has tokens, the predictions should stay.
        loc["decoder_attention_mask"] = (loc["labels"] != -100).long()
        inner = self._tokenized([(r.prompt, r.target_new) for r in batch])
        cond = {name: inner[name] for name in ("input_ids", "attention_mask")}  # MEND reads none
        return {"edit_inner": inner, "cond": cond, "loc": loc}

    def _tokenized(self, pairs: list[tuple[str, str]]) -> dict:
        """Return tokens padded left, and labels as wide as the longest answer, as MEND edits."""
        answers = [" " + answer.lstrip() for _, answer in pairs]
        texts = [prompt + answer for (prompt, _), answer in zip(pairs, answers, strict=True)]
        options = {"padding": True, "truncation": True, "max_length": self.max_length}
        inputs = self.tokenizer(texts, return_tensors="pt", **options)
        labels = self.tokenizer(answers, return_tensors="pt", **options)
        made = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
        }
        return {name: tensor.to(self.device) for name, tensor in made.items()}


def trained(hparams, task: Task, within) -> dict:
    """Let the hparams name an archive: the YAML's, or one that is trained once.

    Args:
        hparams: EasyEdit's for MEND; ``archive`` is set.
        within: makes the context that EasyEdit's code runs in.

    Returns:
        What training took, as :class:`~.methods.Edited` has it.

    Raises:
        UsageError: the YAML names an archive that is not there; no records to train on.
    """
    if hparams.archive:
        if not Path(hparams.archive).is_file():
            raise UsageError(f"archive: {hparams.archive}: no such file.")
        return {"budget": "before, by EasyEdit's EditTrainer"}
    records = [r for r in task.train if r.unrelated]
    val = [r for r in task.val if r.unrelated][:VAL_RECORDS]
    if not records or not val:
        raise UsageError("MEND is trained: give training and validation records, with unrelated.")
    sizes = [step.size for step in Schedule(task.hparams, len(task.train)).steps]
    steps, n, size = len(sizes), task.hparams.edits_per_step, hparams.batch_size
    if task.hparams.min_edits_per_step:  # about the mean, in whole batches
        n = size * max(1, round(sum(sizes) / steps / size))
    hparams.batch_size = next(k for k in range(size, 0, -1) if n % k == 0)
    about = [vars(hparams), records_digest(records), n, steps, task.seed, task.model]
    about = text_digest(json.dumps(about, sort_keys=True, default=str))
    folder = task.folder / "archives" / f"MEND-{about}"
    done = folder / "trained.json"
    if not done.is_file():
        start = time.perf_counter()
        with within():
            random.seed(task.seed)
            file = _train(hparams, task, records, val, steps, n, folder)
        found = {
            "archive": file,
            "train_seconds": time.perf_counter() - start,
            "budget": f"{counted(steps, 'step')} of {counted(n, 'record')} from {len(records):,}",
        }
        write(done, json.dumps(found))
    found = read_json(done, {"archive": str, "train_seconds": (int, float), "budget": str})
    hparams.archive = found.pop("archive")
    return found


def _train(hparams, task: Task, records, val, steps: int, n: int, folder: Path) -> str:
    cls = hparams_class("MENDTrainingHparams")
    known = {f.name for f in fields(cls)}
    config = cls(**{k: v for k, v in vars(hparams).items() if k in known} | {"alg": "MEND"})
    config.alg_name = "MEND"
    config.results_dir = str(folder)
    config.archive, config.eval_only, config.debug, config.final_eval = None, False, False, False
    size = config.batch_size
    batches = n // size
    # EasyEdit stops before it trains on the last batch, and saves when it validates.
    config.accumulate_bs, config.val_interval = batches, steps * batches
    config.max_iters, config.max_epochs = steps * batches + 1, None
    config.val_steps = len(val)
    drawn, wanted = [], config.max_iters * size
    while len(drawn) < wanted:
        drawn += random.sample(records, len(records))
    tokenizer = pad_with_eos(deepcopy(task.backbone.tokenizer))
    model = copy_of(task.backbone.model).float().requires_grad_(True)
    sets = [
        Facts(r, tokenizer, task.hparams.max_length, task.backbone.device)
        for r in (drawn[:wanted], val)
    ]
    config.val_batch_size = min(size, len(val))
    # EasyEdit would load the model by its name; every method starts from the same weights.
    base = sys.modules[EditTrainer.__mro__[1].__module__]
    with _replaced(base, "get_model", lambda config: model):
        trainer = EditTrainer(config, *sets)
        # EasyEdit's would step the learning rates of the edit, too, and by the network's rate.
        trainer.opt = trainer.OptimizerClass(trainer.model.mend.parameters(), lr=config.lr)
        trainer.save_state = lambda stats: _save(trainer)
        trainer.run()
    return str(trainer.save_path)


@contextlib.contextmanager
def _replaced(module, name: str, value):
    """Replace a name of a module inside a ``with``."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _save(trainer):
    """Write the part of EasyEdit's archive that it reads again, without the objects in it.

    Only code could bring these out of a pickle. EasyEdit wants the model's config in its place, but
    uses it for a message only.
    """
    state = trainer.model.state_dict() | {"model_config": None}
    torch.save({"model": state, "step": trainer.global_iter}, trainer.save_path)
