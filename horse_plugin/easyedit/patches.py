"""HORSE as one of EasyEdit's methods. Importing this module registers it.

Nothing of EasyEdit is copied or changed on disk. Beside the entries in its tables, two of its
classes learn about our hparams; whatever comes with other hparams runs as if we were not there:

- ``BaseEditor`` gets the model that they name as our engine loads it, whatever its architecture,
  and runs on the device that they mean. Its sequential edits are the history of one
  :class:`HorseEditor`, its attribute ``horse``. (The EasyEdit on PyPI writes ``cuda:`` before
  whatever ``device`` holds, and lacks some arguments of today's, such as ``sequential_edit``.)
- ``EditTrainer(config, train_set, val_set)`` makes a :class:`~horse_plugin.HORSETrainer`.
"""

import contextlib
import functools
import inspect
import shlex
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.overrides import TorchFunctionMode

from horse_plugin.assets import FACTS
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import UsageError
from horse_plugin.hparams import METHODS, UNTRAINED, HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import resolve_device
from horse_plugin.storage import archive
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


def apply_horse_to_model(
    model,
    tok,
    requests,
    hparams,
    copy=False,
    return_orig_weights=False,
    keep_original_weight=False,
    **kwargs,
) -> tuple[nn.Module, dict]:
    """Write all requests into the model in one edit; what EasyEdit calls an ``apply_algo``.

    Args:
        requests: EasyEdit's, however many; each has a ``prompt`` and a ``target_new``.
        copy: edit a copy, and leave ``model`` as it is.
        return_orig_weights: also return the weights that the edit replaced.
        keep_original_weight, kwargs: taken because EasyEdit passes them. Its releases disagree on
            what the former means; whoever has the original weights may put them back.

    Returns:
        The edited model, and parameter name → weight before the edit.

    Raises:
        UsageError: no archive is given, or one that does not fit; a malformed request.
    """
    hparams = _ours(hparams)
    model = deepcopy(model) if copy else model
    backbone = Backbone(model, tok, hparams.inner_params)
    editor = HorseEditor.from_backbone(backbone, hparams, _network(backbone, hparams))
    editor.edit(_facts(requests))
    return model, _weights_before(editor) if return_orig_weights else {}


def _facts(requests) -> list[dict]:
    return [{key: r.get(key) for key in ("prompt", "target_new")} for r in requests]


def _weights_before(editor: HorseEditor) -> dict[str, torch.Tensor]:
    """Parameter name → weight before all edits of the editor."""
    return {f"{name}.weight": weight for name, weight in editor.original_weights.items()}


def _ours(hparams) -> HORSEHyperParams:
    """Our hparams from any that name one of our methods, such as EasyEdit's for MALMEN."""
    if isinstance(hparams, HORSEHyperParams):
        return hparams
    return HORSEHyperParams.from_dict(vars(hparams))


def _network(backbone: Backbone, hparams: HORSEHyperParams) -> HyperNetwork | None:
    """The trained network that the hparams name; None if they ask for an untrained one."""
    if hparams.archive is None:
        raise UsageError(_how_to_train(hparams))
    if hparams.archive == UNTRAINED:
        return None
    file = Path(hparams.archive, archive.ARCHIVE)
    written = file.stat().st_mtime_ns if file.is_file() else None
    network, about = _read_network(hparams.archive, written, backbone.edit_dtype)
    archive.check_model(file, about, backbone)
    if (trained := about["hparams"]["alg_name"]) != hparams.alg_name:
        raise UsageError(f"{file}: trained as {trained}, but alg_name is {hparams.alg_name}.")
    return archive.place(network, backbone)


@functools.lru_cache(maxsize=1)
def _read_network(folder: str, written, dtype) -> tuple[HyperNetwork, dict]:
    """The archive in the folder, kept until it is ``written`` again or used in another dtype."""
    return archive.read_network(folder)


def _how_to_train(hparams: HORSEHyperParams) -> str:
    out = hparams.archive_folder
    command = ["horse", "train", "--hparams", hparams.source or "HPARAMS.yaml"]
    command += ["--train", FACTS / "train.json", "--val", FACTS / "val.json", "--out", out]
    return (
        f"archive: none given. Train one with `{shlex.join(map(str, command))}` and set "
        f"archive: {out}; or set archive: {UNTRAINED} to edit without."
    )


