"""What a method of the comparison is given, and what it gives back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from horse_plugin.data.records import EditRecord
from horse_plugin.errors import UsageError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage import archive


@dataclass
class Task:
    """What every method gets: the same model, records, training records and seed.

    Attributes:
        model: stem of the model's YAMLs, ``<hparams_dir>/<method>/<model>.yaml``.
        backbone: the model, unedited; whoever edits it puts it back.
        hparams: those that the model was loaded with.
        records: to edit, all at once.
        train, val: records that trained methods may train on and choose by; may be empty.
        corpus: text for second-moment statistics; none: the training records.
        folder: for archives, statistics and logs.
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
    corpus: str | None = None

    def yaml(self, method: str) -> Path:
        """The YAML of a method for this model.

        Raises:
            UsageError: there is none.
        """
        path = self.hparams_dir / method / f"{self.model}.yaml"
        if not path.is_file():
            raise UsageError(f"{path}: no such hparams file, so {method} cannot run.")
        return path

    def keys(self, method: str) -> dict:
        """What the YAML of a method says; its comments may change.

        Raises:
            UsageError: there is none, or it cannot be read.
        """
        path = self.yaml(method)
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{path}: not a readable YAML file ({error}).") from None


@dataclass
class Edited:
    """An edited model and what the edit took; ``budget`` says what the method trained on."""

    backbone: Backbone
    edit_seconds: float | None = None
    train_seconds: float | None = None
    budget: str | None = None


def texts_digest(records: Sequence[EditRecord]) -> str:
    """A digest of the records."""
    return archive.text_digest(json.dumps([r.to_dict() for r in records], sort_keys=True))
