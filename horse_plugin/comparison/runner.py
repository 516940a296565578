"""From a plan to rows of ``results.json``: every cell is measured once and saved at once."""

import contextlib
import dataclasses
import gc
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from horse_plugin import distributed
from horse_plugin.comparison.plan import DataSet, Plan, repeated
from horse_plugin.comparison.tables import is_whole
from horse_plugin.comparison.task import Edited, Task
from horse_plugin.data.seam import PLAIN, Seam
from horse_plugin.errors import HorseError, UsageError, reason, visible
from horse_plugin.evaluation import results
from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
from horse_plugin.evaluation.metrics import ALL_FIGURES, FIGURES, Evaluation, Evaluator, mean
from horse_plugin.evaluation.probability import success_and_magnitude
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.sharding import local_part
from horse_plugin.storage.digest import json_digest, weight_digest
from horse_plugin.storage.schema import Maybe, count, read_json

RESULTS = "results.json"
NUMBER, TEXT = Maybe((int, float)), Maybe(str)
ROW = {"method": str, "dataset": str, "model": str, "n_edits": count, "seed": int}
ROW |= dict.fromkeys((*ALL_FIGURES, "edit_seconds", "train_seconds", "peak_memory_mb"), NUMBER)
ROW |= dict.fromkeys(("reason", "budget", "settings", "command"), TEXT)
ROW |= {"check": Maybe({"records": count, "ours": {str: NUMBER}, "easyedit": {str: NUMBER}})}
ROW |= {"probabilities": Maybe({str: NUMBER})}
ROW |= {"versions": Maybe({str: str}), "batch": Maybe(count)}
AFTER_BATCH = {"efficacy": [(int, float)], "drift": NUMBER, "perplexity": NUMBER}
ROW |= {"batches": Maybe([AFTER_BATCH])}
EXTRAS = ("check", "probabilities")  # what a run may ask for in addition


def run(plan: Plan, progress: bool = True) -> list[dict]:
    """Measure what ``results.json`` does not hold yet, and return all rows that the plan asks for.

    A row is held if it was measured with the same settings on the same records, and has the check
    and the probabilities that the plan asks for. A method that fails leaves a row with its
    ``reason`` and no figures, and is tried again next time. So does one that is stopped between
    batches, with what was measured after each of them; from then on a row that has less of the same
    does not take its place.

    Raises:
        UsageError: the model cannot be loaded, or cannot read a record that is to be edited.
        HorseError: a method left the model other than it was.
    """
    if plan.check:
        # Without EasyEdit it fails here, and not in every row.
        from horse_plugin.comparison.baselines import check  # noqa: F401
    models = [_MeasuredModel(plan, model) for model in plan.models]
    if name := repeated([model.hparams.model_name for model in models]):
        raise UsageError(f"models: two YAMLs name {name}, so that their rows would be one.")
    rows, wanted = held_rows(plan.out), []

    def keep(row: dict, is_done: bool = True):
        nonlocal rows
        seeded = plan.methods[row["method"]].seeded
        same = [r for r in rows if _cell(r, seeded) == _cell(row, seeded)]
        if row not in same and all(_replaces(row, r, is_done) for r in same):
            rows = [r for r in rows if r not in same] + [row]
            results.save(plan.out / RESULTS, rows)

    total = len(plan.models) * len(plan.cells())
    hidden = None if progress else True  # None: where nobody watches
    with tqdm(total=total, desc="compare", unit="cell", disable=hidden) as bar:
        for measured in models:
            for data, n, seed, name in plan.cells():
                cell = visible(f"{name}, {data.name}, {n} edits, seed {seed}")
                bar.set_postfix_str(cell)

                def after_batch(row: dict, cell=cell):
                    keep(row, is_done=False)
                    bar.set_postfix_str(f"{cell}, {row['reason']}")

                row = measured.measure(rows, data, n, seed, name, after_batch)
                keep(row)
                wanted.append(row)
                bar.update()
    return wanted


