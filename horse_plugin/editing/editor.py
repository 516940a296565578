"""Editing: records in, one change of the weights out, and its undoing."""

import collections
import contextlib
import datetime
import functools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from horse_plugin.data.corpus import shipped_pieces
from horse_plugin.data.prompts import PreparedEdits, Prompt
from horse_plugin.data.records import EditRecord
from horse_plugin.distributed import is_main_process
from horse_plugin.editing.applied import AppliedEdits
from horse_plugin.editing.archive import as_trained, load_network, network_form
from horse_plugin.editing.blocks import files_of, forget_others, solve_sums, sums_of_blocks
from horse_plugin.editing.budget import Budget, smallest_ridge
from horse_plugin.editing.crowding import Crowding
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.in_force import InForce
from horse_plugin.editing.memory import check_blocks, check_edit_memory, check_memory
from horse_plugin.editing.solve import (
    Roots,
    calibrate,
    edit_mus,
    new_network,
    predicted_cost,
    ridge_of,
    solve,
)
from horse_plugin.editing.sweeps import sweeps
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation.drift import OrdinaryText, Pieces
from horse_plugin.evaluation.generation import answers
from horse_plugin.evaluation.metrics import mean, predict
from horse_plugin.evaluation.results import versions
from horse_plugin.hparams import (
    CHANGE_NO_FIGURE,
    OF_TRAINING,
    UNTRAINED,
    WHERE_IT_RUNS,
    HORSEHyperParams,
)
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Capture, capture
from horse_plugin.model.guard import guarded
from horse_plugin.model.loading import quiet_transformers
from horse_plugin.model.preserve import Preserve
from horse_plugin.storage.digest import json_digest, tensors_digest
from horse_plugin.storage.files import new_folder

# Settings by which facts become prompts.
WRITTEN_BY = "token", "chat_template", "system_prompt", "append_eos", "separator"
# Settings that an edit in blocks may go on with when they have changed: its sums know none of them.
NOT_OF_SUMS = (*CHANGE_NO_FIGURE, *OF_TRAINING, *WHERE_IT_RUNS, "max_drift", "batch_tokens")
# From settings, the metric and the edits in force to the tensors of an edit.
SolveWith = Callable[[HORSEHyperParams, Roots, InForce | None], dict[str, torch.Tensor]]
# From a share of e^λ to them.
SolveAt = Callable[[float], dict[str, torch.Tensor]]


