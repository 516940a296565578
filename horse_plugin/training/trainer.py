"""Training the hypernetwork: steps of Eq. 7, validations, the best archive.

A step edits its records (:mod:`horse_plugin.training.schedule`) as
:class:`horse_plugin.HorseEditor` would, but whole: with all of the ridge term and of each residual,
until answers hold to 0.9 (an edit has ``edit_ridge``, ``edit_step`` and ``edit_holds``). It
measures the edited model on the edit, the rephrased and the unrelated prompts, and turns the
gradient at the edited weights into one for the network, η and λ, without keeping the model's graph.
"""

import contextlib
import functools
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from horse_plugin.data.formats import load_records
from horse_plugin.data.prompts import PreparedEdits, Prompt
from horse_plugin.distributed import is_main_process, raise_on_all_ranks, sum_over_ranks
from horse_plugin.editing.archive import ARCHIVE, network_form, network_tensors
from horse_plugin.editing.memory import check_memory
from horse_plugin.editing.solve import Roots, calibrate, new_network
from horse_plugin.editing.sweeps import sweeps
from horse_plugin.errors import HALF_PRECISION_HINT, HorseError, UsageError
from horse_plugin.evaluation.metrics import Evaluation, Evaluator, mean
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory, timed, versions
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.model.guard import guarded
from horse_plugin.model.preserve import Preserve, up_to
from horse_plugin.storage.digest import json_digest
from horse_plugin.storage.files import locked_folder
from horse_plugin.training import checkpoint
from horse_plugin.training.history import flat, save_history
from horse_plugin.training.logs import Log
from horse_plugin.training.objective import TRAINED_ON, Objective
from horse_plugin.training.schedule import Schedule, shuffled
from horse_plugin.training.validation import Validation
from horse_plugin.training.writer import Part, Writer


@dataclass(frozen=True)
class Forecast:
    """What the rest of a training would take, by one step and one validation of it.

    Attributes:
        steps, validations: how many are left.
        seconds: of the whole run, about.
        step_seconds: of one step, the mean of those that are left.
        peak_memory_mb: in MiB, with the trunk states that the run keeps in memory.
    """

    steps: int
    validations: int
    seconds: float
    step_seconds: float
    peak_memory_mb: float