def hparams_class(name: str) -> type | None:
    """EasyEdit's class of hparams of that name, if this EasyEdit has it."""
    return getattr(easyeditor, name, None)


def read_yaml(path) -> dict:
    """A YAML as EasyEdit reads it: ``1e-5`` is a number."""
    from easyeditor.util.hparams import HyperParams

    keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return HyperParams.construct_float_from_scientific_notation(keys)


class ReadDevice(TorchFunctionMode):
    """Within it, torch reads the device name ``written`` as the device ``meant``."""

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
    """EasyEdit 0.0.1 writes ``cuda:{hparams.device}``, but ours may be ``cpu`` or left out."""
    return ReadDevice(f"cuda:{hparams.device}", resolve_device(hparams.device))


def _with_our_model(init):
    """``BaseEditor.__init__``, but with our hparams' model, loaded as :class:`Backbone` loads it.

    EasyEdit chooses classes by what the name contains, knows some names only, and its class for
    Llama tokenizers no longer reads the files of most. A loaded pair it takes as it is.
    """

    @functools.wraps(init)
    def with_our_model(editor, hparams):
        if not isinstance(hparams, HORSEHyperParams):
            return init(editor, hparams)
        backbone, name = Backbone.load(hparams), hparams.model_name
        tok = backbone.tokenizer
        tok.pad_token, tok.padding_side = tok.eos_token, "left"  # as EasyEdit sets it
        hparams.model_name = (backbone.model, tok)
        try:
            with device_of(hparams):
                init(editor, hparams)
        finally:
            editor.model_name = hparams.model_name = name
        editor.horse = None

    return with_our_model


# What the ``batch_edit`` of EasyEdit 0.0.1 calls the arguments of today's.
OLD_NAMES = {"locality_inputs": "locality_prompts", "portability_inputs": "locality_ground_truth"}


# Edit one request after another, and refuse any ``batch_size`` but 1 although they use none.
ONE_BY_ONE = ("edit", "edit_requests", "generate_edit")


def _for_our_hparams(method):
    """A method of ``BaseEditor`` on the device that our hparams mean, with today's arguments, and
    whatever their ``batch_size``."""
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
            if not given.get("sequential_edit"):
                return method(editor, *args, **kwargs)
            stack.callback(setattr, editor, "apply_algo", editor.apply_algo)
            editor.apply_algo = functools.partial(_apply_on_top, editor)
            *outcome, _ = method(editor, *args, **kwargs)
            return *outcome, _weights_before(editor.horse)

    return for_our_hparams


def _apply_on_top(base: BaseEditor, model, tok, requests, hparams, **kwargs):
    """One edit on top of those in ``base.horse.history``; an ``apply_algo``, as the one above.

    No weights are returned, so that no EasyEdit puts any back: the edit stays.
    """
    hparams = _ours(hparams)
    backbone, horse = Backbone(model, tok, hparams.inner_params), base.horse
    network = _network(backbone, hparams)
    if horse is None or horse.backbone.modules != backbone.modules or horse.changed:
        base.horse = horse = HorseEditor.from_backbone(backbone, replace(hparams, archive=None))
    horse.hparams, horse.network = hparams, network
    horse.edit(_facts(requests))
    return model, {}


def _new_trainer(cls, config, *args, **kwargs):
    """``EditTrainer.__new__``: a ``HORSETrainer`` where the table of trainers says so."""
    name = getattr(config, "alg", None) or getattr(config, "alg_name", None)
    if ALG_TRAIN_DICT.get(name) is HORSETrainer:
        return HORSETrainer(_ours(config), *args, **kwargs)
    return object.__new__(cls)


# Stays when we unregister, as Python cannot undo a __new__; the table has no HORSETrainer then.
EditTrainer.__new__ = _new_trainer

_undo = contextlib.ExitStack()


def register():
    """Make our methods known to EasyEdit; once is enough, again does nothing."""
    if ALG_DICT.get("HORSE") is apply_horse_to_model:
        return
    for name in METHODS:
        _put(ALG_DICT, name, apply_horse_to_model)
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
