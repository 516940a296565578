"""From a plan to rows of ``results.json``: every cell measured once and kept at once."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from horse_plugin.comparison.methods import Method
from horse_plugin.comparison.task import Task
from horse_plugin.data.records import EditRecord, load_records
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation import results
from horse_plugin.evaluation.metrics import FIGURES, Evaluation, Evaluator
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage import archive
from horse_plugin.storage.digest import digest

RESULTS = "results.json"


@dataclass
class DataSet:
    """Records to edit, and what trained methods may train on and choose by."""

    name: str
    records: Sequence[EditRecord]
    train: Sequence[EditRecord] = ()
    val: Sequence[EditRecord] = ()

    @classmethod
    def load(cls, data, train=None, val=None) -> "DataSet":
        files = (load_records(source) if source else () for source in (data, train, val))
        return cls(Path(data).stem, *files)


@dataclass
class Plan:
    """methods × models × data sets × numbers of edits × seeds.

    Attributes:
        methods: name → runner; see :mod:`horse_plugin.comparison.methods`.
        models: name → YAML of HORSE, which says how to load it; the other methods' are
            ``<hparams_dir>/<method>/<name>.yaml``.
        corpus: text for second-moment statistics; none: the training records.
        check: on how many records EasyEdit's own metrics are computed as well.
    """

    methods: dict[str, Method]
    models: dict[str, Path]
    datasets: Sequence[DataSet]
    n_edits: Sequence[int]
    hparams_dir: Path
    out: Path
    seeds: Sequence[int] = (0,)
    corpus: str | None = None
    check: int = 0

    def __post_init__(self):
        for data in self.datasets:
            if max(self.n_edits) > len(data.records):
                raise UsageError(
                    f"{data.name}: {max(self.n_edits)} edits asked for, but it holds "
                    f"{len(data.records)} records."
                )

    def cells(self) -> list[tuple]:
        """(data set, number of edits, seed, method) of every cell, for each model."""
        return [
            (data, n, seed, name)
            for data in self.datasets
            for n in self.n_edits
            for i, seed in enumerate(self.seeds)
            for name, method in self.methods.items()
            if i == 0 or method.seeded
        ]


def run(plan: Plan, progress: bool = True) -> list[dict]:
    """Measure what ``results.json`` does not hold yet; returns all rows that the plan asks for.

    A row counts as held if it was measured with the same settings on the same records. A method
    that fails leaves a row with its ``reason`` and no figures, and is tried again next time.

    Raises:
        UsageError: the model cannot be loaded, or the folder not be written to.
        HorseError: a method left the model other than it was.
    """
    archive.check_writable(plan.out)
    if plan.check:
        from horse_plugin.comparison import check  # noqa: F401  without EasyEdit it fails here, not in every row
    rows, wanted = held(plan.out), []
    total = len(plan.models) * len(plan.cells())
    with tqdm(total=total, desc="compare", unit="cell", disable=not progress) as bar:
        for model in plan.models:
            bench = _Bench(plan, model)
            for data, n, seed, name in plan.cells():
                bar.set_postfix_str(f"{name}, {data.name}, {n} edits, seed {seed}")
                row = bench.measure(rows, data, n, seed, name)
                same = [r for r in rows if _cell(r) == _cell(row)]
                if row not in same:
                    rows = [r for r in rows if r not in same] + [row]
                    results.save(plan.out / RESULTS, rows)
                wanted.append(row)
                bar.update()
    return wanted


def held(out: Path) -> list[dict]:
    """All rows that ``results.json`` holds, of this run and of earlier ones."""
    path = out / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _cell(row: dict) -> tuple:
    return tuple(row[k] for k in ("method", "dataset", "model", "n_edits", "seed"))


class _Bench:
    """One model, loaded when the first cell needs it, on which cells are measured."""

    def __init__(self, plan: Plan, model: str):
        self.plan, self.model = plan, model
        self.hparams = HORSEHyperParams.from_hparams(plan.models[model])
        self.backbone = self.evaluator = self._measures = None

    def measure(self, rows, data: DataSet, n: int, seed: int, name: str) -> dict:
        """The row of one cell: a held one, or a new one."""
        method = self.plan.methods[name]
        hparams = dataclasses.replace(self.hparams, seed=seed)
        task = Task(
            self.model,
            data.name,
            self.backbone,
            hparams,
            data.records[:n],
            data.train,
            data.val,
            self.plan.hparams_dir,
            self.plan.out,
            seed,
            self.plan.corpus,
        )
        try:
            settings = _digest_of(method.settings(task), task.records)
        except UsageError as error:
            return self._failed(name, task, error)
        key = (name, data.name, hparams.model_name, n, seed)
        for row in rows:
            if _cell(row) == key and row.get("settings") == settings and not row.get("reason"):
                return row
        self._load(task)
        results.reset_peak_memory()
        try:
            with method(task) as edited:
                evaluation = self.evaluator.evaluate(edited.backbone)
                row = results.row(name, data.name, hparams, evaluation, edited.edit_seconds)
                if self.plan.check:
                    row["check"] = self._checked(task, edited.backbone, evaluation)
            row |= {"train_seconds": edited.train_seconds, "budget": edited.budget}
        except Exception as error:  # whatever a method of others raises: the row says so
            row = self._failed(name, task, error)
        if weights_digest(self.backbone) != self.digest:
            raise HorseError(f"{name}: the model's weights are not what they were before it ran.")
        return row | {"settings": settings}

    def _checked(self, task: Task, edited: Backbone, evaluation: Evaluation) -> dict:
        from horse_plugin.comparison.baselines import check

        return check.both(edited, task.hparams, task.records[: self.plan.check], evaluation)

    def _load(self, task: Task):
        """Have the model, and an evaluator of the task's records."""
        if self.backbone is None:
            self.backbone = Backbone.load(self.hparams)
            self.digest = weights_digest(self.backbone)
        task.backbone = self.backbone
        if self._measures != (task.dataset, len(task.records)):
            hp = self.hparams
            self.evaluator = Evaluator(self.backbone, task.records, hp.batch_tokens, hp.max_length)
            self._measures = task.dataset, len(task.records)

    def _failed(self, name: str, task: Task, error: Exception) -> dict:
        empty = Evaluation([dict.fromkeys(FIGURES)] * len(task.records))
        row = results.row(name, task.dataset, task.hparams, empty)
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        reason = line if isinstance(error, HorseError) else f"{type(error).__name__}: {line}"
        return row | {"train_seconds": None, "budget": None, "reason": reason}


def weights_digest(backbone: Backbone) -> str:
    """A digest of every parameter and buffer of the model, bit for bit."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in backbone.model.state_dict().items():
        found.update(name.encode())
        found.update(digest(tensor).encode())
    return found.hexdigest()


def _digest_of(settings: dict, records) -> str:
    described = [settings, [r.to_dict() for r in records]]
    return archive.text_digest(json.dumps(described, sort_keys=True))
