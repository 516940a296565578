"""What a training run saves after each validation, and what a resumed run reads again."""

from pathlib import Path

import torch

from horse_plugin.editing.archive import (
    MADE_FOR,
    NETWORK,
    check_made_for,
    network_of,
    network_tensors,
)
from horse_plugin.errors import HorseError, UsageError, first_line
from horse_plugin.evaluation.metrics import FIGURES
from horse_plugin.hparams import CHANGE_NO_FIGURE, WHERE_IT_RUNS, HORSEHyperParams, canonical
from horse_plugin.method.finite import all_finite
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.schema import Maybe, check_form, count, finite
from horse_plugin.storage.tensors import load_tensors

CHECKPOINT = "checkpoint.safetensors"
FORM = MADE_FOR | {
    "network": NETWORK,
    "step": count,
    "best": Maybe({"step": count, "score": finite, **dict.fromkeys(FIGURES, Maybe(finite))}),
    "history": [{"step": count}],
    "data": [str],
    "dtype": Maybe(str),
    "text": Maybe(str),
}
# What a resumed run may set anew: how long it goes on, and where it runs.
MAY_CHANGE = {"max_epochs", "early_stop_patience", *WHERE_IT_RUNS, *CHANGE_NO_FIGURE}

# What runs did before there was a key for it.
WITHOUT = {"preserve": "none", "keep_coef": 0.0, "val_score": "paper", "min_edits_per_step": None}


def tensors_of(network: HyperNetwork, optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of the network and of the optimizer's state, by name."""
    state = optimizer.state_dict()["state"]
    return network_tensors(network) | {
        f"optimizer.{i}.{name}": t for i, entry in state.items() for name, t in entry.items()
    }


def read(
    path: Path, backbone: Backbone, hparams: HORSEHyperParams, data: list[str]
) -> tuple[dict[str, torch.Tensor], dict]:
    """Return a checkpoint's tensors and description, for a run that goes on from it.

    Args:
        data: digests of the training and of the validation records.

    Raises:
        UsageError: it is from a run on another model, in another dtype, on other records or with
            other settings.
        HorseError: it is damaged.
    """
    tensors, about = load_tensors(path)
    check_form(path, about, FORM)
    n, steps = about["step"], [h["step"] for h in about["history"]]
    best = about["best"] or {"step": 0}
    if n != len(steps) or steps != list(range(1, len(steps) + 1)) or best["step"] > n:
        raise HorseError(f"{path}: damaged: its steps are not those of its history.")
    check_made_for(path, about, backbone)
    if about["data"] != data:
        raise UsageError(f"{path}: was trained on other records. Give the same files.")
    dtype = str(backbone.model.dtype)
    if about.get("dtype") not in (None, dtype):
        raise UsageError(
            f"{path}: was trained in {about['dtype']}, and this model is in {dtype}. Set dtype, or "
            "train into another folder."
        )
    before = canonical(about["hparams"])
    for key, value in hparams.to_dict().items():
        was = before.get(key, WITHOUT.get(key, value))
        if key not in MAY_CHANGE and was != value:
            raise UsageError(
                f"{path}: was trained with {key}: {was}, and the hparams now say "
                f"{value}. Give the old value, or train into another folder."
            )
    return tensors, about


def restore(path: Path, tensors, about: dict, network: HyperNetwork, optimizer):
    """Put the state of a checkpoint into a network and its optimizer.

    Raises:
        HorseError: the checkpoint does not fit them.
    """
    saved = network_of(path, tensors, about["network"])
    try:
        network.load_state_dict(saved.state_dict())
        state = {}
        for name, t in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = t
        groups = optimizer.state_dict()["param_groups"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, of_parameter in state.items():
            shapes = {"step": (), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[i].shape)}
            if {k: t.shape for k, t in of_parameter.items()} != shapes:
                raise ValueError(f"optimizer.{i} is not the state of its parameter")
            if not all(map(all_finite, of_parameter.values())):
                raise ValueError(f"optimizer.{i} is not finite")
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (RuntimeError, ValueError, LookupError) as error:
        raise HorseError(f"{path}: damaged: {first_line(error)}") from None
