"""Register HORSE in EasyEdit's tables and classes; importing this module does so.

Nothing of EasyEdit is copied or changed on disk. Beside the entries in its tables, two of its
classes learn about our hparams; whatever comes with other hparams runs as before:

- ``BaseEditor`` gets the model that our hparams name as our engine loads it, whatever its
  architecture, and runs on the device that they mean. Its sequential edits are the history of one
  :class:`HorseEditor`, its attribute ``horse``. (The EasyEdit on PyPI writes ``cuda:`` before
  whatever ``device`` holds, and lacks some arguments of today's, such as ``sequential_edit``.)
- ``EditTrainer(config, train_set, val_set)`` makes a :class:`~horse_plugin.HORSETrainer`.
"""

import contextlib
import functools
import inspect
import warnings
from pathlib import Path

import torch
import yaml
from torch.overrides import TorchFunctionMode

from horse_plugin.easyedit import apply
from horse_plugin.errors import UsageError
from horse_plugin.hparams import METHODS, HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import pad_with_eos, resolve_device
from horse_plugin.training.trainer import HORSETrainer

try:
    import easyeditor
    from easyeditor import BaseEditor, EditTrainer
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.evaluate.evaluate import compute_rewrite_or_rephrase_quality  # noqa: F401
    from easyeditor.util.alg_dict import ALG_DICT
    from easyeditor.util.alg_train_dict import ALG_TRAIN_DICT
except ImportError as error:
    raise UsageError(
        f"EasyEdit could not be imported ({error}): install it with `pip install --no-deps "
        "easyeditor`, or set EASYEDIT_HOME to a checkout of its main branch."
    ) from error


def hparams_class(name: str) -> type | None:
    """Return EasyEdit's class of hparams of that name, or None if this EasyEdit lacks it."""
    return getattr(easyeditor, name, None)


def read_yaml(path) -> dict:
    """Return the keys of a YAML as EasyEdit reads it: ``1e-5`` is a number."""
    from easyeditor.util.hparams import HyperParams

    keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return HyperParams.construct_float_from_scientific_notation(keys)


class ReadDevice(TorchFunctionMode):
    """Inside a ``with``, torch reads the device name ``written`` as the device ``meant``."""

    def __init__(self, written: str, meant: torch.device):
        super().__init__()
        self.written, self.meant = written, meant

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: self._read(value) for name, value in (kwargs or {}).items()}
        return function(*map(self._read, args), **kwargs)

    def _read(self, value):
        named = isinstance(value, (str, torch.device)) and str(value) == self.written
        return self.meant if named else value


def device_of(hparams: HORSEHyperParams) -> ReadDevice:
    """Have ``cuda:{hparams.device}``, as EasyEdit 0.0.1 writes, mean the device of our hparams."""
    return ReadDevice(f"cuda:{hparams.device}", resolve_device(hparams.device))


def _with_our_model(init):
    """Return ``BaseEditor.__init__``, but with our hparams' model as :class:`Backbone` loads it.

    EasyEdit chooses classes by what the name contains, knows some names only, and its class for
    Llama tokenizers no longer reads the files of most. A loaded model and tokenizer it takes.
    """

    @functools.wraps(init)
    def with_our_model(editor, hparams):
        if not isinstance(hparams, HORSEHyperParams):
            return init(editor, hparams)
        backbone, name = Backbone.load(hparams), hparams.model_name
        tok = pad_with_eos(backbone.tokenizer)
        hparams.model_name = (backbone.model, tok)
        try:
            with device_of(hparams):
                init(editor, hparams)
        finally:
            editor.model_name = hparams.model_name = name
        editor.horse = None

    return with_our_model


# Arguments of today's ``batch_edit``, and their names in EasyEdit 0.0.1.
OLD_NAMES = {"locality_inputs": "locality_prompts", "portability_inputs": "locality_ground_truth"}


