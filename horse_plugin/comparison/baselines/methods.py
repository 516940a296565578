"""EasyEdit's own methods as rows of the comparison, each through its own ``apply`` function.

A method edits a copy of the model, in float32 as EasyEdit loads it, and the copy then takes the
model's own dtype: the weights it starts from are the same bits for every method. On a bf16 model
the matrix products of methods that bear it round their factors to bf16, as the model's own do.
"""

import contextlib
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

from horse_plugin.comparison.baselines import mend, stats
from horse_plugin.comparison.baselines.targets import Targets
from horse_plugin.comparison.task import Edited, Task
from horse_plugin.data.records import EditRecord
from horse_plugin.data.seam import PLAIN
from horse_plugin.easyedit.patches import ALG_DICT, device_of, hparams_class, read_yaml
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation.results import wait_for
from horse_plugin.method.finite import all_finite
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import copy_of, own_random_numbers, pad_with_eos
from horse_plugin.model.moments import model_name
from horse_plugin.storage.digest import source_digest, text_digest


@dataclass(frozen=True)
class Method:
    """What one of EasyEdit's methods needs to be called right.

    Attributes:
        hparams: name of its class of hparams.
        name: its name in ``ALG_DICT``.
        padding: the side on which its code expects padding.
        at_subject: it edits at the subject, which it looks for in the prompt.
        one_by_one: it takes one request at a time.
        space: it puts no space before the answer, so that one has to be there.
        rounds: its products may round their factors: it solves nothing in float32. (ROME does: u
            from an inverse; rounded so, its cosine with the exact u was 0.99999.)
    """

    hparams: str
    name: str
    padding: str = "left"
    at_subject: bool = False
    one_by_one: bool = False
    space: bool = False
    rounds: bool = False


METHODS = {
    "FT": Method("FTHyperParams", "FT", rounds=True),
    "LoRA": Method("LoRAHyperParams", "LoRA", rounds=True),
    "ROME": Method(
        "ROMEHyperParams", "ROME", "right", at_subject=True, one_by_one=True, rounds=True
    ),
    "MEMIT": Method("MEMITHyperParams", "MEMIT", "right", at_subject=True, rounds=True),
    "MEND": Method("MENDHyperParams", "MEND", rounds=True),
    "PMET": Method("PMETHyperParams", "PMET", "right", at_subject=True, space=True, rounds=True),
    "EMMET": Method("EMMETHyperParams", "EMMET", "right", at_subject=True, rounds=True),
    "AlphaEdit": Method("AlphaEditHyperParams", "AlphaEdit", "right", at_subject=True),
    "UltraEdit": Method("UltraEditHyperParams", "ULTRAEDIT"),
}

# What EasyEdit's modules remember from one model and one call to the next.
REMEMBERED = {
    "CONTEXT_TEMPLATES_CACHE": lambda: None,
    "COV_CACHE": dict,
    "KZ_CACHE": dict,
    "inv_mom2_cache": dict,
    "P_loaded": bool,
    "cache_c_new": bool,
}


def load_hparams(method: str, path, device: torch.device):
    """Return EasyEdit's hparams of a method from its YAML, for a device.

    Raises:
        UsageError: this EasyEdit has no such method, or the file does not fit it.
    """
    spec = METHODS[method]
    cls = hparams_class(spec.hparams)
    if cls is None or spec.name not in ALG_DICT:
        raise UsageError(f"this EasyEdit has no {method}: set EASYEDIT_HOME to a newer checkout.")
    try:
        keys = read_yaml(path)
        # An older EasyEdit knows fewer keys, and would refuse the file for the others.
        known = {f.name for f in fields(cls)}
        hparams = cls(**{k: v for k, v in keys.items() if k in known})
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not hparams of EasyEdit's {method} ({error}).") from None
    hparams.device = str(device)
    stats.expand_paths(hparams)
    return hparams


def edits(
    method: str,
    hparams,
    backbone: Backbone,
    batches: Sequence[Sequence[EditRecord]],
    seed: int,
    log,
    folder: Path | None = None,
) -> Iterator[tuple[Backbone, float | None]]:
    """Edit a copy of the backbone's model, batch after batch.

    After each batch, yield the backbone of the copy, and the seconds that the batch took.

    Args:
        method: a name in :data:`METHODS`.
        hparams: EasyEdit's, from :func:`load_hparams`.
        batches: the records of each call of the method, on top of the calls before it.
        log: a text file for what EasyEdit prints.
        folder: the folder of target vectors (:mod:`.targets`) of the unedited model; None finds
            them anew. The seconds count a kept vector as if it had been found now.
    """
    spec = METHODS[method]
    apply = _fresh(ALG_DICT[spec.name])
    tokenizer = _padding_as(spec, hparams, deepcopy(backbone.tokenizer))
    model = copy_of(backbone.model).float().requires_grad_(True)
    model.config._name_or_path = model_name(backbone)  # statistics are looked up by it
    limits, modules = (backbone.batch_tokens, backbone.max_length), list(backbone.modules)
    for i, records in enumerate(batches):
        requests = [_request(r, i, spec) for i, r in enumerate(records)]
        if hasattr(hparams, "batch_size_once"):
            hparams.batch_size = len(requests)  # UltraEdit leaves out what goes beyond
        options, kept, targets = {"copy": False}, 0, None
        # Later batches' targets are of a model that is edited already: no other run's.
        if i == 0 and folder and "cache_template" in inspect.signature(apply).parameters:
            name = f"{model_name(backbone)} {backbone.model.dtype}"
            targets = Targets(folder, method, hparams, name, seed)
            requests = targets.named(requests)
            options["cache_template"], kept = targets.template, targets.kept(requests)
        groups = [[r] for r in requests] if spec.one_by_one else [requests]
        with _as_method(spec, hparams, backbone, seed, log):
            start = time.perf_counter()
            for group in groups:
                model, _ = apply(model, tokenizer, group, hparams, **options)
            wait_for(*backbone.devices)
            seconds = time.perf_counter() - start
        if kept:
            before = targets.seconds(kept)
            seconds = None if before is None else seconds + before
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # LoRA
        if not all(map(all_finite, model.parameters())):
            raise HorseError(f"{method} left weights that are not finite.")
        edited = deepcopy(model) if i + 1 < len(batches) else model
        edited = edited.to(backbone.model.dtype)
        yield Backbone(edited, backbone.tokenizer, modules, *limits, seam=backbone.seam), seconds


