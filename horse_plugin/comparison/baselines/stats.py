"""Second-moment statistics of keys, in the files that EasyEdit's MEMIT family reads.

MEMIT, PMET, EMMET and ROME weigh an edit against K Kᵀ, the second moment of what goes into the edit
modules on ordinary text; AlphaEdit projects onto the space that such text hardly uses. EasyEdit
takes them from Wikipedia, with a download and hours of work; any text will do here.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from tqdm import tqdm

from horse_plugin.data.formats import load_records
from horse_plugin.data.prompts import Prompt, batches
from horse_plugin.data.records import EditRecord
from horse_plugin.data.sources import read_items
from horse_plugin.errors import UsageError, first_line
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.files import write as write_file

LONGEST = 1024  # tokens of a text


def stats_file(hparams, model_name: str, layer: str) -> Path:
    """Return where EasyEdit looks for the second moment of one edit module.

    Args:
        hparams: EasyEdit's, with ``stats_dir``, ``mom2_dataset``, ``mom2_dtype`` and
            ``mom2_n_samples``.
        model_name: the last part of the model's name or path.
    """
    name = f"{layer}_{hparams.mom2_dtype}_mom2_{hparams.mom2_n_samples}.npz"
    return Path(hparams.stats_dir, model_name, f"{hparams.mom2_dataset}_stats", name)


def second_moments(
    backbone: Backbone, layers: Sequence[str], texts: Sequence[str], progress: bool = True
) -> dict[str, tuple[torch.Tensor, int]]:
    """Return Σ k kᵀ and the number of keys, over all tokens of the texts.

    Args:
        layers: names of linear maps; their inputs are the keys.
        texts: any number of texts, each cut at the model's (or 1,024 tokens') length.

    Returns:
        Layer → (d×d float32 sum, count).
    """
    config = backbone.model.config.get_text_config()
    limit = min(getattr(config, "max_position_embeddings", LONGEST), LONGEST)
    ids = [backbone.tokenizer(t, truncation=True, max_length=limit)["input_ids"] for t in texts]
    prompts = [Prompt((*x, 0), 1) for x in ids if x]  # the last token is never read
    sums, mask = {}, None

    def add(name):
        def hook(module, args):
            keys = args[0][mask].float()
            sums[name] = sums.get(name, 0) + (keys.T @ keys).double()

        return hook

    count = sum(len(p.inputs) for p in prompts)
    hooks = [backbone.model.get_submodule(n).register_forward_pre_hook(add(n)) for n in layers]
    bar = tqdm(total=count, desc="statistics", unit="token", disable=not progress)
    try:
        with torch.no_grad(), bar:
            for batch in batches(prompts, backbone.batch_tokens, backbone.device):
                mask = torch.zeros_like(batch.ids, dtype=torch.bool)
                mask[batch.rows, batch.cols] = True
                # The head's output is not needed.
                backbone.model.base_model(input_ids=batch.ids, use_cache=False)
                bar.update(len(batch.rows))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total.float().cpu(), count) for name, total in sums.items()}


def write(hparams, model_name: str, moments: dict):
    """Write the moments where and as EasyEdit's ``layer_stats`` reads them."""
    for layer, (total, count) in moments.items():
        buffer = io.BytesIO()
        np.savez(
            buffer,
            **{
                "mom2.constructor": "util.runningstats.SecondMoment()",
                "mom2.count": count,
                "mom2.mom2": total.numpy(),
                "sample_size": hparams.mom2_n_samples,
            },
        )
        write_file(stats_file(hparams, model_name, layer), buffer.getvalue())


