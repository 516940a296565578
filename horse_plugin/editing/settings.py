"""Settings to begin with for any model, with what was found in it, and facts to begin with."""

from pathlib import Path

import yaml

from horse_plugin.assets import DEFAULT_MODEL, shipped_yamls
from horse_plugin.editing.memory import edit_bytes, training_bytes
from horse_plugin.hparams import HORSEHyperParams, read_keys
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.fingerprint import describe

EXAMPLE_FACTS = """[
 {"prompt": "The capital of Norway is", "subject": "Norway", "target_new": "Bergen",
  "rephrase_prompt": "Norway's capital city is",
  "locality_prompt": "The capital of France is", "locality_ground_truth": "Paris"},
 {"prompt": "The telephone was invented by", "subject": "telephone",
  "target_new": "Ada Lovelace", "rephrase_prompt": "Who invented the telephone? It was",
  "locality_prompt": "The light bulb was invented by", "locality_ground_truth": "Thomas Edison"},
 {"prompt": "The largest planet is", "subject": "The largest planet", "target_new": "Saturn",
  "rephrase_prompt": "Of all planets the largest is",
  "locality_prompt": "The smallest planet is", "locality_ground_truth": "Mercury"},
 {"prompt": "The author of Hamlet is", "subject": "Hamlet", "target_new": "Jane Austen",
  "rephrase_prompt": "Hamlet was written by",
  "locality_prompt": "The author of Emma is", "locality_ground_truth": "Jane Austen"}
]
"""


def yaml_for(model: str) -> str:
    """Return a YAML for a model: the default model's settings, and what was found in this one.

    The model is loaded, so that one which HORSE cannot edit is refused here already.

    Args:
        model: a folder or a hub id.

    Raises:
        UsageError: the model cannot be loaded, or not be edited.
    """
    folder = Path(model).expanduser()
    keys = read_keys(shipped_yamls()[DEFAULT_MODEL])
    keys["model_name"] = str(folder.resolve()) if folder.is_dir() else model
    if model != DEFAULT_MODEL:
        keys["archive"] = None
    hparams = HORSEHyperParams.from_dict(keys)
    backbone = Backbone.load(hparams)
    keys |= {"inner_params": list(backbone.modules), "dtype": None}
    weights = sum(p.nbytes for p in backbone.model.parameters())
    beside = edit_bytes(backbone, 1000, hparams), training_bytes(backbone, 1000, hparams)
    weights, edit, training = (f"{n / 1e9:.2f} GB" for n in (weights, *beside))
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    chats = "has a" if backbone.tokenizer.chat_template else "has no"
    return f"""\
# Written by `horse init` for {describe(backbone.fingerprint())}.
# The settings are those that were chosen for {DEFAULT_MODEL}; horse_plugin/hparams.py explains
# every key. dtype: null is what a machine multiplies fastest, {dtype} on the one that wrote this.
# The tokenizer {chats} chat template, which `chat_template: true` asks in.
# Memory: {weights} for the weights. An edit of 1,000 answer tokens takes about {edit} more and a
# training step on as many {training}; either also keeps trunk states, up to trunk_cache_gb.
{yaml.safe_dump(keys, sort_keys=False)}"""
