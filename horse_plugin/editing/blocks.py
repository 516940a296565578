"""An edit in blocks: the sums of Eq. 2, gathered block by block, so that no key stays in memory.

The sweeps are those of :mod:`horse_plugin.editing.sweeps`, over the prompts in blocks of
``edit_block``. Eq. 2 needs HᵀH and HᵀR of all facts, which are added up. What lies between two
sweeps, the residuals so far and what holds, is a file a block; so are the sums, from time to time.
An edit that was killed goes on from them, and ends with the same bits.

Eq. 6 is taken block by block, as training takes it step by step.
"""

import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from horse_plugin.data.prompts import Prompt
from horse_plugin.editing.crowding import Crowding
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.in_force import InForce
from horse_plugin.editing.solve import Roots, edit_mus, edit_residuals
from horse_plugin.editing.sweeps import counts_of, is_over
from horse_plugin.errors import HorseError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Capture, Notes, capture
from horse_plugin.storage.files import locked_folder
from horse_plugin.storage.tensors import load_tensors, save_tensors

SECONDS = 60.0  # between two times that the sums are saved, or more:
BUSY = 20  # so many times as long as saving them took
SUMS = "sums.safetensors"
PREFIX = ".unfinished-"  # of the folder of an edit that is not made yet


@dataclass
class Sums:
    """What Eq. 2 needs of all facts, and how far they are written.

    Attributes:
        grams: HᵀH of each edit module, d×d, in float64.
        rights: HᵀR of each edit module, d×d', in float64, before the step.
        counts: as :func:`horse_plugin.editing.sweeps.counts_of` has them.
        step: the share of its residual that a row gets in a sweep, known after the first.
    """

    grams: list[torch.Tensor]
    rights: list[torch.Tensor]
    counts: torch.Tensor
    step: float = 1.0

    @classmethod
    def none(cls, backbone: Backbone, step: float = 1.0) -> "Sums":
        where = {"dtype": torch.float64, "device": backbone.edit_device}
        return cls(
            [torch.zeros(d, d, **where) for d, _ in backbone.shapes],
            [torch.zeros(*shape, **where) for shape in backbone.shapes],
            torch.zeros(3, dtype=torch.float64),
            step,
        )

    def add(self, captured: Capture, residuals: Sequence[torch.Tensor]):
        """Add a block: its keys H, and R, the sum of its residuals so far."""
        for gram, right, h, r in zip(
            self.grams, self.rights, captured.keys, residuals, strict=True
        ):
            h = h.to(r)
            gram += h.T @ h
            right += h.T @ r
        self.counts += counts_of(captured)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"gram.{l}": t for l, t in enumerate(self.grams)}
        named |= {f"right.{l}": t for l, t in enumerate(self.rights)}
        step = torch.tensor(self.step, dtype=torch.float64)
        return named | {"counts": self.counts, "step": step}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], device) -> "Sums":
        """Return the sums that :meth:`tensors` described."""
        n = len(tensors) // 2 - 1  # the others are no sums
        grams, rights = (
            [tensors[f"{part}.{l}"].to(device) for l in range(n)] for part in ("gram", "right")
        )
        return cls(grams, rights, tensors["counts"], tensors["step"].item())


