"""Editing: records in, one change of the weights out, and its undoing."""

import math
import platform
import time
from collections.abc import Sequence
from importlib import metadata

import torch

from . import archive
from .backbone import Backbone
from .delta import EditDelta
from .errors import HALF_HINT, HorseError
from .hparams import UNTRAINED, HORSEHyperParams
from .hypernetwork import HyperNetwork
from .loading import quiet_transformers
from .records import EditRecord, load_records
from .trace import Trace, trace


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


@torch.no_grad()
def solve_edit(backbone: Backbone, network: HyperNetwork, traced: Trace, hparams) -> dict:
    """From the trace of an edit to the tensors of its delta (Eq. 4, 6, 2)."""
    residuals = network.residuals(traced.keys, traced.grads, hparams.editor_batch_size)
    tensors = {}
    for name, keys, r, lamda in zip(
        backbone.modules, traced.keys, residuals, network.lamda, strict=True
    ):
        if not r.isfinite().all():
            raise HorseError(f"{name}: its residual is not finite. {HALF_HINT}")
        try:
            tensors |= EditDelta.solve(name, keys, r, lamda)
        except HorseError as error:
            raise HorseError(f"{name}: {error}") from None
    return tensors


class HorseEditor:
    """Edits a model with HORSE; every edit can be taken back, bit for bit.

    Without an archive the hypernetwork is untrained: it edits, but harms more and generalises
    less. Its normaliser and η then come from each edit's own facts.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        hparams: settings; ``archive`` names a trained hypernetwork.

    Raises:
        UsageError: the archive is for another model or other modules.
    """

    def __init__(self, model, tokenizer, hparams: HORSEHyperParams):
        self._start(
            Backbone(model, tokenizer, hparams.inner_params, hparams.trunk_cache_gb), hparams
        )

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
        self.trained = network is not None
        self.network = network if self.trained else new_network(backbone, hparams)
        self._edits: list[tuple[EditDelta, dict]] = []

    @property
    def history(self) -> list[EditDelta]:
        """The edits that are in the model now, oldest first."""
        return [delta for delta, _ in self._edits]

    def weights_before(self) -> dict[str, torch.Tensor]:
        """What the last edit replaced: edit module → its weight before."""
        return self._edits[-1][1]

    def edit(self, records: Sequence[EditRecord]) -> EditDelta:
        """Write all records into the model in one edit.

        Args:
            records: edit records, or anything that :func:`load_records` takes.

        Returns:
            The delta, already applied; ``about["seconds"]`` is what it took.
        """
        records, start = load_records(records), time.perf_counter()
        hp = self.hparams
        prompts = self.backbone.tokenize([r.edit for r in records], hp.max_length)
        traced = trace(self.backbone, prompts, hp.batch_tokens)
        if not self.trained:
            self.network = self._fitted(traced)
        about = {
            "model": self.backbone.fingerprint(),
            "modules": list(self.backbone.modules),
            "network": archive.network_about(self.network),
            "hparams": hp.to_dict(),
            "versions": versions(),
        }
        delta = EditDelta(solve_edit(self.backbone, self.network, traced, hp), records, about)
        self.apply(delta)
        about["seconds"] = time.perf_counter() - start
        return delta

    def _fitted(self, traced: Trace) -> HyperNetwork:
        """An untrained network whose normaliser and η come from the edit at hand."""
        network = new_network(self.backbone, self.hparams)
        network.update_normalizers(traced.keys, traced.grads)
        if not network.calibrated:
            network.calibrate(traced.keys, traced.grads, traced.value_norms, self.hparams.strength)
        if not network.calibrated:
            raise HorseError(
                "the residuals are all zero: too few answer tokens for an untrained network. "
                "Edit more facts at once, or train an archive."
            )
        return network

    def apply(self, delta: EditDelta):
        """Add a delta to the model.

        Raises:
            UsageError: a loaded delta that was made for another model or other modules.
        """
        archive.check_model("delta", delta.about, self.backbone)
        before = self.backbone.add(delta.shifts)
        self._edits.append((delta, {name: w.cpu() for name, w in before.items()}))

    def undo(self) -> EditDelta:
        """Take the last edit back: every weight as it was before, bit for bit.

        Raises:
            HorseError: there is no edit to take back.
        """
        if not self._edits:
            raise HorseError("undo: this editor has made no edit.")
        delta, before = self._edits.pop()
        self.backbone.restore(before)
        return delta

    def save_model(self, folder):
        """Save the model as it is now, with its tokenizer, as a plain Hugging Face folder."""
        with archive.new_folder(folder) as made, quiet_transformers():
            self.backbone.model.save_pretrained(made)
            self.backbone.tokenizer.save_pretrained(made)

    @staticmethod
    def load_delta(folder) -> EditDelta:
        """Read a delta that :meth:`EditDelta.save` wrote; :meth:`apply` puts it into a model."""
        return EditDelta.load(folder)


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("horse_plugin", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
