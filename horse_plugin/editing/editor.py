"""Editing: records in, one change of the weights out, and its undoing."""

import datetime
import itertools
import math
import platform
import time
from collections.abc import Sequence
from importlib import metadata

import torch

from horse_plugin import distributed as parallel
from horse_plugin.data.records import EditRecord, load_records
from horse_plugin.editing.delta import EditDelta
from horse_plugin.errors import HALF_HINT, HorseError, UsageError
from horse_plugin.hparams import UNTRAINED, HORSEHyperParams
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Trace, trace
from horse_plugin.model.loading import quiet_transformers
from horse_plugin.storage import archive
from horse_plugin.storage.digest import matches


def new_network(backbone: Backbone, hparams: HORSEHyperParams) -> HyperNetwork:
    """An untrained hypernetwork for the model: the identity, seeded, with η if ``lr`` gives it."""
    with torch.random.fork_rng():
        torch.manual_seed(hparams.seed)
        network = HyperNetwork(
            backbone.shapes,
            hparams.rank,
            hparams.n_blocks,
            hparams.spread,
            hparams.spread_strength,
            hparams.coefficient,
        )
    if hparams.lr is not None:
        torch.nn.init.constant_(network.log_eta, math.log(hparams.lr))
    return archive.place(network, backbone)


def meet(network: HyperNetwork, traced: Trace, hparams: HORSEHyperParams):
    """Have the network take in the keys and gradients of an edit, and η and λ start from the first.

    η does so unless ``lr`` gives it, λ if ``ridge`` says how.
    """
    if hparams.ridge is not None and not network.seen:
        network.calibrate_ridge(traced.keys, hparams.ridge)
    network.update_normalizers(traced.keys, traced.grads)
    if not network.calibrated:
        rows = hparams.editor_batch_size
        network.calibrate(traced.keys, traced.grads, traced.value_norms, hparams.strength, rows)


@torch.no_grad()
def solve_edit(backbone: Backbone, network: HyperNetwork, traced: Trace, hparams) -> dict:
    """From the trace of an edit to the tensors of its delta (Eq. 4, 6, 2)."""
    residuals = network.residuals(traced.keys, traced.grads, hparams.editor_batch_size)
    with parallel.together():
        for name, r in zip(backbone.modules, residuals, strict=True):
            if (bad := ~r.isfinite().all(-1)).any():
                record = traced.owners[bad.cpu()][0].item()
                raise HorseError(
                    f"record {record}: {name}: its residual is not finite. {HALF_HINT}"
                )
    return solve_shifts(backbone, network, traced, residuals, hparams)


def solve_shifts(
    backbone: Backbone, network: HyperNetwork, traced: Trace, residuals, hparams
) -> dict:
    """Eq. 2 for each edit module: the tensors of a delta from its residuals.

    The ridge term is e^λ times ``edit_ridge``. Residuals trained under a larger one learn to do
    with keys that they share with others, as many do in a large edit, which itself is the better
    for a smaller one.
    """
    tensors = {}
    lamdas = network.lamda + math.log(hparams.edit_ridge)
    for name, keys, r, lamda in zip(backbone.modules, traced.keys, residuals, lamdas, strict=True):
        try:
            solved = EditDelta.solve(name, keys, r, lamda)
        except HorseError as error:
            record = _largest(traced, keys)
            raise HorseError(f"{name}: {error} Record {record} has the largest keys.") from None
        if not all(t.isfinite().all() for t in solved.values()):
            raise HorseError(
                f"{name}: the shift is not finite. {HALF_HINT} "
                f"Record {_largest(traced, r)} has the largest residual."
            )
        tensors |= solved
    return tensors


def _largest(traced: Trace, rows: torch.Tensor) -> int:
    """The record that the row of the greatest norm belongs to."""
    norms = parallel.gather(rows.norm(dim=-1)).nan_to_num(torch.inf)
    return parallel.gather(traced.owners)[norms.argmax().cpu()].item()