class HorseEditor(AppliedEdits):
    """Edits a model with HORSE; every edit can be taken back, bit for bit.

    Without an archive the hypernetwork is untrained: such an edit harms the model more and
    generalises less. The normaliser and η are then set by the facts of each edit.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        hparams: the settings; ``archive`` names the folder of a trained hypernetwork.

    Attributes:
        backbone: the model as :class:`horse_plugin.Backbone`.
        network: the trained hypernetwork, or None.

    Raises:
        UsageError: the archive is for another model or other modules.
    """

    def __init__(self, model, tokenizer, hparams: HORSEHyperParams):
        self._start(Backbone.of(model, tokenizer, hparams), hparams)

    @classmethod
    def from_hparams(cls, hparams: HORSEHyperParams | str, progress: bool = False) -> "HorseEditor":
        """Return an editor of the model that the hparams, or their YAML, name.

        Args:
            progress: whether to show bars while prompts run through the model.
        """
        if not isinstance(hparams, HORSEHyperParams):
            hparams = HORSEHyperParams.from_hparams(hparams)
        return cls.from_backbone(Backbone.load(hparams, progress), hparams)

    @classmethod
    def from_backbone(
        cls, backbone: Backbone, hparams, network=None, preserve=None, roots=None
    ) -> "HorseEditor":
        """Return an editor that uses a backbone with its cached trunk states and its limits.

        Args:
            network: a trained hypernetwork; None is the one in ``hparams.archive``, if any.
            preserve: what edits preserve; None is what the hparams say.
            roots: the metric of ``preserve``, if it is known already.
        """
        editor = cls.__new__(cls)
        editor._start(backbone, hparams, network, preserve, roots)
        return editor

    def _start(self, backbone, hparams, network=None, preserve=None, roots=None):
        self._metric = None
        if network is None and hparams.archive not in (None, UNTRAINED):
            with backbone.held():
                network, preserve, about = load_network(hparams.archive, backbone)
            hparams = as_trained(hparams, about)
        self.use(backbone, hparams, network, preserve, roots)

    def use(self, backbone: Backbone, hparams, network=None, preserve=None, roots=None):
        """Go on with other settings or another network, on top of the edits in force.

        Args:
            backbone: one of the same model.
            network, preserve, roots: as in :meth:`from_backbone`, but None is an untrained network.
        """
        settings = "preserve preserve_tokens preserve_mix preserve_rho seed".split()
        metric = preserve, *(getattr(hparams, name) for name in settings)
        if roots is None and metric == self._metric:
            roots = self._roots
        self.__dict__.pop("_choosing_text", None)  # it reads through the backbone
        self.backbone, self.hparams, self.network = backbone, hparams, network
        if network:
            network.tf32 = hparams.network_tf32
        self._metric, self._preserve, self._roots = metric, preserve, roots

    def facts_to_write_anew(self) -> list[EditRecord]:
        """Return :attr:`facts_in_force`, for an edit that writes them anew.

        Raises:
            UsageError: there is none, or ``keep_edits`` is off.
        """
        if not self.hparams.keep_edits:
            raise UsageError("keep_edits: with it off, facts in force are not written anew.")
        if not (facts := self.facts_in_force):
            raise UsageError("edit: no fact is in force that could be written anew.")
        return facts

    @guarded
    def capture(self, records) -> Capture:
        """Return the keys and gradients of an edit of these records.

        With ``keep_edits`` they are followed by those of the edits in force, and all of them are
        read in the unedited model; without, in the model as it is now.

        Raises:
            HorseError: the edit would take more memory than ``edit_memory_gb``, or than is free.
        """
        return self._read(self.to_capture(self.backbone.prepare(records, kinds=["edit"])))

    @guarded
    def capture_at_once(self, prompts: Sequence[Prompt]) -> Capture | None:
        """Return :meth:`capture`'s, or None if an edit that reads these prompts is one in blocks.

        Args:
            prompts: what :meth:`to_capture` returned.
        """
        return self._read(prompts) if len(prompts) <= self.hparams.edit_block else None

    def _read(self, prompts: Sequence[Prompt]) -> Capture:
        self._check_memory(prompts)
        return self._read_below(prompts)

    def _read_below(self, prompts: Sequence[Prompt]) -> Capture:
        with self._below():
            return capture(self.backbone, prompts, holds_from=self.hparams.edit_holds)

    def _check_memory(self, prompts: Sequence[Prompt]):
        check_memory(self.backbone, prompts, self.hparams, on_top=self._is_on_top)

    @property
    def _is_on_top(self) -> bool:
        """Whether an edit is one of all facts, with those in force."""
        return self.hparams.keep_edits and bool(self.history)

    def _below(self) -> contextlib.AbstractContextManager:
        """Have the model as an edit begins from it for the length of a ``with``."""
        return self.unedited() if self._is_on_top else contextlib.nullcontext()

    def to_capture(self, edits: PreparedEdits) -> list[Prompt]:
        """Return the prompts that an edit of these records reads.

        Raises:
            UsageError: a record cannot be written, or several processes would edit in blocks.
        """
        edits.check()
        replaced = {record.asks for record in edits.records}
        kept = [r for r in self.facts_in_force if r.asks not in replaced]
        if self._is_on_top and kept:
            earlier = self.backbone.prepare(kept, ["edit"], warn=False)
            for error in earlier.errors.values():
                raise UsageError(f"a fact in force cannot be written again: {error}")
            edits = self.backbone.place_keys(edits.on_top_of(earlier))
        prompts = edits.to_capture(self.hparams.keep_next)
        check_blocks(prompts, self.hparams)
        return prompts

    @guarded
    def edit(
        self,
        records,
        name: str | None = None,
        captured: Capture | None = None,
        unfinished: Path | None = None,
    ) -> EditDelta:
        """Write all records into the model in one edit.

        Of several processes (:mod:`horse_plugin.distributed`) each must be given the same records,
        and each gets the same delta.

        Args:
            records: prepared edits, edit records, or anything that
                :func:`horse_plugin.load_records` takes. None writes the facts in force anew, which
                may have fallen when an edit was undone that theirs was made on top of.
            name: the name of the edit, which :meth:`undo` takes; None is a number.
            captured: what :meth:`capture` returned for these records on the model as it is now;
                None captures it.
            unfinished: a folder for the files of an edit in blocks
                (:mod:`horse_plugin.editing.blocks`), which are gone when it is made. The same edit
                goes on from them after a stop. None is a temporary folder.

        Returns:
            The delta, already applied; ``about["seconds"]`` is the time it took, with the capture.

        Raises:
            UsageError: a record's prompt cannot be tokenised, ``captured`` is of other records, or
                there is neither a record nor, with ``keep_edits``, a fact in force.
            HorseError: no ridge term keeps to ``max_drift``, memory is too small, the weights were
                changed from outside since this editor's last edit, or a number is not finite; the
                message names the module and the record. The model is as it was.
        """
        start = time.perf_counter() - (captured.seconds if captured else 0.0)
        if records is None:
            edits = PreparedEdits.of_none()
        else:
            edits = self.backbone.prepare(records, kinds=["edit"])
            if not edits.records:
                raise UsageError("edit: no record to edit.")
        asked = edits.records or self.facts_to_write_anew()
        hp, weights = self.hparams, self.current_digests()
        prompts = self.to_capture(edits)
        if captured and captured.prompts != prompts:
            raise UsageError("captured: belongs to other records than those to edit.")
        anew = {(r.prompt, r.target_new) for r in self.facts_in_force}
        asks_more = any((r.prompt, r.target_new) not in anew for r in asked)
        self._warn_of_other_settings()
        with contextlib.ExitStack() as files:  # of an edit in blocks, until it is made
            if captured is None and len(prompts) > hp.edit_block:
                folder = unfinished or files.enter_context(tempfile.TemporaryDirectory())
                network, solve_with = self._sweep_blocks(prompts, weights, Path(folder), files)
            else:
                if unfinished:
                    forget_others(Path(unfinished))
                network, solve_with = self._sweep(prompts, captured)
            in_force = None
            if self._is_on_top:
                mus = edit_mus(network, hp) if edits.records else None
                in_force = InForce(self.shifts_in_force(), mus)

            def solve_at(share: float) -> dict[str, torch.Tensor]:
                return solve_with(replace(hp, edit_ridge=share), self.roots, in_force)

            tensors, budget = self._within_budget(solve_at, in_force, asked)
            about = self._described(name, weights, network, budget)
            delta = EditDelta(tensors, edits.records, about)
            with self.all_or_nothing() as before:
                self.put_on(delta, before)
                if asks_more and not any(share > 0 for share in about["moved"].values()):
                    raise HorseError(
                        "the edit moved no weight: its shifts are smaller than the weights' "
                        "precision. Load the model in fp32, or allow a larger edit (strength, "
                        "edit_ridge, max_drift)."
                    )
        about["seconds"] = time.perf_counter() - start
        return delta

    def _described(
        self,
        name: str | None,
        weights: dict[str, str],
        network: HyperNetwork,
        budget: Budget | None,
    ) -> dict:
        """Return ``about`` of an edit that is about to be made on weights of these digests."""
        edits = self.history
        return {
            "name": name or self.new_name(),
            "onto": [d.name for d in edits],
            "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": self.backbone.fingerprint(),
            "modules": list(self.backbone.modules),
            "weights": weights,
            "original": edits[0].about["original"] if edits else weights,
            "network": network_form(network),
            "hparams": self.hparams.to_dict(),
            "budget": budget.to_dict() if budget else None,
            "versions": versions(),
        }

    def _warn_of_other_settings(self):
        """Warn where facts in force were written as other prompts than they are now."""
        for key in WRITTEN_BY if self._is_on_top else ():
            now = getattr(self.hparams, key)
            before = {d.name: d.about.get("hparams", {}).get(key, now) for d in self.history}
            if others := [name for name, value in before.items() if value != now]:
                warnings.warn(
                    f"{key}: {', '.join(others)} had another than {now!r}, with which this edit "
                    "writes their facts again",
                    stacklevel=3,
                )

    def _sweep(
        self, prompts: Sequence[Prompt], captured: Capture | None
    ) -> tuple[HyperNetwork, SolveWith]:
        """Gather the residuals of an edit; return what solves Eq. 2 for it."""
        with self.backbone.trunk_cache.for_a_while():
            if captured is None:
                self._check_memory(prompts)
                if self.hparams.edit_sweeps > 1:  # each reads the same states
                    self.backbone.cache_trunk_states(prompts, progress=False)
                captured = self._read_below(prompts)
            network = self.network or self.untrained_network(captured)
            mus = edit_mus(network, self.hparams)
            crowding = Crowding.of(ridge_of(0, self.backbone, captured, mus, self.roots))
            crowding.warn(self.hparams)
            parts = self.backbone, network, captured, self.hparams, self.roots
            made = sweeps(*parts, crowding.step(self.hparams))
            del captured, parts  # gigabytes, and each sweep makes its own
            with self._below():
                # The last one; the others are not kept.
                ((captured, residuals),) = collections.deque(made, maxlen=1)
        return network, functools.partial(solve, self.backbone, network, captured, residuals)

    def _sweep_blocks(
        self,
        prompts: Sequence[Prompt],
        weights: dict[str, str],
        folder: Path,
        files: contextlib.ExitStack,
    ) -> tuple[HyperNetwork, SolveWith]:
        """Do what :meth:`_sweep` does, block by block.

        Args:
            weights: their digests.
            folder: for the files, which are gone when ``files`` is closed.
        """
        backbone, hp, roots = self.backbone, self.hparams, self.roots
        block = prompts[: hp.edit_block]
        check_edit_memory(backbone, prompts, hp, on_top=self._is_on_top)
        network = self.network or self.untrained_network(self._read_below(block))
        about = [[[p.ids, p.start, p.subject, p.still] for p in prompts]]
        about += [{k: v for k, v in hp.to_dict().items() if k not in NOT_OF_SUMS}]
        about += [weights, tensors_digest(network.state_dict(), {})]
        about += [self._preserve.digest if self._preserve else None]  # which the metric is made of
        mine = files.enter_context(files_of(folder, json_digest(about)))
        with self._below():
            sums = sums_of_blocks(backbone, network, prompts, hp, roots, mine)
        return network, functools.partial(solve_sums, backbone, network, sums)

    def _within_budget(
        self, solve_at: SolveAt, in_force: InForce | None, asked: Sequence[EditRecord]
    ) -> tuple[dict[str, torch.Tensor], Budget | None]:
        """Return the tensors of an edit (Eq. 2), under a larger ridge term if the budget asks."""
        hp = self.hparams
        if hp.max_drift is None:
            return solve_at(hp.edit_ridge), None
        edits = self.backbone.prepare(asked, ["edit"], warn=False)

        def predicted(tensors) -> float:
            return predicted_cost(self.backbone, tensors, self.roots, in_force)

        def with_them(tensors, measure):
            with self.backbone.weights.shifted(EditDelta(tensors, []).lazy_shifts()):
                return measure()

        def efficacy() -> float:
            found = predict(self.backbone, edits.flat("edit")).items()
            shares = ((t == torch.tensor(p.answer)).double().mean() for p, t in found)
            return 100 * mean(share.item() for share in shares)

        tensors, budget = smallest_ridge(
            solve_at,
            predicted,
            lambda tensors: with_them(tensors, self._choosing_text.measure).drift,
            hp.edit_ridge,
            hp.max_drift,
        )
        if budget.edit_ridge > hp.edit_ridge:
            budget.efficacy = with_them(tensors, efficacy)
            budget.efficacy_without = with_them(solve_at(hp.edit_ridge), efficacy)
            warnings.warn(budget.sentence(), stacklevel=5)
        return tensors, budget

    @functools.cached_property
    def _choosing_text(self) -> OrdinaryText:
        """Ordinary text by which a budget is kept: none that the metric or a figure is made of."""
        return self.ordinary_text(shipped_pieces("choose"))

    @guarded
    def ordinary_text(self, pieces: Pieces) -> OrdinaryText:
        """Return ordinary text whose drift is that from the unedited model.

        Args:
            pieces: (kind, text) of each piece.
        """
        with self.unedited():
            return OrdinaryText(self.backbone, pieces)

    @property
    @guarded
    def roots(self) -> Roots:
        """The metric of the ridge term, W with W Wᵀ = C̄⁻¹ for each edit module; None for I.

        It is that of the unedited model, whatever edits are in force.
        """
        if self._roots is None and self.hparams.preserve == "none":
            self._roots = [None] * len(self.backbone.modules)
        elif self._roots is None:
            with self.unedited():
                self._preserve = self._preserve or Preserve.of(self.backbone, self.hparams)
                self._roots = self._preserve.roots(self.backbone, self.hparams.stats_dir)
        return self._roots

    @guarded
    def unread(self) -> int:
        """Return how many tokens of text :attr:`roots` would read first; of known moments none."""
        hp = self.hparams
        if self._roots is not None or hp.preserve == "none":
            return 0
        if self._preserve is None and hp.preserve == "model":  # which writes its text first
            return hp.preserve_tokens
        with self.unedited():
            self._preserve = self._preserve or Preserve.of(self.backbone, hp)
            return self._preserve.unread(self.backbone, hp.stats_dir)

    @guarded
    def untrained_network(self, captured: Capture) -> HyperNetwork:
        """Return an untrained network whose normaliser, η and λ are set by this edit.

        Raises:
            HorseError: the edit has too few answer tokens for that.
        """
        network = new_network(self.backbone, self.hparams)
        calibrate(network, captured, self.hparams, self.roots)
        if not network.has_eta:
            raise HorseError(
                "the residuals are all zero: too few answer tokens for an untrained network. "
                "Edit more facts at once, or train an archive."
            )
        return network

    @guarded
    def ask(
        self, prompts: str | Sequence[str], n_tokens: int = 50, before: bool = False, streamer=None
    ) -> list[str]:
        """Return what the model writes after each prompt, greedily.

        Args:
            prompts: one text or several; with ``chat_template`` each is a user's turn.
            n_tokens: the most tokens of each answer.
            before: whether to ask the model as it was before the edits in force.
            streamer: of transformers, which gets the tokens as they are written; for one prompt.

        Raises:
            UsageError: a prompt is empty, or leaves no room for an answer.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        with self.unedited() if before else contextlib.nullcontext():
            return answers(self.backbone, prompts, n_tokens, streamer)

    @guarded
    def save_model(self, folder):
        """Save the model as it is now, with its tokenizer, as a plain Hugging Face folder.

        No file of it names code of its own, unless such code made the model or the tokenizer. Of
        several processes, only the main one saves.

        Raises:
            UsageError: an adapter is attached to the model, or its trunk is sharded.
        """
        if any(hasattr(module, "base_layer") for module in self.backbone.model.modules()):
            raise UsageError(
                f"{folder}: an adapter is attached to the model, and transformers would save it "
                "without the edit. Merge it before editing (merge_and_unload), or export the edit "
                "as an adapter of its own (horse export --lora)."
            )
        if self.backbone.lockstep.is_sharded:
            raise UsageError(
                f"{folder}: no process has the whole model. Save it in one process, with "
                "shard_trunk: false and the edit put on (horse edit --out, then horse export)."
            )
        if not is_main_process():
            return
        with new_folder(folder) as made, quiet_transformers():
            for part, files in (
                (self.backbone.model, "*config.json"),
                (self.backbone.tokenizer, "tokenizer_config.json"),
            ):
                part.save_pretrained(made)
                if not type(part).__module__.startswith("transformers_modules"):
                    _name_no_code(made.glob(files))


def _name_no_code(files: Iterable[Path]):
    """Take ``auto_map`` out of JSON files, which names code to load with them."""
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("auto_map", None):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