# Methods that edit one request after another, and refuse any ``batch_size`` but 1.
ONE_BY_ONE = ("edit", "edit_requests", "generate_edit")
RETURN_A_MODEL = ("edit", "edit_requests", "batch_edit")
TAKEN_BACK = (
    "EasyEdit takes edits back once it has measured them, so that the model that it returns is "
    "unedited. Pass sequential_edit=True to keep them."
)
PRE_IS_LATE = (
    "This EasyEdit measures `pre` once it has taken an edit back. Here the edit stays, so that "
    "`pre` is of the edited model, as `post` is. Take `pre` from a call without sequential_edit."
)


def _for_our_hparams(method):
    """Return a method of ``BaseEditor`` that takes our hparams.

    It runs on the device that they mean, knows today's arguments, and takes any ``batch_size``.
    """
    known = inspect.signature(method).parameters

    @functools.wraps(method)
    def for_our_hparams(editor, *args, **kwargs):
        if not isinstance(editor.hparams, HORSEHyperParams):
            return method(editor, *args, **kwargs)
        with device_of(editor.hparams), contextlib.ExitStack() as stack:
            if method.__name__ in ONE_BY_ONE:
                stack.callback(setattr, editor.hparams, "batch_size", editor.hparams.batch_size)
                editor.hparams.batch_size = 1
            for name, old in OLD_NAMES.items():
                if name in kwargs and name not in known and old in known:
                    kwargs[old] = kwargs.pop(name)
            given = dict(zip(known, (editor, *args), strict=False)) | kwargs
            # EasyEdit 0.0.1: no weights come back, so that it puts none back
            if "sequential_edit" not in known and kwargs.pop("sequential_edit", None):
                warnings.warn(PRE_IS_LATE, stacklevel=2)
            if not given.get("sequential_edit"):
                if method.__name__ in RETURN_A_MODEL:
                    warnings.warn(TAKEN_BACK, stacklevel=2)
                return method(editor, *args, **kwargs)
            stack.callback(setattr, editor, "apply_algo", editor.apply_algo)
            editor.apply_algo = functools.partial(apply.apply_on_top, editor)
            *outcome, _ = method(editor, *args, **kwargs)
            return *outcome, apply.weights_before(editor.horse)

    return for_our_hparams


def _new_trainer(cls, config, *args, **kwargs):
    """Be ``EditTrainer.__new__``: return a ``HORSETrainer`` where the table of trainers says so."""
    name = getattr(config, "alg", None) or getattr(config, "alg_name", None)
    if ALG_TRAIN_DICT.get(name) is HORSETrainer:
        return HORSETrainer(apply.our_hparams(config), *args, **kwargs)
    return object.__new__(cls)


# This stays when we unregister: Python cannot undo a __new__. The table has no HORSETrainer then.
EditTrainer.__new__ = _new_trainer

_undo = contextlib.ExitStack()


def register():
    """Make our methods known to EasyEdit; a second call does nothing."""
    if ALG_DICT.get("HORSE") is apply.apply_horse_to_model:
        return
    for name in METHODS:
        _put(ALG_DICT, name, apply.apply_horse_to_model)
        _put(ALG_TRAIN_DICT, name, HORSETrainer)
    batchable = BatchEditor.is_batchable_method
    _set(
        BatchEditor,
        "is_batchable_method",
        staticmethod(lambda alg_name: alg_name in METHODS or batchable(alg_name)),
    )
    _set(BaseEditor, "__init__", _with_our_model(BaseEditor.__init__))
    for name in (*ONE_BY_ONE, "batch_edit", "edit_dataset"):
        if hasattr(BaseEditor, name):
            _set(BaseEditor, name, _for_our_hparams(getattr(BaseEditor, name)))


def unregister():
    """Leave EasyEdit as it was before :func:`register`."""
    _undo.close()


def _put(table: dict, name: str, value):
    if name in table:
        _undo.callback(table.__setitem__, name, table[name])
    else:
        _undo.callback(table.pop, name, None)
    table[name] = value


def _set(cls: type, name: str, value):
    _undo.callback(setattr, cls, name, vars(cls)[name])
    setattr(cls, name, value)


register()
