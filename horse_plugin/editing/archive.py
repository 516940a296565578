"""The archive: a trained hypernetwork with its description, and what it was made for."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from horse_plugin.assets import TRAINED
from horse_plugin.errors import HorseError, UsageError, first_line
from horse_plugin.hparams import SHIPPED, HORSEHyperParams
from horse_plugin.method.finite import all_finite
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.fingerprint import FINGERPRINT, describe, is_same_model
from horse_plugin.model.preserve import FORM, Preserve
from horse_plugin.storage.hub import local
from horse_plugin.storage.schema import Maybe, check_form, count
from horse_plugin.storage.tensors import load_tensors

ARCHIVE = "archive.safetensors"
HISTORY = "training.csv"  # beside it, the losses and validations of its training
# What the description of an archive or of an edit must hold.
MADE_FOR = {"model": FINGERPRINT, "modules": [str], "versions": {str: str}}
MADE_FOR["hparams"] = {"alg_name": str, "archive": Maybe(str), "token": Maybe(str)}
NETWORK = {"shapes": [[count]], "rank": count, "n_blocks": count, "spread": str}
NETWORK["coefficient"] = str
SINCE_0_2 = ("normalizer", "has_cap")  # what the form of a network of 0.1 lacks


def archive_file(folder) -> Path:
    """Return the file of an archive: in the folder, on the hub, or the one that is ``shipped``."""
    return Path(TRAINED if str(folder) == SHIPPED else local(folder), ARCHIVE)


def load_network(folder, backbone: Backbone) -> tuple[HyperNetwork, Preserve | None, dict]:
    """Return a trained hypernetwork, ready for the backbone, with its text and its description.

    The text is what the ridge term of its training preserved, and edits preserve it too; None is
    the paper's ridge term.

    Raises:
        UsageError: there is no archive in the folder, or one for another model or other modules.
        HorseError: the archive is damaged.
    """
    network, preserve, about = read_network(folder)
    check_made_for(archive_file(folder), about, backbone)
    return to_edit_device(network, backbone), preserve, about


def read_network(folder) -> tuple[HyperNetwork, Preserve | None, dict]:
    """Return a trained hypernetwork, whatever model it is for, with its text and its description.

    Args:
        folder: a folder, or ``owner/name`` on the hub.

    Raises:
        UsageError: there is no archive in the folder, or no such folder on the hub.
        HorseError: the archive is damaged.
    """
    path = archive_file(folder)
    if not path.is_file():
        raise UsageError(f"archive: {folder} holds no {ARCHIVE}.")
    tensors, about = load_tensors(path)
    if about.get("kind") != "hypernetwork":
        raise UsageError(f"{path}: holds no hypernetwork.")
    check_form(path, about, MADE_FOR | {"network": NETWORK})
    preserve = None
    if about.get("preserve") is not None:
        check_form(path, about, {"preserve": FORM})
        preserve = Preserve.from_tensors(path, tensors, about["preserve"])
    return network_of(path, tensors, about["network"]), preserve, about


def as_trained(hparams: HORSEHyperParams, about: dict) -> HORSEHyperParams:
    """Return the hparams for edits with an archive: they preserve what its training preserved.

    Its network says how residuals are made. A warning names settings that are others.

    Args:
        about: the archive's description; before 0.2 nothing was preserved.

    Raises:
        UsageError: it was trained as another method, or on keys at other tokens.
    """
    trained, form = about["hparams"], about["network"]
    if (name := trained["alg_name"]) != hparams.alg_name:
        raise UsageError(f"archive: trained as {name}, but alg_name is {hparams.alg_name}.")
    if (token := trained.get("token", "ans")) != hparams.token:
        raise UsageError(f"archive: trained with token: {token}, but token is {hparams.token}.")
    found = {"spread": form["spread"], "coefficient": form["coefficient"]}
    found["normalizer"] = form.get("normalizer", "feature")
    found["residual_cap"] = trained.get("residual_cap") if form.get("has_cap") else None
    for key, value in found.items():
        if value != (here := getattr(hparams, key)):
            warnings.warn(
                f"archive: trained with {key}: {value}, which edits have, too; not {here}",
                stacklevel=4,
            )
    return replace(hparams, preserve=trained.get("preserve", "none"), **found)


def network_tensors(network: HyperNetwork) -> dict[str, torch.Tensor]:
    """Return the network's tensors under the names that they have in a file."""
    return {f"network.{name}": t for name, t in network.state_dict().items()}


def network_form(network: HyperNetwork) -> dict:
    """Return what is needed, beside the tensors, to build the network again."""
    block = next(iter(network.groups.values())).blocks
    return {
        "shapes": [list(s) for s in network.shapes],
        "rank": block[0].A.shape[1],
        "n_blocks": len(block),
        "spread": network.spread,
        "coefficient": network.coefficient,
        "normalizer": network.normalizer,
        "has_cap": network.has_cap,
    }


def network_of(path, tensors: dict[str, torch.Tensor], form: dict) -> HyperNetwork:
    """Return the network that ``form`` describes, filled with the tensors.

    Nothing is allocated for a network that the tensors do not fill.

    Args:
        path: the file, for messages.

    Raises:
        HorseError: form and tensors do not fit each other.
    """
    tensors = {
        n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")
    }
    if max(form["n_blocks"], len(form["shapes"])) > len(tensors):
        raise HorseError(f"{path}: damaged: field 'network' asks for more than the file holds.")
    try:
        with torch.device("meta"):
            network = HyperNetwork(**{n: form[n] for n in (*NETWORK, *SINCE_0_2) if n in form})
        shapes = {n: t.shape for n, t in network.state_dict().items()}
        if shapes != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("does not have the form of the tensors")
        if tensors["log_eta"].dtype is torch.float64:  # of a model of that precision
            network.double()
        network.to_empty(device="cpu").load_state_dict(tensors)
    except Exception as error:  # of a size, a name or a type that torch does not take
        raise HorseError(f"{path}: damaged: field 'network': {first_line(error)}.") from None
    for name, p in network.named_parameters():
        if not all_finite(p) and name != "log_eta":  # which is NaN until it is set
            raise HorseError(f"{path}: damaged: network.{name} is not finite.")
    return network


def to_edit_device(network: HyperNetwork, backbone: Backbone) -> HyperNetwork:
    """Move the network to where the model's edits are decided, and into their precision."""
    if backbone.edit_dtype is torch.float64:
        network.double()
    return network.to(backbone.edit_device)


def check_made_for(path, about: dict, backbone: Backbone):
    """Refuse what was made for another model or for other edit modules.

    Raises:
        UsageError: the message names both.
    """
    made, here = about["model"], backbone.fingerprint()
    if not is_same_model(made, here):
        raise UsageError(f"{path}: made for {describe(made)}, but this model is {describe(here)}.")
    if made.get("quantised") != here.get("quantised"):
        other = f"{describe(here)} has other keys: measure again"
        warnings.warn(f"{path}: made for {describe(made)}, and {other}", stacklevel=4)
    if about["modules"] != list(backbone.modules):
        missing = [m for m in about["modules"] if m not in backbone.modules]
        raise UsageError(
            f"{path}: made for the modules {', '.join(about['modules'])}; "
            f"inner_params names others ({'without ' + missing[0] if missing else 'more'})."
        )
