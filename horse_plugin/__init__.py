"""HORSE: thousands of facts changed in a language model at once, as an EasyEdit method.

Packages may import those above them in this list, and never those below::

    errors         HorseError, UsageError: messages for people
    progress       one line on a terminal for a whole job
    assets         default model, shipped facts, held-out text, shipped YAMLs
    data           edit records, and their prompts as tokens
    distributed    several processes that work as one
    method         the paper's equations on tensors: Sec. 2.3, Eq. 2, 4, 5, 6, losses of Eq. 7
    storage        files written whole, checksums, locks
    foreign        settings files of other methods
    hparams        one YAML for training and editing
    model          the language model in two halves, its edit modules, the capture of (H, ∇G)
    evaluation     metrics, rows of results, reports
    editing        edits, chains of edits, undoing, exporting
    training       Eq. 7: training the hypernetwork
    easyedit       HORSE inside EasyEdit
    comparison     methods side by side, the ablation, the demo, timings
    cli            the command ``horse``, also as ``python -m horse_plugin`` (``__main__``)
"""

import importlib
from typing import TYPE_CHECKING

from horse_plugin.easyedit import hook

if TYPE_CHECKING:
    from horse_plugin.assets import FACTS
    from horse_plugin.comparison.experiments import ablate, compare
    from horse_plugin.data.formats import load_records
    from horse_plugin.data.records import EditRecord, Query
    from horse_plugin.editing.chain import Chain
    from horse_plugin.editing.checked import checked_edit
    from horse_plugin.editing.delta import EditDelta
    from horse_plugin.editing.editor import HorseEditor
    from horse_plugin.errors import HorseError, UsageError
    from horse_plugin.evaluation.metrics import Evaluation, Evaluator
    from horse_plugin.hparams import HORSEHyperParams, default_hparams
    from horse_plugin.model.backbone import Backbone
    from horse_plugin.training.trainer import HORSETrainer

__all__ = [
    "FACTS",
    "Backbone",
    "Chain",
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
    "ablate",
    "checked_edit",
    "compare",
    "default_hparams",
    "load_records",
]

# Public name → the module that has it. A module is loaded when its name is first asked for: torch
# takes seconds to load, and the command line's help does without it.
_PLACES = {
    "FACTS": "assets",
    "Backbone": "model.backbone",
    "Chain": "editing.chain",
    "EditDelta": "editing.delta",
    "EditRecord": "data.records",
    "Evaluation": "evaluation.metrics",
    "Evaluator": "evaluation.metrics",
    "HORSEHyperParams": "hparams",
    "HORSETrainer": "training.trainer",
    "HorseEditor": "editing.editor",
    "HorseError": "errors",
    "Query": "data.records",
    "UsageError": "errors",
    "ablate": "comparison.experiments",
    "checked_edit": "editing.checked",
    "compare": "comparison.experiments",
    "default_hparams": "hparams",
    "load_records": "data.formats",
}


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hook.install()
