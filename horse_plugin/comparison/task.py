"""What a method of the comparison is given, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horse_plugin.data.records import EditRecord
from horse_plugin.errors import UsageError
from horse_plugin.hparams import HORSEHyperParams, read_keys
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.digest import json_digest


@dataclass
class Task:
    """What every method gets: the same model, records, training records and seed.

    Attributes:
        model: the stem of the model's YAMLs, ``<hparams_dir>/<method>/<model>.yaml``.
        dataset: the name of the data set.
        backbone: the model, unedited; a method that edits it puts it back.
        hparams: the settings that the model was loaded with.
        records: the records to edit.
        train, val: records that trained methods may train on and choose by; may be empty.
        hparams_dir: the folder of the YAMLs.
        folder: the folder for archives, statistics and logs.
        corpus: text for the second moments of the baselines; by default the shipped text that HORSE
            preserves.
        batch: how many records are edited at once, one batch after the other; None is all.
    """

    model: str
    dataset: str
    backbone: Backbone
    hparams: HORSEHyperParams
    records: Sequence[EditRecord]
    train: Sequence[EditRecord]
    val: Sequence[EditRecord]
    hparams_dir: Path
    folder: Path
    seed: int = 0
    corpus: str = "shipped"
    batch: int | None = None

    @property
    def batches(self) -> list[Sequence[EditRecord]]:
        """The records, batch by batch."""
        size = self.batch or len(self.records)
        return [self.records[i : i + size] for i in range(0, len(self.records), size)]

    def yaml(self, method: str) -> Path:
        """Return the path of a method's YAML for this model.

        Raises:
            UsageError: there is none.
        """
        path = self.hparams_dir / method / f"{self.model}.yaml"
        if not path.is_file():
            raise UsageError(f"{path}: no such hparams file, so {method} cannot run.")
        return path

    def keys(self, method: str) -> dict:
        """Return the keys of a method's YAML.

        Raises:
            UsageError: there is none, or it cannot be read.
        """
        return read_keys(self.yaml(method))


@dataclass
class Edited:
    """An edited model, how long edit and training took, and what the method trained on.

    The seconds of an edit are those of its batch alone.
    """

    backbone: Backbone
    edit_seconds: float | None = None
    train_seconds: float | None = None
    budget: str | None = None


def records_digest(records: Sequence[EditRecord]) -> str:
    """Return a digest of the records."""
    return json_digest([r.to_dict() for r in records])