class HorseEditor:
    """Edits a model with HORSE; every edit can be taken back, bit for bit.

    The weights are always the original ones plus the edits in :attr:`history`, added in that
    order; undoing an edit, the last or any other, sets them to the original ones plus the rest.

    Without an archive the hypernetwork is untrained: it edits, but harms more and generalises
    less. Its normaliser and η then come from each edit's own facts.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        hparams: settings; ``archive`` names a trained hypernetwork.

    Attributes:
        network: the trained hypernetwork, or None.

    Raises:
        UsageError: the archive is for another model or other modules.
    """

    def __init__(self, model, tokenizer, hparams: HORSEHyperParams):
        self._start(Backbone.of(model, tokenizer, hparams), hparams)

    @classmethod
    def from_hparams(cls, hparams: HORSEHyperParams | str) -> "HorseEditor":
        """Load the model that the hparams (or their YAML) name."""
        if not isinstance(hparams, HORSEHyperParams):
            hparams = HORSEHyperParams.from_hparams(hparams)
        return cls.from_backbone(Backbone.load(hparams), hparams)

    @classmethod
    def from_backbone(cls, backbone: Backbone, hparams, network=None) -> "HorseEditor":
        """Edit through a backbone that is already there, with its cached trunk states."""
        editor = cls.__new__(cls)
        editor._start(backbone, hparams, network)
        return editor

    def _start(self, backbone, hparams, network=None):
        self.backbone, self.hparams = backbone, hparams
        if network is None and hparams.archive not in (None, UNTRAINED):
            network, _ = archive.load_network(hparams.archive, backbone)
        self.network = network
        self._edits: list[EditDelta] = []
        self._left: dict[str, str] = {}  # digests of the weights as this editor left them
        self.original_weights: dict[str, torch.Tensor] = {}

    @property
    def history(self) -> list[EditDelta]:
        """The edits that are in the model now, oldest first."""
        return list(self._edits)

    def edit(self, records: Sequence[EditRecord], name: str | None = None) -> EditDelta:
        """Write all records into the model in one edit.

        Of several processes (:mod:`horse_plugin.distributed`) each must be given the same records,
        and each comes to have the same delta.

        Args:
            records: edit records, or anything that :func:`load_records` takes.
            name: what to call the edit; :meth:`undo` takes it. A number by default.

        Returns:
            The delta, already applied; ``about["seconds"]`` is what it took.

        Raises:
            HorseError: the weights were changed from outside since this editor's last edit; or
                a number that is not finite, naming the module and the record. The model is as it
                was.
        """
        records, start = load_records(records), time.perf_counter()
        hp, weights = self.hparams, self._weights()
        prompts = self.backbone.tokenize([r.edit for r in records], hp.max_length)
        traced = trace(self.backbone, prompts, hp.batch_tokens)
        network = self.network or self._fitted(traced)
        about = {
            "name": name or self._new_name(),
            "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": self.backbone.fingerprint(),
            "modules": list(self.backbone.modules),
            "weights": weights,
            "original": self._edits[0].about["original"] if self._edits else weights,
            "network": archive.network_about(network),
            "hparams": hp.to_dict(),
            "versions": versions(),
        }
        delta = EditDelta(solve_edit(self.backbone, network, traced, hp), records, about)
        self._add(delta)
        about["seconds"] = time.perf_counter() - start
        return delta

    def _new_name(self) -> str:
        names = {d.name for d in self._edits}
        numbers = (f"{i:03d}" for i in itertools.count(len(names) + 1))
        return next(n for n in numbers if n not in names)

    def _fitted(self, traced: Trace) -> HyperNetwork:
        """An untrained network whose normaliser, η and λ come from the edit at hand."""
        network = new_network(self.backbone, self.hparams)
        meet(network, traced, self.hparams)
        if not network.calibrated:
            raise HorseError(
                "the residuals are all zero: too few answer tokens for an untrained network. "
                "Edit more facts at once, or train an archive."
            )
        return network

    def apply(self, delta: EditDelta):
        """Add a delta to the model, such as a loaded one.

        It must have been made on the weights as they are now, or as they were before all edits of
        this editor: several edits of one model can be combined so. A model in another dtype will
        do if its weights round to the very weights that the edit was made on, as those of a bf16
        model do that was loaded in fp32.

        Raises:
            UsageError: a delta that was made for another model, other modules or other weights.
            HorseError: the weights were changed from outside since this editor's last edit.
        """
        self._apply([delta], "weights")

    def apply_chain(self, deltas: Sequence[EditDelta]):
        """Add deltas that were made one on top of the other, all of them or none.

        They must have begun at the weights as they are now; one that is missing was undone.

        Raises:
            UsageError, HorseError: as :meth:`apply`.
        """
        self._apply(deltas, "original")

    def _apply(self, deltas: Sequence[EditDelta], made_on: str):
        now, done = self._weights(), self.history
        known = [now, *(d.about["original"] for d in done[:1])]
        here = [{name: m.weight for name, m in self.backbone.modules.items()}]
        here += [self.original_weights] if done else []
        for delta in deltas:
            archive.check_model(delta.name, delta.about, self.backbone)
            wanted = delta.about[made_on]
            if wanted not in known and not any(_differing(w, wanted) is None for w in here):
                module = _differing(here[0], wanted)
                dtype = str(wanted.get(module)).partition(":")[0]
                raise UsageError(
                    f"{delta.name}: made on other {dtype} weights of {module} than this model "
                    "has. Load the model in that dtype, and apply first what it was made on top of."
                )
            known.append(wanted)
        try:
            for delta in deltas:
                self._add(delta)
        except BaseException:
            if self._edits:
                self._replay(done)
            raise

    @property
    def changed(self) -> str | None:
        """An edit module whose weight others changed since this editor's last edit, if any."""
        return self._changed(self.backbone.digests())

    def _changed(self, now: dict[str, str]) -> str | None:
        return next((m for m in now if self._edits and now[m] != self._left[m]), None)

    def _weights(self) -> dict[str, str]:
        """The digests of the weights now, which must be those that this editor left."""
        now = self.backbone.digests()
        if module := self._changed(now):
            raise HorseError(
                f"{module}: its weight was changed by others since this editor's last edit. "
                "undo(force=True) overwrites the change; a new HorseEditor starts from it."
            )
        return now

    def _add(self, delta: EditDelta):
        before = self.backbone.add(delta.to(self.backbone.edit_device).shifts)
        if not self._edits:
            self.original_weights = {name: w.cpu() for name, w in before.items()}
        self._edits.append(delta)
        self._left = self.backbone.digests()
        delta.about.setdefault("moved", self._moved(before))

    def _moved(self, before: dict[str, torch.Tensor]) -> dict[str, float]:
        """How far each weight is from what it was: ‖W − W before‖/‖W before‖ (Frobenius)."""
        dtype, modules = self.backbone.edit_dtype, self.backbone.modules
        return {
            name: (
                (modules[name].weight.to(dtype) - w.to(dtype)).norm() / w.to(dtype).norm()
            ).item()
            for name, w in before.items()
        }

    def undo(self, which: int | str = -1, force: bool = False) -> EditDelta:
        """Take an edit back: the weights become what the other edits alone make of the original.

        Every bit is as if the others had been applied to the original model in their order, and
        without others as before the first edit.

        Args:
            which: the edit's place in :attr:`history`, or its name; the last by default.
            force: do so even if others changed the weights meanwhile; their change is lost.

        Returns:
            The delta taken back.

        Raises:
            UsageError: there is no such edit.
            HorseError: there is no edit at all, or the weights were changed from outside since
                this editor's last edit.
        """
        if not self._edits:
            raise HorseError("undo: this editor has made no edit.")
        names = [d.name for d in self._edits]
        places = range(len(names))
        if which in names:
            place = len(names) - 1 - names[::-1].index(which)
        elif isinstance(which, int) and -len(names) <= which < len(names):
            place = places[which]
        else:
            raise UsageError(f"undo: no edit {which!r}; there are {', '.join(names)}.")
        if not force:
            self._weights()
        undone = self._edits[place]
        self._replay(self._edits[:place] + self._edits[place + 1 :])
        return undone

    def _replay(self, edits: list[EditDelta]):
        """Set the weights to the original ones plus these edits, or leave them alone."""
        before = {n: m.weight.detach().clone() for n, m in self.backbone.modules.items()}
        self.backbone.restore(self.original_weights)
        try:
            for delta in edits:
                self.backbone.add(delta.to(self.backbone.edit_device).shifts)
        except BaseException:
            self.backbone.restore(before)
            raise
        self._edits, self._left = list(edits), self.backbone.digests()

    def save_model(self, folder):
        """Save the model as it is now, with its tokenizer, as a plain Hugging Face folder."""
        with archive.new_folder(folder) as made, quiet_transformers():
            self.backbone.model.save_pretrained(made)
            self.backbone.tokenizer.save_pretrained(made)

    @staticmethod
    def load_delta(folder) -> EditDelta:
        """Read a delta that :meth:`EditDelta.save` wrote; :meth:`apply` puts it into a model."""
        return EditDelta.load(folder)


def _differing(weights: dict[str, torch.Tensor], digests: dict[str, str]) -> str | None:
    """The first module whose weight, rounded to its digest's dtype, has another digest."""
    return next((m for m, w in weights.items() if not matches(w, digests.get(m))), None)


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("horse_plugin", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
