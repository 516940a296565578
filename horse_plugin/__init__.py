"""HORSE: thousands of facts changed in a language model at once, as an EasyEdit method."""

from . import easyedit_hook
from .delta import EditDelta
from .editor import HorseEditor
from .errors import HorseError, UsageError
from .hparams import HORSEHyperParams
from .metrics import Evaluation, Evaluator
from .records import EditRecord, Query, load_records
from .trainer import HORSETrainer

__all__ = [
    "EditDelta",
    "EditRecord",
    "Evaluation",
    "Evaluator",
    "HORSEHyperParams",
    "HORSETrainer",
    "HorseEditor",
    "HorseError",
    "Query",
    "UsageError",
    "load_records",
]

easyedit_hook.install()