@contextlib.contextmanager
def _as_method(spec: Method, hparams, backbone: Backbone, seed: int, log):
    """Set up what EasyEdit's methods need inside a ``with``; ``log`` gets what EasyEdit prints."""
    rounds = spec.rounds and backbone.model.dtype == torch.bfloat16
    with (
        own_random_numbers(),
        _printing_to(log),
        device_of(hparams),
        _only_weights(),
        backbone.unfused_attention(),
        _rounded_products() if rounds else contextlib.nullcontext(),
    ):
        torch.manual_seed(seed)
        yield


def _padding_as(spec: Method, hparams, tokenizer):
    """Return the tokenizer, padding as the method expects it.

    FT in the EasyEdit on PyPI, which knows one objective only, takes the number of a prompt's
    tokens for the position of its last one, and leaves the token for unknown ones out of its loss.
    Padded otherwise, it trains at other positions, and on the padding.
    """
    pad_with_eos(tokenizer, spec.padding)
    if spec.name == "FT" and not hasattr(hparams, "objective_optimization"):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "right"
    return tokenizer


def _request(record: EditRecord, i: int, spec: Method) -> dict:
    """Return EasyEdit's request.

    A method that edits at the subject gets the prompt as a template. A prompt that does not hold
    its subject just once is its own subject, edited at its last token.
    """
    prompt, subject = record.prompt, record.subject
    if spec.at_subject:
        template = prompt.replace(subject, "{}") if subject else ""
        known = template.count("{}") == 1 and "{}" not in prompt
        prompt, subject = (template, subject) if known else ("{}", prompt)
    return {
        "case_id": i,
        "prompt": prompt,
        "subject": subject,
        "target_new": (" " if spec.space else "") + record.target_new.lstrip(),
        "ground_truth": record.ground_truth or "",
    }


def _fresh(apply):
    """Return the method as if nothing had been edited before."""
    if owner := getattr(apply, "__self__", None):
        return type(owner)().apply_to_model
    package = inspect.getmodule(apply).__name__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(package):
            for attribute, first in REMEMBERED.items():
                if hasattr(module, attribute):
                    setattr(module, attribute, first())
    return apply


@contextlib.contextmanager
def _printing_to(log):
    """Send to a file what EasyEdit prints and logs."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _rounded_products():
    """Have float32 matrix products round their factors to bf16, and add up in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _only_weights():
    """Have torch read tensors and plain values only, and run no code, out of EasyEdit's pickles.

    EasyEdit asks for all of a pickle. Who trusts one sets the variable to 0.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    was_set = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if not was_set:
            del os.environ[name]


def run(method: str, path, task: Task) -> Iterator[Edited]:
    """Edit the task's batches with a method whose YAML is at ``path``.

    Statistics that the method reads are made once, and so is the archive that it needs.

    Raises:
        UsageError: the model is asked otherwise than EasyEdit's methods ask it.
    """
    if task.backbone.seam != PLAIN:
        raise UsageError(
            "EasyEdit's methods edit plain prompts. Leave chat_template, separator and append_eos "
            f"out of the model's YAML to compare {method} with HORSE."
        )
    hparams = load_hparams(method, path, task.backbone.device)
    if getattr(hparams, "stats_dir", None):
        _prepare_statistics(hparams, task)
    n = f"{len(task.records)}" + (f"-by-{task.batch}" if task.batch else "")
    log = task.folder / "logs" / f"{method}-{task.model}-{n}-{task.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    trained = {}
    with log.open("w", encoding="utf-8") as file:
        if hasattr(hparams, "archive"):
            spec, on = METHODS[method], task.backbone
            within = functools.partial(_as_method, spec, hparams, on, task.seed, file)
            trained = mend.trained(hparams, task, within)
        about = method, hparams, task.backbone, task.batches, task.seed, file
        for backbone, seconds in edits(*about, task.folder / "targets"):
            yield Edited(backbone, seconds, **trained)


def _prepare_statistics(hparams, task: Task):
    """Take statistics from where the YAML has them (``horse stats``), or make them here."""
    backbone, modules = task.backbone, stats.modules_of(hparams)
    if not all(stats.stats_file(hparams, backbone, m).is_file() for m in modules):
        corpus = text_digest(source_digest(task.corpus))
        hparams.stats_dir = str(task.folder / "stats" / corpus)
    if getattr(hparams, "P_loc", None) and not Path(hparams.P_loc).is_file():
        about = text_digest(f"{hparams.layers} {hparams.nullspace_threshold}")
        hparams.P_loc = str(
            Path(hparams.stats_dir, model_name(backbone), f"null_space_project-{about}.pt")
        )
    stats.prepare(hparams, backbone, task.corpus)
