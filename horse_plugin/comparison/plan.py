"""What a comparison measures: methods × models × data sets × numbers of edits × seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horse_plugin.comparison.methods import Method
from horse_plugin.data.formats import load_records
from horse_plugin.data.records import EditRecord
from horse_plugin.errors import UsageError, counted, visible


@dataclass
class DataSet:
    """Records to edit, and records that trained methods may train on and choose by."""

    name: str
    records: Sequence[EditRecord]
    train: Sequence[EditRecord] = ()
    val: Sequence[EditRecord] = ()

    @classmethod
    def load(cls, data, train=None, val=None, name: str | None = None) -> "DataSet":
        """Return the data set of files, or of anything that ``load_records`` takes.

        Args:
            name: what the tables call it; None is the name of the file ``data``.

        Raises:
            UsageError: ``data`` is no file, and there is no name.
        """
        if name is None:
            if not isinstance(data, (str, Path)):
                raise UsageError("name: records that are no file need one for the tables.")
            name = visible(Path(data).stem)
        sources = (data, train, val)
        return cls(name, *(load_records(source) if source else () for source in sources))


@dataclass
class Plan:
    """methods × models × data sets × numbers of edits × seeds.

    Attributes:
        methods: name → runner, see :mod:`horse_plugin.comparison.methods`.
        models: name → HORSE's YAML, which says how to load the model; the other methods' are
            ``<hparams_dir>/<method>/<name>.yaml``.
        corpus: text for the second moments of the baselines; by default the shipped text that HORSE
            preserves.
        check: on how many records EasyEdit's own metrics are computed as well.
        batch: how many records are edited at once, one batch after the other; None is all.
        probabilities: whether CounterFact's success and magnitude are measured, too.
        command: the command line that asks for it, if one does.
    """

    methods: dict[str, Method]
    models: dict[str, Path]
    datasets: Sequence[DataSet]
    n_edits: Sequence[int]
    hparams_dir: Path
    out: Path
    seeds: Sequence[int] = (0,)
    corpus: str = "shipped"
    check: int = 0
    batch: int | None = None
    command: str | None = None
    probabilities: bool = False

    def __post_init__(self):
        for what in ("n_edits", "seeds"):
            if not getattr(self, what):
                raise UsageError(f"{what}: there is none to measure.")
        if name := repeated([data.name for data in self.datasets]):
            raise UsageError(
                f"{name}: two data sets have this name, by which rows are told apart. Rename one "
                "of the files."
            )
        for data in self.datasets:
            if max(self.n_edits) > len(data.records):
                raise UsageError(
                    f"{data.name}: {max(self.n_edits)} edits asked for, but it holds "
                    f"{counted(len(data.records), 'record')}."
                )

    def cells(self) -> list[tuple]:
        """Return (data set, number of edits, seed, method) of every cell of one model."""
        return [
            (data, n, seed, name)
            for data in self.datasets
            for n in self.n_edits
            for i, seed in enumerate(self.seeds)
            for name, method in self.methods.items()
            if i == 0 or method.seeded
        ]


def repeated(names: Sequence[str]) -> str | None:
    """Return the first name that is there more than once, or None."""
    return next((name for name in names if names.count(name) > 1), None)
