"""Second-moment statistics of keys, in the files that EasyEdit's MEMIT family reads.

MEMIT, PMET, EMMET and ROME weigh an edit against K Kᵀ, the second moment of what goes into the edit
modules on ordinary text, as HORSE's metric does; AlphaEdit projects onto the space that such text
hardly uses. EasyEdit takes them from Wikipedia, with a download and hours of work; any text will do
here. One code makes all of them, :mod:`horse_plugin.model.moments`.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from horse_plugin.data.corpus import texts_of
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import UsageError
from horse_plugin.foreign import modules_of_layers
from horse_plugin.hparams import HORSEHyperParams, find_yaml, read_keys
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.moments import (
    Moments,
    load_moments,
    moments_file,
    save_moments,
    second_moments,
)
from horse_plugin.storage.files import locked_folder
from horse_plugin.storage.files import write as write_file

LONGEST = 1024  # tokens of a text
# What a YAML has that asks for statistics.
ASKING = ("model_name", "layers", "rewrite_module_tmp", "stats_dir")
ASKING += ("mom2_dataset", "mom2_dtype", "mom2_n_samples")


def stats_file(hparams, backbone: Backbone, module: str) -> Path:
    """Return where EasyEdit looks for the second moment of one edit module.

    Args:
        hparams: EasyEdit's, with ``stats_dir``, ``mom2_dataset``, ``mom2_dtype`` and
            ``mom2_n_samples``.
    """
    data, n, dtype = hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
    return moments_file(hparams.stats_dir, backbone, module, data, n, dtype)


def moments_of_texts(backbone: Backbone, modules: Sequence[str], texts: Sequence[str]) -> Moments:
    """Return the moments of these modules over all tokens of the texts.

    Args:
        modules: names of linear maps; their inputs are the keys.
        texts: each cut at the length that the model reads, or at 1,024 tokens.
    """
    limit = min(backbone.max_length or LONGEST, LONGEST)
    ids = [backbone.tokenizer(t, truncation=True, max_length=limit)["input_ids"] for t in texts]
    prompts = [Prompt((*x, 0), 1) for x in ids if x]  # the last token is never read
    of_modules = Backbone(
        backbone.model, backbone.tokenizer, modules, backbone.batch_tokens, progress=True
    )
    return second_moments(of_modules, prompts)


def write_null_space(path, moments: Moments, threshold: float):
    """Write AlphaEdit's projection P, layers×d×d, onto the directions where E[k kᵀ] is small.

    Args:
        threshold: eigenvalues below it count as null.
    """
    buffer = io.BytesIO()
    torch.save(
        torch.stack([_projection(total / n, threshold) for total, n in moments.values()]), buffer
    )
    write_file(path, buffer.getvalue())


def _projection(moment: torch.Tensor, threshold: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    null = vectors[:, values < threshold]
    return (null @ null.T).float()


def statistics_of_yamls(yamls: Sequence[Path], corpus, folder: Path | None = None) -> list[Path]:
    """Prepare the statistics that YAMLs of EasyEdit's methods ask for, and return the files made.

    Args:
        yamls: the files, or the names of shipped ones.
        folder: instead of their ``stats_dir``.

    Raises:
        UsageError: a YAML that names no statistics, or no corpus there.
    """
    made, backbones = [], {}
    for name in yamls:
        path = find_yaml(name)
        try:
            hparams = _asking(read_keys(path), folder)
        except UsageError as error:
            raise UsageError(f"{path}: not a YAML that asks for statistics: {error}") from None
        name = hparams.model_name
        if name not in backbones:
            backbones[name] = Backbone.load(HORSEHyperParams(model_name=name))
        made += prepare(hparams, backbones[name], corpus)
    return made


def _asking(keys: dict, folder: Path | None) -> SimpleNamespace:
    """Return the keys of a YAML as attributes, if all are there that statistics need."""
    keys = keys | ({"stats_dir": str(folder)} if folder else {})
    keys.setdefault("rewrite_module_tmp", keys.get("rewrite_module_tmps"))  # PMET's has several
    for key in ASKING:
        if keys.get(key) is None:
            raise UsageError(f"{key} is missing.")
    for key, kind in (("mom2_n_samples", int), ("nullspace_threshold", float)):
        try:
            keys |= {key: kind(keys[key])} if keys.get(key) is not None else {}
        except (TypeError, ValueError):
            raise UsageError(f"{key}: expected a number, got {keys[key]!r}.") from None
    hparams = SimpleNamespace(**keys)
    expand_paths(hparams)
    modules_of(hparams)
    return hparams


def expand_paths(hparams):
    """Have ``~`` mean the user's folder in EasyEdit's hparams, whose code takes it as a name."""
    for key in ("archive", "P_loc", "stats_dir"):
        if path := getattr(hparams, key, None):
            setattr(hparams, key, str(Path(path).expanduser()))


def modules_of(hparams) -> list[str]:
    """Return the names of the edit modules that EasyEdit's hparams name."""
    templates = getattr(hparams, "rewrite_module_tmps", None) or [hparams.rewrite_module_tmp]
    return [name for t in templates for name in modules_of_layers(t, hparams.layers)]


def prepare(hparams, backbone: Backbone, corpus) -> list[Path]:
    """Compute what EasyEdit's hparams ask for and is not there yet, and return the files made.

    Args:
        hparams: EasyEdit's, or anything with their keys; ``stats_dir`` says where the files go, and
            ``P_loc``, if there is one, where AlphaEdit's projection goes.
        corpus: see :func:`horse_plugin.data.corpus.texts_of`; ``mom2_n_samples`` of its texts are
            read.
    """
    files = {m: stats_file(hparams, backbone, m) for m in modules_of(hparams)}
    missing = [m for m in files if not files[m].is_file()]
    made = [files[m] for m in missing]
    if missing:
        texts = texts_of(corpus, hparams.mom2_n_samples)
        with locked_folder(files[missing[0]].parent):  # another corpus may go by the same name
            for m, (total, count) in moments_of_texts(backbone, missing, texts).items():
                save_moments(files[m], total, count, hparams.mom2_n_samples)
    where = getattr(hparams, "P_loc", None)
    if where and not Path(where).is_file():
        moments = {m: load_moments(file) for m, file in files.items()}
        write_null_space(where, moments, hparams.nullspace_threshold)
        made.append(Path(where))
    return made