def solve_sums(
    backbone: Backbone,
    network: HyperNetwork,
    sums: Sums,
    hparams: HORSEHyperParams,
    roots: Roots,
    in_force: InForce | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a delta, Eq. 2 from the sums, as :func:`.solve.solve` does from rows.

    Raises:
        HorseError: a system cannot be solved; the message names the module.
    """
    tensors, mus = {}, edit_mus(network, hparams)
    for l, name in enumerate(backbone.modules):
        ridge, right = _ridge_of(l, backbone, sums, mus, roots), sums.step * sums.rights[l]
        if in_force:
            shift = in_force.shifts[l].to(right)
            shift = ridge.shift_of(right - sums.grams[l] @ shift) - in_force.pulled(l, ridge)
        else:
            shift = ridge.shift_of(right)
        tensors[f"{name}.shift"] = shift.to(backbone.edit_dtype)
    return tensors


def _ridge_of(l: int, backbone: Backbone, sums: Sums, mus: torch.Tensor, roots: Roots) -> Ridge:
    n_rows = int(sums.counts[1])
    try:
        return Ridge.of_sum(sums.grams[l], n_rows, mus[l], roots[l])
    except HorseError as error:
        raise HorseError(f"{list(backbone.modules)[l]}: {error}") from None


@torch.no_grad()
def sums_of_blocks(
    backbone: Backbone,
    network: HyperNetwork,
    prompts: Sequence[Prompt],
    hparams: HORSEHyperParams,
    roots: Roots,
    folder: Path,
) -> Sums:
    """Return the sums of the last sweep over the prompts.

    Args:
        prompts: what the edit reads.
        roots: as in :func:`horse_plugin.editing.solve.calibrate`.
        folder: for the files; those of the same edit that was stopped are gone on from.

    Raises:
        HorseError: a number is not finite, or a file is damaged; the message says where.
    """
    size = hparams.edit_block
    blocks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    store = _Store(folder, backbone.edit_device)
    first, done, made, sums = store.load() or (0, 0, None, Sums.none(backbone))
    hidden = None if backbone.progress else True  # None: where nobody watches
    bar = tqdm(total=len(blocks) * hparams.edit_sweeps, unit="block", disable=hidden)
    bar.update(first * len(blocks) + done)
    with bar, backbone.trunk_cache.for_a_while():
        # All of them, so that a run which goes on has the states that one in a piece has.
        backbone.cache_trunk_states(prompts)
        for sweep in range(first, hparams.edit_sweeps):
            bar.set_description_str(f"edit, sweep {sweep + 1}")
            tensors = solve_sums(backbone, network, made, hparams, roots) if made else {}
            with backbone.weights.shifted(EditDelta(tensors, []).lazy_shifts()):
                for i in range(done, len(blocks)):
                    at, earlier, residuals = store.block(i, sweep)
                    captured = capture(backbone, blocks[i], earlier, hparams.edit_holds)
                    if at != sweep:  # else it stopped between the block and the sums
                        if earlier:
                            captured.still |= captured.holds
                        more = edit_residuals(backbone, network, captured, hparams)
                        before = residuals or [0] * len(more)
                        residuals = [r + m for r, m in zip(before, more, strict=True)]
                        store.save_block(i, sweep, earlier, captured, residuals)
                    sums.add(captured, residuals)
                    store.save(sweep, i + 1, made, sums, due=i + 1 == len(blocks))
                    bar.update()
            lacking = made.counts[-1].item() if made and sweep > 1 else math.inf
            if made and is_over(sums.counts.tolist(), lacking, sums.step):
                break
            if sweep == 0:
                mus = edit_mus(network, hparams)
                crowding = Crowding.of(_ridge_of(0, backbone, sums, mus, roots))
                crowding.warn(hparams)
                sums.step = crowding.step(hparams)
            made, sums, done = sums, Sums.none(backbone, sums.step), 0
    return made


class _Store:
    """The files of an edit in blocks."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self._saved, self._took = time.monotonic(), 0.0

    def block(self, i: int, sweep: int) -> tuple[int | None, Notes | None, list[torch.Tensor]]:
        """Return the sweep that a block is at, its notes before this sweep, and its residuals."""
        path = self._path(i)
        if not path.is_file():
            if sweep:
                raise HorseError(
                    f"{path}: is gone, and the edit cannot go on without it. Remove {self.folder}, "
                    "and edit again."
                )
            return None, None, []
        tensors, about = load_tensors(path)
        at, held = about["sweep"], tensors["held" if about["sweep"] == sweep else "holds"]
        followed = tensors["followed"], tensors["allowed"]
        notes = Notes(value_norms=about["value_norms"], holds=held, followed=followed)
        residuals = [tensors[f"residual.{l}"].to(self.device) for l in range(about["modules"])]
        return at, notes if sweep else None, residuals

    def save_block(
        self,
        i: int,
        sweep: int,
        earlier: Notes | None,
        captured: Capture,
        residuals: list[torch.Tensor],
    ):
        """Write what a sweep leaves of a block, and which of it held before."""
        followed, allowed = captured.followed
        held = earlier.holds if earlier else torch.zeros_like(captured.holds)
        tensors = {f"residual.{l}": r for l, r in enumerate(residuals)}
        tensors |= {"held": held, "holds": captured.holds}
        tensors |= {"followed": followed, "allowed": allowed}
        about = {"sweep": sweep, "modules": len(residuals), "value_norms": captured.value_norms}
        save_tensors(self._path(i), tensors, about)

    def _path(self, i: int) -> Path:
        return self.folder / f"block-{i:06d}.safetensors"

    def load(self) -> tuple[int, int, Sums | None, Sums] | None:
        """Return the sweep, how many of its blocks are done, and the sums before it and in it."""
        if not (self.folder / SUMS).is_file():
            return None
        tensors, about = load_tensors(self.folder / SUMS)
        # Where a file's tensor begins in memory changes the last bits of its products.
        tensors = {name: t.clone() for name, t in tensors.items()}
        found = {"made": {}, "sums": {}}
        for name, tensor in tensors.items():
            part, _, name = name.partition(".")
            found[part][name] = tensor
        made = Sums.of(found["made"], self.device) if found["made"] else None
        return about["sweep"], about["done"], made, Sums.of(found["sums"], self.device)

    def save(self, sweep: int, done: int, made: Sums | None, sums: Sums, due: bool):
        """Write the sums, if it is time to."""
        start = time.monotonic()
        if not due and start - self._saved < max(SECONDS, BUSY * self._took):
            return
        parts = {"sums": sums} | ({"made": made} if made else {})
        tensors = {f"{p}.{name}": t for p, s in parts.items() for name, t in s.tensors().items()}
        save_tensors(self.folder / SUMS, tensors, {"sweep": sweep, "done": done})
        self._saved = time.monotonic()
        self._took = self._saved - start


@contextlib.contextmanager
def files_of(folder: Path, digest: str) -> Iterator[Path]:
    """Yield the folder of an edit's files inside ``folder``, and remove it when the edit is made.

    Files of an edit of other facts, weights or settings are removed before.

    Raises:
        HorseError: another process works in the folder.
    """
    mine = folder / f"{PREFIX}{digest}"
    with locked_folder(folder):
        forget_others(folder, mine)
        yield mine
        shutil.rmtree(mine, ignore_errors=True)


def forget_others(folder: Path, mine: Path | None = None):
    """Remove the files of edits in blocks that were stopped, but for those in ``mine``."""
    for other in folder.glob(f"{PREFIX}*"):
        if other != mine:
            warnings.warn(
                f"{other}: a stopped edit of other facts, weights or settings; removed, since this "
                "edit cannot go on from it",
                stacklevel=3,
            )
            shutil.rmtree(other)
