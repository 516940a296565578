"""Second moments Σ k kᵀ of what goes into edit modules, and their files.

The metric of the ridge term is made from them (:mod:`horse_plugin.method.metric`), and MEMIT, PMET,
EMMET, ROME and AlphaEdit read them: the files are those of EasyEdit's ``layer_stats``.
"""

import contextlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from horse_plugin import distributed
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.method.finite import all_finite
from horse_plugin.method.ridge import add_gram
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded, hooked
from horse_plugin.model.halves import StopForward
from horse_plugin.storage.files import file_name, write
from horse_plugin.storage.schema import plain_file

Moments = dict[str, tuple[torch.Tensor, int]]  # edit module → (Σ k kᵀ, d×d; number of keys)


def moments_file(
    folder, backbone: Backbone, module: str, data: str, n_samples: int, dtype="float32"
):
    """Return the path of one module's moment, where EasyEdit's ``layer_stats`` looks for it.

    Args:
        folder: ``stats_dir`` in the YAMLs.
        data: the name of the data set, ``mom2_dataset`` in EasyEdit's YAMLs.
        n_samples: the number of texts, ``mom2_n_samples``.
        dtype: ``mom2_dtype``.

    Raises:
        UsageError: a name leads into another folder.
    """
    names = f"{data}_stats", f"{module}_{dtype}_mom2_{n_samples}.npz"
    for name in names:
        if Path(name).name != name:
            raise UsageError(f"{name}: no name of a file; mom2_dataset and mom2_dtype hold no /.")
    return Path(folder, model_name(backbone), *names)


def model_name(backbone: Backbone) -> str:
    """Return the last part of the model's name or path."""
    name = Path(str(backbone.model.config.name_or_path)).name
    return file_name(name or type(backbone.model).__name__)


@guarded
@torch.no_grad()
def second_moments(
    backbone: Backbone, prompts: Sequence[Prompt], progress: bool | None = None
) -> Moments:
    """Return Σ k kᵀ over the answer positions of the prompts, for each edit module.

    The sums are made batch by batch, so that no key is kept: they take 4d² bytes a module. A pass
    ends where the last edit module gets its input.

    Args:
        prompts: at least one; ``Prompt(ids, 1)`` reads all positions of a text.
        progress: as in :meth:`Backbone.batches`.
    """
    where = {"device": backbone.edit_device, "dtype": backbone.edit_dtype}
    sums = {
        name: torch.zeros(d, d, **where)
        for (name, (d, _)) in zip(backbone.modules, backbone.shapes, strict=True)
    }

    def add_keys(name: str, batch, left: set[str]):
        def hook(module, args):
            where = backbone.key_positions(name, batch).to(args[0].device)
            add_gram(sums[name], args[0].flatten(0, -2)[where].to(sums[name].device))
            left.discard(name)
            if not left:
                raise StopForward(None)

        return hook

    local = [prompts[i] for i in distributed.local_indices(prompts)]
    with backbone.lockstep.loop():
        for batch in backbone.batches(local, "statistics", progress):
            left = set(backbone.modules)
            with contextlib.ExitStack() as hooks, contextlib.suppress(StopForward):
                for name, module in backbone.modules.items():
                    hook = add_keys(name, batch, left)
                    hooks.enter_context(hooked(module.register_forward_pre_hook, hook))
                backbone.logits(batch)
    count = sum(len(p.answer) for p in prompts)
    # In float32 always, as the files hold them, so that both give the same edit.
    return {n: (distributed.sum_over_ranks(s).float().cpu(), count) for n, s in sums.items()}


def save_moments(path: Path, total: torch.Tensor, count: int, n_samples: int):
    """Write one module's moment as EasyEdit's ``layer_stats`` reads it, in float32.

    Args:
        n_samples: the number of texts.
    """
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **{
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": count,
            "mom2.mom2": total.float().numpy(),
            "sample_size": n_samples,
        },
    )
    write(path, buffer.getvalue())


def load_moments(path: Path) -> tuple[torch.Tensor, int]:
    """Return what :func:`save_moments`, or EasyEdit, wrote: Σ k kᵀ and the number of keys.

    Raises:
        HorseError: the file is damaged.
    """
    try:
        with np.load(plain_file(path)) as data:
            total, count = torch.from_numpy(data["mom2.mom2"]), int(data["mom2.count"])
        if total.dim() != 2 or len(set(total.shape)) > 1 or count < 1:
            raise ValueError("no moment of at least one key")
        if not all_finite(total):
            raise ValueError("a number is not finite")
        return total, count
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise HorseError(
            f"{path}: damaged statistics ({error}); delete the file, and it is made again."
        ) from None
