"""What EasyEdit calls to edit with HORSE: its ``apply_algo``, and edits on top of one another."""

import functools
import shlex
from dataclasses import replace

import torch
from torch import nn

from horse_plugin.assets import FACTS
from horse_plugin.editing.archive import (
    archive_file,
    as_trained,
    check_made_for,
    read_network,
    to_edit_device,
)
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import UsageError
from horse_plugin.hparams import UNTRAINED, HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import copy_of
from horse_plugin.model.preserve import Preserve


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
    """Write all requests into the model in one edit; EasyEdit calls this an ``apply_algo``.

    Args:
        requests: any number of EasyEdit's requests, each with a ``prompt`` and a ``target_new``.
        copy: whether to edit a copy, and leave ``model`` as it is.
        return_orig_weights: whether to return the weights that the edit replaced.
        keep_original_weight, kwargs: taken because EasyEdit passes them. Its releases disagree on
            what the former means; the caller may put the original weights back.

    Returns:
        The edited model, and parameter name → weight before the edit.

    Raises:
        UsageError: no archive is given, or one that does not fit, or a request is malformed.
    """
    hparams = our_hparams(hparams)
    model = copy_of(model) if copy else model
    backbone = _backbone(model, tok, hparams)
    editor = HorseEditor.from_backbone(backbone, *_trained(backbone, hparams))
    editor.edit(_prompts_and_targets(requests))
    return model, weights_before(editor) if return_orig_weights else {}


def _prompts_and_targets(requests) -> list[dict]:
    keys = ("prompt", "target_new", "subject")
    return [{key: r[key] for key in keys if r.get(key) is not None} for r in requests]


def weights_before(editor: HorseEditor) -> dict[str, torch.Tensor]:
    """Return parameter name → weight before all edits of the editor."""
    return {f"{name}.weight": weight for name, weight in editor.original_weights.items()}


def our_hparams(hparams) -> HORSEHyperParams:
    """Return our hparams from any that name one of our methods, such as EasyEdit's for MALMEN."""
    if isinstance(hparams, HORSEHyperParams):
        return hparams
    return HORSEHyperParams.from_dict(vars(hparams))


def _trained(
    backbone: Backbone, hparams: HORSEHyperParams
) -> tuple[HORSEHyperParams, HyperNetwork | None, Preserve | None]:
    """Return the hparams of an edit, the trained network that they name, and what it preserves.

    The latter two are None if the hparams ask for an untrained network.
    """
    if hparams.archive is None:
        raise UsageError(_how_to_train(hparams))
    if hparams.archive == UNTRAINED:
        return hparams, None, None
    file = archive_file(hparams.archive)
    written = file.stat().st_mtime_ns if file.is_file() else None
    network, preserve, about = _read_network(hparams.archive, written, backbone.edit_dtype)
    check_made_for(file, about, backbone)
    return as_trained(hparams, about), to_edit_device(network, backbone), preserve


@functools.lru_cache(maxsize=1)
def _read_network(folder: str, written, dtype) -> tuple[HyperNetwork, Preserve | None, dict]:
    """Return the archive in the folder, read again if it was written or the dtype is another."""
    return read_network(folder)


def _how_to_train(hparams: HORSEHyperParams) -> str:
    out = hparams.archive_folder
    command = ["horse", "train", "--hparams", hparams.source or "HPARAMS.yaml"]
    command += ["--train", FACTS / "train.json", "--val", FACTS / "val.json", "--out", out]
    return (
        f"archive: none given. Train one with `{shlex.join(map(str, command))}` and set "
        f"archive: {out}; or set archive: {UNTRAINED} to edit without."
    )


def apply_on_top(base, model, tok, requests, hparams, **kwargs):
    """Make one edit on top of those in ``base.horse.history``; an ``apply_algo`` as the one above.

    No weights are returned, so that EasyEdit puts none back and the edit stays.

    Args:
        base: EasyEdit's ``BaseEditor``.
    """
    hparams = our_hparams(hparams)
    backbone, horse = _backbone(model, tok, hparams), base.horse
    trained = _trained(backbone, hparams)
    if horse is None or horse.backbone.modules != backbone.modules or horse.changed:
        base.horse = horse = HorseEditor.from_backbone(backbone, *trained)
    horse.use(backbone, *trained)
    horse.edit(_prompts_and_targets(requests))
    return model, {}


def _backbone(model, tok, hparams: HORSEHyperParams) -> Backbone:
    """Return a backbone without files for trunk states: EasyEdit makes one for every edit."""
    return Backbone.of(model, tok, replace(hparams, trunk_disk_gb=0.0))