class HORSETrainer:
    """Trains a hypernetwork and keeps the best one by its validation score.

    Several processes (:mod:`horse_plugin.distributed`) share each step's prompts; the main one
    writes. To resume, all must be able to read ``out``.

    Args:
        config: the hparams, or the path of their YAML.
        train_set, val_set: anything that :func:`horse_plugin.load_records` takes, such as
            EasyEdit's data sets or paths.
        out: the folder for the archive; None is ``results_dir/models/HORSE/<model>``.
        backbone: a loaded model; None loads the one that the hparams name.
        resume: whether to go on from the checkpoint in ``out``, or begin if there is none.
        progress: whether to show a progress bar.
        log: a function that gets a flat dict after each step, with its losses in nats and maybe
            the figures of its validation; :mod:`horse_plugin.training.logs` has ready ones.

    Attributes:
        network: the hypernetwork as it is now.
        step: the number of steps done.
        best: the step, score and figures of the best validation so far, or None.
        history: a dict per step, with its losses in nats and maybe its ``validation``.

    Raises:
        UsageError: there are fewer than ``edits_per_step`` training records, or none to validate
            on, or the checkpoint is from another run.
    """

    def __init__(
        self,
        config: HORSEHyperParams | str,
        train_set,
        val_set,
        out=None,
        backbone: Backbone | None = None,
        resume: bool = False,
        progress: bool = True,
        log: Log | None = None,
    ):
        if not isinstance(config, HORSEHyperParams):
            config = HORSEHyperParams.from_hparams(config)
        self.hparams = config
        self.train_records, self.val_records = load_records(train_set), load_records(val_set)
        self.schedule = Schedule(config, len(self.train_records))
        if config.keep_coef and config.preserve == "none":
            raise UsageError(
                "keep_coef: there is no text to keep with preserve: none. Name a text, and set "
                "preserve_rho: 1 for the paper's ridge term."
            )
        self.out = Path(out or config.archive_folder).expanduser()
        self.writer = Writer(self.out)
        self.backbone = backbone or Backbone.load(config)
        self.validation = Validation(self.backbone, config, self.val_records)
        with self.backbone.held():
            self.network = new_network(self.backbone, config)
        self.network.spread_strength.requires_grad_(config.train_spread)
        self.network.lamda.requires_grad_(config.train_lamda)
        scalars = [self.network.log_eta, self.network.lamda, self.network.spread_strength]
        scalars = [p for p in scalars if p.requires_grad]
        blocks = list(self.network.groups.parameters())
        self.rates = config.meta_lr, config.eta_meta_lr
        self.optimizer = torch.optim.Adam(
            [
                {"params": params, "lr": rate}
                for params, rate in zip((blocks, scalars), self.rates, strict=True)
            ]
        )
        self.progress = progress and is_main_process()
        self.log = log if is_main_process() else None
        self.step, self.best, self.history = 0, None, []
        self._data = [
            json_digest([r.to_dict() for r in records], 64)
            for records in (self.train_records, self.val_records)
        ]
        if resume:
            self._resume()

    @property
    def n_steps(self) -> int:
        """The number of steps of the whole run."""
        # A run may shorten itself once it goes (comparison/demo.py).
        return min(len(self.schedule), self.hparams.max_iters or len(self.schedule))

    @guarded
    def run(self) -> Path:
        """Train to the end and return the archive's folder, which is locked meanwhile.

        Raises:
            HorseError: another process writes into the folder, or a number is not finite.
            KeyboardInterrupt: at Ctrl-C, after the present step is finished and saved.
        """
        with locked_folder(self.out):
            self._run()
        return self.out

    @guarded
    def dry_run(self) -> Forecast:
        """Do a step and an edit of a validation, and return what the rest of the run would take.

        Of steps of several sizes it does the largest and the smallest, and those between are taken
        to lie between.

        Nothing is written but the second moments in ``stats_dir``. The network has done these steps
        afterwards, so that the run itself wants another trainer.

        Raises:
            HorseError: a step would take more memory than is allowed, or than is free.
        """
        sizes = [step.size for step in self.schedule.steps[: self.n_steps]]
        most, least, left = sizes[0], min(sizes), sizes[self.step :]  # the first is the largest
        every = self.hparams.val_interval
        validations = -(-self.n_steps // every) - self.step // every
        devices = self.backbone.devices
        with self.backbone.trunk_cache.for_a_while():
            batch = self.batch(0)
            reset_peak_memory()
            some = list(dict.fromkeys(batch.flat(*TRAINED_ON)))
            trunk, _ = timed(
                lambda: self.backbone.cache_trunk_states(some, progress=False), *devices
            )
            metric, _ = timed(lambda: self.roots, *devices)
            largest, _ = timed(lambda: self.train_step(batch), *devices)
            an_edit_more = 0.0
            if least < most:
                few = self.batch(sizes.index(least))
                smallest, _ = timed(lambda: self.train_step(few), *devices)
                an_edit_more = (largest - smallest) / (most - least)
            before, evaluator = timed(lambda: next(self.validation.evaluators()), *devices)
            after, _ = timed(lambda: self._measure_edit(evaluator), *devices)
        of_step, of_run = (sum(len(p.inputs) for p in of) for of in (some, self._to_cache()))
        n_edits = len(self.validation.chunks)
        once = trunk * of_run / of_step + metric + n_edits * before
        states = of_run * self.backbone.model.get_input_embeddings().weight[0].nbytes
        kept = min(states, self.hparams.trunk_cache_gb * 1e9)
        of_steps = [largest - an_edit_more * (most - size) for size in left]
        seconds = once + sum(of_steps) + validations * n_edits * after
        a_step = mean(of_steps) or largest
        return Forecast(len(left), validations, seconds, a_step, peak_memory_mb() + kept / 2**20)

    def _run(self):
        with raise_on_all_ranks():
            if self.history and is_main_process():  # a kill may have come before the CSV
                save_history(self.out, self.history)
        # Their trunk states are read the most often.
        evaluators = list(self.validation.evaluators())
        self.validation.check_memory(evaluators)
        self._cache_trunk_states()
        bar = tqdm(
            total=self.n_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=None if self.progress else True,  # None: where nobody watches, as in a log
        )
        # Leaving the ``with`` waits for the writer, so that the folder is locked until then.
        with bar, self._interruptible() as interrupts, self.writer.at_work():
            while self.step < self.n_steps and not self._is_stale():
                try:
                    losses = self.train_step(self.batch(self.step))
                except HorseError as error:
                    raise HorseError(f"step {self.step}: {error}") from None
                self.step += 1
                self.history.append({"step": self.step, **losses})
                if self.step % self.hparams.val_interval == 0 or self.step == self.n_steps:
                    self._validate(evaluators)
                with raise_on_all_ranks():
                    if self.log:
                        self.log(flat(self.history[-1]))
                bar.update()
                bar.set_postfix(self._shown_beside_steps(losses))
                if sum_over_ranks(torch.tensor(len(interrupts))):  # of any process
                    self._stop()
            self.writer.wait()

    @guarded
    @torch.enable_grad()
    def train_step(self, records) -> dict[str, float | None]:
        """Do one step of Eq. 7 on records, prepared or anything that ``load_records`` takes.

        Returns:
            The mean loss per answer token of each kind of prompts, in nats.

        Raises:
            HorseError: a number is not finite; the message names the record or the module.
        """
        edits = self.backbone.prepare(records, TRAINED_ON)
        edits.check()
        prompts = edits.to_capture(self.hparams.keep_next)
        advice = "Train on fewer facts in a step (edits_per_step)"
        check_memory(self.backbone, prompts, self.hparams, training=True, advice=advice)
        captured = capture(self.backbone, prompts)
        calibrate(self.network, captured, self.hparams, self.roots)
        n = self.hparams.train_sweeps or self.hparams.edit_sweeps
        # Only edits take less.
        hp = replace(self.hparams, edit_sweeps=n, edit_ridge=1.0, edit_holds=None)
        parts = self.backbone, self.network, captured, hp, self.roots
        captures, residuals = [], []
        for each, total in sweeps(*parts):
            captures.append(each)
            residuals = total  # of all sweeps so far
        edits = one_prompt_a_kind(edits, self.schedule.epoch(self.step))
        ordinary = self._ordinary_text(self.step)
        objective = Objective(self.backbone, edits, self.hparams, ordinary, self.roots)
        self.optimizer.zero_grad()
        losses = objective.backward(self.network, captures, residuals)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.hparams.max_grad_norm)
        if not norm.isfinite():
            raise HorseError(f"the network's gradient is not finite. {HALF_PRECISION_HINT}")
        if self.hparams.decay_meta_lr:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 - self.step / self.n_steps)
        self.optimizer.step()
        return losses

    def batch(self, step: int) -> PreparedEdits:
        """Return the records of one step: a new order every epoch, by the seed alone."""
        edits, positions = self._train_edits
        return self.backbone.place_keys(edits[[positions[i] for i in self.schedule.indices(step)]])

    @functools.cached_property
    def preserve(self) -> Preserve | None:
        """What the ridge term preserves: ordinary text and unrelated prompts, maybe nothing."""
        unrelated = self._train_edits[0].flat("unrelated")
        return Preserve.of(self.backbone, self.hparams, unrelated)

    @property
    def _text_digest(self) -> str | None:
        return self.preserve.digest if self.preserve else None

    @functools.cached_property
    @guarded
    def roots(self) -> Roots:
        """W with W Wᵀ = C̄⁻¹ for each edit module, or None for the paper's ridge term."""
        if self.preserve is None:
            return [None] * len(self.backbone.modules)
        return self.preserve.roots(self.backbone, self.hparams.stats_dir)

    def _ordinary_text(self, step: int) -> list[Prompt]:
        """Return the pieces of ordinary text in the loss of one step: others at every step."""
        if not self.hparams.keep_coef:
            return []
        order = shuffled(len(self.preserve.text), self.hparams.seed, step)
        return list(up_to(self.hparams.keep_tokens, [self.preserve.text[i] for i in order]))

    @functools.cached_property
    def _train_edits(self) -> tuple[PreparedEdits, dict[int, int]]:
        """The training records that this run reads, tokenised once, and where each index is."""
        used = self.schedule.used(self.n_steps)
        edits = self.backbone.prepare([self.train_records[i] for i in used], TRAINED_ON)
        for position, error in edits.errors.items():
            raise UsageError(f"training record {used[position]}: {error}")
        return edits, {i: position for position, i in enumerate(used)}

    def _cache_trunk_states(self):
        """Run the trunk over the prompts of this run, in an order that depends on nothing else."""
        self.backbone.cache_trunk_states(self._to_cache(), self.progress)

    def _to_cache(self) -> list[Prompt]:
        edits, _ = self._train_edits
        prompts = [p for i in range(len(edits)) for kind in TRAINED_ON for p in edits.of(kind, i)]
        return prompts + list(self.preserve.text if self.preserve else ())

    def _validate(self, evaluators: list[Evaluator]):
        """Edit the validation records with the network as it is; keep it if it is the best."""
        figures = self.validation.figures(map(self._measure_edit, evaluators))
        self.history[-1]["validation"] = figures
        score = figures["score"]
        if self.best is None and not math.isfinite(score):
            raise HorseError(
                f"step {self.step}: the validation's score is not finite. {HALF_PRECISION_HINT}"
            )
        if self.best is None or score > self.best["score"]:
            self.best = {"step": self.step, **figures}
            # The archive comes before what names it the best.
            self.writer.save(self.history, self._archive, self._checkpoint)
        else:
            self.writer.save(self.history, self._checkpoint)

    def _measure_edit(self, evaluator: Evaluator) -> Evaluation:
        return self.validation.measure(evaluator, self.network, self.preserve, self.roots)

    def _is_stale(self) -> bool:
        patience = self.hparams.early_stop_patience
        if patience is None or self.best is None:
            return False
        return self.step - self.best["step"] >= patience

    def _shown_beside_steps(self, losses: dict[str, float | None]) -> dict[str, str]:
        shown = {kind: f"{loss:.2f}" for kind, loss in losses.items() if loss is not None}
        return shown | ({"best": f"{self.best['score']:.1f}"} if self.best else {})

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[list]:
        """Yield a list that gets an entry at the first Ctrl-C; a second one ends the step.

        What is being written is written to its end all the same.
        """
        received = []
        if threading.current_thread() is not threading.main_thread():
            yield received  # only the main thread may handle signals
            return

        def note(number, frame):
            received.append(number)
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield received
        finally:
            signal.signal(signal.SIGINT, before)

    def _stop(self):
        """Stop between two steps, with an archive to use and a checkpoint to go on from."""
        parts = [self._checkpoint] if self.best else [self._archive, self._checkpoint]
        self.writer.save(self.history, *parts)
        self.writer.wait()
        raise KeyboardInterrupt(
            f"stopped after step {self.step} of {self.n_steps}; {self.out} holds an archive, and "
            "--resume goes on."
        )

    def _archive(self) -> Part:
        return self._part(ARCHIVE, network_tensors(self.network), self.preserve)

    def _checkpoint(self) -> Part:
        return self._part(
            checkpoint.CHECKPOINT, checkpoint.tensors_of(self.network, self.optimizer)
        )

    def _part(
        self, name: str, tensors: dict[str, torch.Tensor], preserve: Preserve | None = None
    ) -> Part:
        """Return a file's name, its tensors as they are now, and their description."""
        tensors = tensors | (preserve.tensors() if preserve else {})
        about = {
            "kind": "hypernetwork",
            "model": self.backbone.fingerprint(),
            "modules": list(self.backbone.modules),
            "network": network_form(self.network),
            "preserve": preserve.about() if preserve else None,
            "hparams": self.hparams.to_dict(),
            "data": self._data,
            "dtype": str(self.backbone.model.dtype),
            "text": self._text_digest,
            "versions": versions(),
            "step": self.step,
            "best": self.best,
            "history": list(self.history),
        }
        return name, {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}, about

    def _resume(self):
        """Go on where the checkpoint stopped; the order of the data follows from seed and step."""
        path = self.out / checkpoint.CHECKPOINT
        if not path.exists():
            warnings.warn(f"{path}: no checkpoint; training starts at the beginning", stacklevel=3)
            return
        tensors, about = checkpoint.read(path, self.backbone, self.hparams, self._data)
        if about.get("text") and about["text"] != self._text_digest:
            raise UsageError(
                f"{path}: was trained with other ordinary text than preserve: "
                f"{self.hparams.preserve} gives here and now. Train into another folder."
            )
        checkpoint.restore(path, tensors, about, self.network, self.optimizer)
        self.step, self.best, self.history = about["step"], about["best"], about["history"]


def one_prompt_a_kind(edits: PreparedEdits, epoch: int) -> PreparedEdits:
    """Return the records with one prompt of each kind; several take turns over the epochs."""
    return PreparedEdits(
        edits.records,
        {
            kind: [(group[epoch % len(group)],) if group else () for group in groups]
            for kind, groups in edits.prompts.items()
        },
    )
