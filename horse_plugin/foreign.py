"""Settings files of other methods and of the released code: what their keys mean here."""

import reprlib
from collections.abc import Mapping, Sequence

import yaml

from horse_plugin.assets import DEFAULT_MODEL, shipped_yamls
from horse_plugin.errors import UsageError

# Keys that mean nothing here, and what to do instead.
ADVICE = {
    "edit_lr": "It is MEND's first step; ours is strength, or lr for an absolute one",
    "lr_lr": "It is MEND's rate for edit_lr; ours is eta_meta_lr",
    "lr_scale": "It scales MEND's rates; ours are lr and eta_meta_lr",
    "cedit": "It is MEND's; ours is edit_coef",
    "cloc": "It is MEND's; ours is loc_coef",
    "cbase": "It is MEND's; ours is loc_coef",
    "grad_clip": "Ours is max_grad_norm",
    "accumulate_bs": "Ours is edits_per_step",
    "n_hidden": "Ours is n_blocks",
    "hidden_dim": "Ours is rank",
    "layers": "It is MEMIT's; ours is inner_params, names of modules, or leave it out",
    "rewrite_module_tmp": "It is MEMIT's; ours is inner_params, or leave it out",
    "fp16": "Ours is dtype: fp16",
    "bf16": "Ours is dtype: bf16",
    "fact_token": "It is MEMIT's; ours is token: subject",
    "mom2_dataset": "It is MEMIT's; ours is preserve",
    "mom2_n_samples": "It is MEMIT's; ours is preserve_tokens",
    "mom2_update_weight": "It is MEMIT's; ours is ridge, and training finds it",
    "v_lr": "It is MEMIT's; ours is strength",
    "v_num_grad_steps": "It is MEMIT's; ours is edit_sweeps",
    "clamp_norm_factor": "It is MEMIT's; ours is residual_cap",
    "kl_factor": "It is MEMIT's; ours is loc_coef",
    "editor": "The released code's groups of keys are flat here",
    "model": "The released code's group; ours is model_name",
    "data": "The released code's group; name the files to horse train",
    "v_loss_layer": "It is MEMIT's; HORSE takes the loss of the whole model",
    "v_weight_decay": "It is MEMIT's; HORSE has the ridge term instead",
    "cache_dir": "The released code's; trunk_cache_gb and trunk_disk_gb are ours",
    "load_checkpoint": "The released code's; ours is horse train --resume",
    "model_device": "The released code's; ours is device",
    "editor_device": "The released code's; ours is device",
}
# Keys that have another name here.
RENAMED = {
    "name_or_path": "model_name",
    "class_name": "model_class",
    "edit_modules": "inner_params",
    "n_epochs": "max_epochs",
    "n_edits": "edits_per_step",
    "model_device": "device",
    "cedit": "edit_coef",
    "cloc": "loc_coef",
    "grad_clip": "max_grad_norm",
    "layers": "inner_params",
    "fact_token": "token",
}
GROUPS = ("data", "model", "editor")  # of the released code's configuration
# What the default model's YAML sets for keys at the subject, where one gradient writes few answers.
AT_SUBJECT = ("edit_sweeps", "normalizer", "residual_cap", "strength", "ridge", "keep_next")
OF_MEND = {"lr": "meta_lr", "lr_lr": "eta_meta_lr"}  # the same word for another rate


def converted(files: Sequence[Mapping], known: Sequence[str]) -> tuple[dict, dict[str, str]]:
    """Return the keys of ours that settings files of others mean, and what was left out.

    MEND's, MALMEN's and MEMIT's files of EasyEdit are read, and the released code's, whose groups
    may be files of their own. What has no counterpart keeps our default.

    Args:
        files: the keys of each file.
        known: the names of our keys.

    Returns:
        Our keys, and for each key that was left out the reason.

    Raises:
        UsageError: the files name no model, or layers that are none.
    """
    keys = {}
    for file in files:
        for group in GROUPS:
            if isinstance(file.get(group), Mapping):
                file = {k: v for k, v in file.items() if k != group} | dict(file[group])
        keys |= file
    method = str(keys.pop("alg_name", keys.pop("alg", keys.pop("name", "HORSE"))))
    keys.pop("defaults", None)  # which files the released code's configuration is made of
    module = keys.pop("rewrite_module_tmp", None)
    made, left_out = {"alg_name": "HORSE"}, {}
    for key, value in keys.items():
        name = OF_MEND.get(key, key) if method == "MEND" else key
        name = RENAMED.get(name, name)
        if key == "layers" and module:
            value = modules_of_layers(module, value)
        elif key == "fact_token":
            value = "subject" if value == "subject_last" else "ans"
        elif key == "inner_params" and method == "MEND":
            left_out[key] = "MEND edits three maps a block; HORSE finds the last of them"
            continue
        elif key == "archive" and value:
            left_out[key] = f"it holds a trained {method}; train HORSE's with `horse train`"
            continue
        elif key == "token" and value in ("mask", "all"):
            value = "ans"
        elif key == "batch_size":
            left_out[key] = "HORSE edits all facts at once"
            continue
        if name in known:
            made[name] = value
        else:
            left_out[key] = ADVICE.get(key, "it has no counterpart")
    if made.get("token") == "subject":
        shipped = yaml.safe_load(shipped_yamls()[DEFAULT_MODEL].read_text(encoding="utf-8"))
        made = {name: shipped[name] for name in AT_SUBJECT} | made
    if "model_name" not in made:
        raise UsageError("no model is named in these files (model_name, or name_or_path).")
    return made, left_out


def modules_of_layers(template, layers) -> list[str]:
    """Return the names of modules that MEMIT's keys name.

    Args:
        template: ``rewrite_module_tmp``, a name with ``{}`` for the number of a layer.
        layers: the numbers.

    Raises:
        UsageError: they are something else.
    """
    try:
        if isinstance(layers, (list, tuple)):
            return [template.format(layer) for layer in layers]
    except (AttributeError, LookupError, TypeError, ValueError):
        pass  # it is no text, or has no place for one number
    raise UsageError(
        f"layers: expected a list of numbers, got {reprlib.repr(layers)}, and for "
        f"rewrite_module_tmp a name with {{}} for each, got {reprlib.repr(template)}."
    )