def write_null_space(path, moments: dict, threshold: float):
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
        folder: instead of their ``stats_dir``.

    Raises:
        UsageError: a YAML that names no statistics, or no corpus there.
    """
    made, backbones = [], {}
    for path in yamls:
        try:
            hparams = SimpleNamespace(**yaml.safe_load(path.read_text(encoding="utf-8")))
            hparams.stats_dir = str(folder or hparams.stats_dir)
            modules_of(hparams), stats_file(hparams, "", "")
        except (OSError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise UsageError(f"{path}: not a YAML that asks for statistics ({error}).") from None
        if (threshold := getattr(hparams, "nullspace_threshold", None)) is not None:
            hparams.nullspace_threshold = float(threshold)
        name = hparams.model_name
        if name not in backbones:
            backbones[name] = Backbone.load(HORSEHyperParams(model_name=name))
        made += prepare(hparams, backbones[name], corpus)
    return made


def modules_of(hparams) -> list[str]:
    """Return the names of the edit modules that EasyEdit's hparams name."""
    templates = getattr(hparams, "rewrite_module_tmps", None) or [hparams.rewrite_module_tmp]
    return [template.format(layer) for layer in hparams.layers for template in templates]


def prepare(hparams, backbone: Backbone, corpus, progress=True) -> list[Path]:
    """Compute what EasyEdit's hparams ask for and is not there yet, and return the files made.

    Args:
        hparams: EasyEdit's, or anything with their keys; ``stats_dir`` says where the files go, and
            ``P_loc``, if there is one, where AlphaEdit's projection goes.
        corpus: see :func:`read_corpus`; ``mom2_n_samples`` of its texts are read.
    """
    name, modules = model_name(backbone), modules_of(hparams)
    files = {m: stats_file(hparams, name, m) for m in modules}
    missing = [m for m in modules if not files[m].is_file()]
    made = [files[m] for m in missing]
    if missing:
        texts = read_corpus(corpus, hparams.mom2_n_samples)
        write(hparams, name, second_moments(backbone, missing, texts, progress=progress))
    where = getattr(hparams, "P_loc", None)
    if where and not Path(where).is_file():
        moments = {m: _read(file) for m, file in files.items()}
        write_null_space(where, moments, hparams.nullspace_threshold)
        made.append(Path(where))
    return made


def model_name(backbone: Backbone) -> str:
    """Return the last part of the model's name or path."""
    return Path(str(backbone.model.config.name_or_path)).name or type(backbone.model).__name__


def _read(file: Path) -> tuple[torch.Tensor, int]:
    with np.load(file) as data:
        return torch.from_numpy(data["mom2.mom2"]), int(data["mom2.count"])


def read_corpus(source, size: int) -> list[str]:
    """Return the first ``size`` texts of a source, or all if it holds fewer.

    Args:
        source: edit records, or their file; a JSON or JSONL file of objects with a ``text``; any
            other file, whose lines are the texts; or a hub data set with a ``text`` column,
            optionally with its configuration (``owner/name:configuration``).

    Raises:
        UsageError: no such source, or no text in it.
    """
    if not isinstance(source, (str, Path)):
        texts = _of_records(source)
    elif (path := Path(source)).suffix.lower() in (".json", ".jsonl"):
        items = read_items(path)
        plain = [i["text"] for i in items if isinstance(i, dict) and isinstance(i.get("text"), str)]
        texts = plain or _of_records(load_records(path))
    elif path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            texts = [line.strip() for line in file]
    elif path.exists():
        raise UsageError(f"{path}: expected a file of text.")
    else:
        texts = _hub_texts(str(source), size)
    texts = [t for t in texts if t.strip()][:size]
    if not texts:
        raise UsageError(f"{source}: no text in it.")
    return texts


def _of_records(records: Iterable[EditRecord]) -> list[str]:
    """Return the records' true statements, without the edited ones."""
    texts = []
    for r in records:
        texts += [f"{q.prompt} {q.answer}" for q in r.unrelated]
        texts += [f"{p} {r.ground_truth or ''}".strip() for p in (r.prompt, *r.rephrases)]
    return texts


def _hub_texts(name: str, size: int) -> list[str]:
    import datasets

    name, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        return [row["text"] for row in rows.take(size)]
    except Exception as error:  # whatever the hub and its formats raise
        raise UsageError(
            f"corpus: {name!r} is no file, and not loaded as one: {first_line(error)}"
        ) from None