def held_rows(out: Path) -> list[dict]:
    """Return all rows that ``results.json`` holds, of this run and of earlier ones.

    Raises:
        HorseError: the file is damaged.
    """
    path = out / RESULTS
    return read_json(path, [ROW]) if path.exists() else []


def _cell(row: dict, seeded: bool) -> tuple:
    """Return what tells a row from others; without its seed if that changes nothing."""
    key = tuple(row[k] for k in ("method", "dataset", "model", "n_edits"))
    return *key, row.get("batch"), row["seed"] if seeded else None


def _replaces(row: dict, held: dict, is_done: bool) -> bool:
    """Return whether a row takes the place of a held one of the same cell.

    Args:
        is_done: whether the row is the last word on its cell, and not one between two batches.
    """
    if is_whole(row):
        return True
    # A failed row that knows no settings, as its YAML is missing, may have had the held row's.
    is_same = row.get("settings") in (None, held.get("settings"))
    if is_whole(held):
        return is_done and not is_same
    return not is_same or len(row.get("batches", ())) >= len(held.get("batches", ()))


class _Unkept(Exception):
    """What was measured after a batch could not be kept, which is no fault of the method."""


class _MeasuredModel:
    """One model on which cells are measured; it is loaded when the first cell needs it."""

    def __init__(self, plan: Plan, model: str):
        self.plan, self.model = plan, model
        self.hparams = HORSEHyperParams.from_hparams(plan.models[model])
        self.backbone = self.evaluator = self.text = self._evaluates = None

    def measure(
        self,
        rows: list[dict],
        data: DataSet,
        n: int,
        seed: int,
        name: str,
        after_batch: Callable[[dict], None],
    ) -> dict:
        """Return the row of one cell: a held one, or a new one.

        Args:
            after_batch: gets the row as it is after each batch of ``--sequential``.
        """
        method, hparams = self.plan.methods[name], dataclasses.replace(self.hparams, seed=seed)
        records = data.records[:n], data.train, data.val
        folders = self.plan.hparams_dir, self.plan.out
        given = *records, *folders, seed, self.plan.corpus, self.plan.batch
        task = Task(self.model, data.name, self.backbone, hparams, *given)
        try:
            about = [method.settings(task), [r.to_dict() for r in task.records]]
            about += [task.batch] if task.batch else []
            settings = json_digest(about)
        except UsageError as error:
            return self._failed(name, task, error)
        key = name, data.name, hparams.model_name, n, task.batch, seed if method.seeded else None
        of_cell = (r for r in rows if _cell(r, method.seeded) == key)
        same = (r for r in of_cell if r.get("settings") == settings)
        held = next(filter(is_whole, same), {})
        if held and self._has_extras(held):
            return held
        self._load(task)
        gc.collect()  # edited models of the last cell, which may be in circles
        results.reset_peak_memory()
        known = {"settings": settings, "command": self.plan.command}
        known |= {"batch": task.batch} if task.batch else {}

        batches = []

        def with_known(row: dict) -> dict:
            return row | known | ({"batches": list(batches)} if batches else {})

        def measured(batch: dict):
            batches.append(batch)
            done, n_batches = len(batches), len(task.batches)
            what = f"batch {done} of {n_batches}" if done < n_batches else "the last batch"
            try:
                stopped = self._failed(name, task, HorseError(f"stopped after {what}"))
                after_batch(with_known(stopped))
            except Exception as error:
                raise _Unkept from error

        try:
            with contextlib.closing(method(task)) as states:
                row = with_known(self._row(name, task, states, measured))
                row = {k: held[k] for k in EXTRAS if k in held} | row
        except _Unkept as error:
            raise error.__cause__ from None
        except Exception as error:  # whatever a method of others raises: the row says so
            if distributed.world_size() > 1 and not isinstance(error, HorseError):
                raise  # in this process alone, maybe: it no longer works as one with the others
            row = with_known(self._failed(name, task, error))
        if weights_digest(self.backbone) != self.digest:
            raise HorseError(f"{name}: the model's weights are not what they were before it ran.")
        return row

    def _has_extras(self, row: dict) -> bool:
        """Return whether a row has what the plan asks for beside the figures, if it can have it."""
        can_be_checked = Seam.of(self.hparams) == PLAIN
        wanted = min(self.plan.check, row["n_edits"]) if can_be_checked else 0
        is_checked = (row.get("check") or {}).get("records", 0) >= wanted
        return is_checked and not (self.plan.probabilities and row.get("probabilities") is None)

    def _row(
        self, name: str, task: Task, states: Iterator[Edited], measured: Callable[[dict], None]
    ) -> dict:
        """Measure the model after each batch that is edited, and all of it after the last.

        Args:
            measured: gets what is measured after each batch of ``--sequential``.
        """
        seconds = []
        for edited in states:
            seconds.append(edited.edit_seconds)
            if task.batch:
                measured(self._after_batch(task, edited.backbone, len(seconds)))
            if len(seconds) == len(task.batches):
                break  # the method holds the edited model until it is closed
        evaluation = self.evaluator.evaluate(edited.backbone)
        total = None if None in seconds else sum(seconds)
        row = results.row(name, task.dataset, task.hparams, evaluation, total)
        if self.plan.check:
            row["check"] = self._checked(task, edited.backbone, evaluation)
        if self.plan.probabilities:
            row["probabilities"] = {}  # if no record of these has what they compare
            with contextlib.suppress(UsageError):
                row["probabilities"] = success_and_magnitude(edited.backbone, task.records)
        return row | {"train_seconds": edited.train_seconds, "budget": edited.budget}

    def _after_batch(self, task: Task, edited: Backbone, n_batches: int) -> dict:
        """Return what is left of each batch so far, in percent, and what ordinary text paid."""
        sizes = [len(records) for records in task.batches[:n_batches]]
        held = iter(self.evaluator.efficacies(sum(sizes), edited))
        efficacy = [100 * mean(itertools.islice(held, size)) for size in sizes]
        with edited.held():
            cost = self.text.measure(edited)
        return {"efficacy": efficacy} | cost.summary()

    def _checked(self, task: Task, edited: Backbone, evaluation: Evaluation) -> dict:
        from horse_plugin.comparison.baselines import check

        return check.both(edited, task.hparams, task.records[: self.plan.check], evaluation)

    def _load(self, task: Task):
        """Load the model, and make an evaluator of the task's records, if need be."""
        if self.backbone is None:
            self.backbone = Backbone.load(self.hparams)
            self.digest = weights_digest(self.backbone)
            self._check_records()
            self.text = OrdinaryText(self.backbone, heldout_pieces())
        task.backbone = self.backbone
        if self._evaluates != (task.dataset, len(task.records)):
            self.evaluator = Evaluator(self.backbone, task.records, text=self.text, writing=True)
            self._evaluates = task.dataset, len(task.records)

    def _check_records(self):
        """Refuse records that the model cannot read now, and not after hours of other cells."""
        for data in self.plan.datasets:
            records = data.records[: max(self.plan.n_edits)]
            try:
                self.backbone.prepare(records, warn=False).check()
            except UsageError as error:
                raise UsageError(f"{data.name}: {error}") from None

    def _failed(self, name: str, task: Task, error: Exception) -> dict:
        empty = Evaluation([dict.fromkeys(FIGURES)] * len(task.records))
        row = results.row(name, task.dataset, task.hparams, empty)
        return row | {"train_seconds": None, "budget": None, "reason": reason(error)}


def weights_digest(backbone: Backbone) -> str:
    """Return a digest of what this process has of all parameters and buffers, bit for bit."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in backbone.model.state_dict().items():
        found.update(name.encode())
        found.update(weight_digest(local_part(tensor)).encode())
    return found.hexdigest()
