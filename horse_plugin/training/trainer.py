"""Training the hypernetwork (Eq. 7): edit, look at the losses, move what decided the edit.

One step edits ``n_edits`` records as :class:`horse_plugin.HorseEditor` would (with all of the ridge
term, where an edit takes ``edit_ridge`` of it), measures
the edited model on the edit, the rephrased and the unrelated prompts, and turns the gradient at
the edited weights into one for the network, η and λ, without keeping the model's graph.
"""

import contextlib
import hashlib
import json
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from horse_plugin import distributed as parallel
from horse_plugin.data.prompts import Prompt
from horse_plugin.data.records import EditRecord, load_records
from horse_plugin.editing.editor import HorseEditor, meet, new_network, versions
from horse_plugin.errors import HALF_HINT, HorseError, UsageError
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import trace
from horse_plugin.storage import archive
from horse_plugin.training.objective import KINDS, Objective, backward

# What a resumed run may set anew: how long it goes on, and where it runs.
MAY_CHANGE = frozenset(
    """max_epochs early_stop_patience device model_parallel batch_size trunk_cache_gb trunk_disk_gb
    trunk_dir results_dir archive model_name tokenizer_name""".split()
)

CHECKPOINT = archive.MADE_FOR | {
    "network": archive.NETWORK,
    "step": int,
    "best": (dict, type(None)),
    "history": [dict],
    "data": [str],
}


class HORSETrainer:
    """Trains a hypernetwork and keeps the best one by its validation score.

    Several processes (:mod:`horse_plugin.distributed`) share each step's prompts; the first of them
    writes. To resume, all must be able to read ``out``.

    Args:
        config: the hparams, or a path to their YAML.
        train_set, val_set: EasyEdit data sets, lists of records, or paths.
        out: folder for the archive; ``results_dir/models/HORSE/<model>`` by default.
        backbone: a loaded model; loaded from the hparams by default.
        resume: go on from the checkpoint in ``out``, or begin if there is none.
        progress: show a progress bar.

    Raises:
        UsageError: fewer than ``n_edits`` training records, or none to validate on.
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
    ):
        if not isinstance(config, HORSEHyperParams):
            config = HORSEHyperParams.from_hparams(config)
        self.hparams = config
        self.train_records, self.val_records = load_records(train_set), load_records(val_set)
        if len(self.train_records) < config.n_edits:
            raise UsageError(
                f"n_edits: {config.n_edits} in one step, but only {len(self.train_records)} "
                "training records."
            )
        self.out = Path(out or config.archive_folder)
        self.backbone = backbone or Backbone.load(config)
        self.network = new_network(self.backbone, config)
        self.network.spread_strength.requires_grad_(config.train_spread)
        self.network.lamda.requires_grad_(config.train_lamda)
        steered = [self.network.log_eta, self.network.lamda, self.network.spread_strength]
        blocks = list(self.network.groups.parameters())
        steered = [p for p in steered if p.requires_grad]
        self.rates = config.meta_lr, config.eta_meta_lr
        self.optimizer = torch.optim.Adam(
            [
                {"params": params, "lr": rate}
                for params, rate in zip((blocks, steered), self.rates, strict=True)
            ]
        )
        self.progress = progress and parallel.first()
        self.step, self.best, self.history = 0, None, []
        self._data = [_digest(records) for records in (self.train_records, self.val_records)]
        if resume:
            self._resume()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_records) // self.hparams.n_edits

    @property
    def n_steps(self) -> int:
        steps = self.hparams.max_epochs * self.steps_per_epoch
        return min(steps, self.hparams.max_iters or steps)

    def run(self) -> Path:
        """Train to the end and return the archive's folder.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step at hand is finished and saved first.
        """
        self._keep_trunk_states()
        evaluators = self._evaluators()
        bar = tqdm(
            total=self.n_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not self.progress,
        )
        with bar, self._interruptible() as interrupted:
            while self.step < self.n_steps and not self._stale():
                try:
                    losses = self.train_step(self._batch(self.step))
                except HorseError as error:
                    raise HorseError(f"step {self.step}: {error}") from None
                self.step += 1
                self.history.append({"step": self.step, **losses})
                if self.step % self.hparams.val_interval == 0 or self.step == self.n_steps:
                    self._validate(evaluators)
                bar.update()
                bar.set_postfix(self._live(losses))
                if parallel.total(torch.tensor(len(interrupted))):  # of any process
                    self._leave()
        return self.out

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[list]:
        """Within it, a first Ctrl-C fills the list that it yields, a second one stops at once."""
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

    def _leave(self):
        """Stop between two steps: what was learned can be used, and gone on with."""
        if self.best is None:
            self._save_archive()
        self._save_checkpoint()
        raise KeyboardInterrupt(
            f"stopped after step {self.step} of {self.n_steps}; {self.out} holds an archive, and "
            "--resume goes on."
        )

    def train_step(self, records: Sequence[EditRecord]) -> dict[str, float]:
        """One step of Eq. 7 on the records; returns the mean loss per token of each kind."""
        hp, epoch = self.hparams, self.step // self.steps_per_epoch
        prompts = self._prompts(records, epoch)
        traced = trace(self.backbone, prompts["edit"], hp.batch_tokens)
        meet(self.network, traced, hp)
        objective = Objective(self.backbone, prompts, hp)

        def shifts_to_gradients(shifts):
            with self.backbone.shifted(dict(zip(self.backbone.modules, shifts, strict=True))):
                return objective.gradients()

        self.optimizer.zero_grad()
        if hp.decay_meta_lr:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 - self.step / self.n_steps)
        losses = backward(self.network, traced, shifts_to_gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), hp.max_grad_norm)
        if not norm.isfinite():
            raise HorseError(f"the network's gradient is not finite. {HALF_HINT}")
        self.optimizer.step()
        return losses

    def _prompts(self, records, epoch: int) -> dict[str, list[Prompt]]:
        """One prompt of each kind a record; records with several take turns over the epochs."""
        queries = {"edit": [r.edit for r in records]}
        for kind, of in (
            ("rephrase", lambda r: r.equivalent),
            ("unrelated", lambda r: r.unrelated),
        ):
            queries[kind] = [of(r)[epoch % len(of(r))] for r in records if of(r)]
        limit = self.hparams.max_length
        return {kind: self.backbone.tokenize(queries[kind], limit) for kind in KINDS}

    def _batch(self, step: int) -> list[EditRecord]:
        """The records of one step: a new order every epoch, which depends on the seed alone."""
        epoch, i = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.hparams.seed * 100_003 + epoch)
        order = torch.randperm(len(self.train_records), generator=generator).tolist()
        n = self.hparams.n_edits
        return [self.train_records[j] for j in order[i * n : (i + 1) * n]]

    def _keep_trunk_states(self):
        """Run the trunk over the prompts of this run, in an order that depends on nothing else."""
        records = self.train_records
        if (n := self.hparams.max_iters) and n < self.steps_per_epoch:
            records = [r for step in range(n) for r in self._batch(step)]
        queries = [q for r in records for q in (r.edit, *r.equivalent, *r.unrelated)]
        prompts = self.backbone.tokenize(queries, self.hparams.max_length)
        self.backbone.progress = self.progress
        self.backbone.keep(prompts, self.hparams.batch_tokens)
        self.backbone.progress = False

    def _evaluators(self) -> list[Evaluator]:
        hp = self.hparams
        n = min(hp.val_edits or hp.n_edits, len(self.val_records))
        records = self.val_records[: hp.val_steps or n]
        chunks = [records[i : i + n] for i in range(0, len(records), n)]
        return [Evaluator(self.backbone, c, hp.batch_tokens, hp.max_length) for c in chunks]

    def _validate(self, evaluators):
        """Edit the validation records with the network as it is; keep it if it is the best."""
        figures, scores = [], []
        for evaluator in evaluators:
            editor = HorseEditor.from_backbone(self.backbone, self.hparams, self.network)
            editor.edit(evaluator.records)
            try:
                evaluation = evaluator.evaluate()
            finally:
                editor.undo()
            figures.append(evaluation.summary())
            scores.append(evaluation.score())
        means = {name: _mean([f[name] for f in figures]) for name in figures[0]}
        score = _mean(scores)
        self.history[-1]["validation"] = means | {"score": score}
        if self.best is None or score > self.best["score"]:
            self.best = {"step": self.step, "score": score, **means}
            self._save_archive()
        self._save_checkpoint()  # after the archive that it says is the best

    def _stale(self) -> bool:
        patience = self.hparams.early_stop_patience
        if patience is None or self.best is None:
            return False
        return self.step - self.best["step"] >= patience

    def _live(self, losses: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows beside the steps."""
        shown = {kind: f"{loss:.2f}" for kind, loss in losses.items() if loss is not None}
        return shown | ({"best": f"{self.best['score']:.1f}"} if self.best else {})

    def _about(self) -> dict:
        return {
            "kind": "hypernetwork",
            "model": self.backbone.fingerprint(),
            "modules": list(self.backbone.modules),
            "network": archive.network_about(self.network),
            "hparams": self.hparams.to_dict(),
            "data": self._data,
            "versions": versions(),
            "step": self.step,
            "best": self.best,
            "history": self.history,
        }

    def _save_archive(self):
        self._save(archive.ARCHIVE, archive.network_tensors(self.network))

    def _save_checkpoint(self):
        state = self.optimizer.state_dict()["state"]
        tensors = archive.network_tensors(self.network) | {
            f"optimizer.{i}.{name}": t for i, entry in state.items() for name, t in entry.items()
        }
        self._save(archive.CHECKPOINT, tensors)

    def _save(self, name: str, tensors: dict[str, torch.Tensor]):
        if parallel.first():
            archive.save_tensors(self.out / name, tensors, self._about())

    def _resume(self):
        """Go on where the checkpoint stopped; the data order follows from seed and step."""
        path = self.out / archive.CHECKPOINT
        if not path.exists():
            warnings.warn(f"{path}: no checkpoint; training starts at the beginning", stacklevel=3)
            return
        tensors, about = archive.load_tensors(path)
        archive.check_form(path, about, CHECKPOINT)
        archive.check_model(path, about, self.backbone)
        if about["data"] != self._data:
            raise UsageError(f"{path}: was trained on other records. Give the same files.")
        for key, value in self.hparams.to_dict().items():
            if key not in MAY_CHANGE and about["hparams"].get(key) != value:
                raise UsageError(
                    f"{path}: was trained with {key}: {about['hparams'].get(key)}, and the hparams "
                    f"now say {value}. Give the old value, or train into another folder."
                )
        network = archive.network_of(path, tensors, about["network"])
        try:
            self.network.load_state_dict(network.state_dict())
            state = {}
            for name, t in tensors.items():
                if name.startswith("optimizer."):
                    _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = t
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (RuntimeError, ValueError, LookupError) as error:
            raise HorseError(f"{path}: damaged: {(str(error).splitlines() or ['?'])[0]}") from None
        self.step, self.best, self.history = about["step"], about["best"], about["history"]


def _digest(records: Sequence[EditRecord]) -> str:
    text = json.dumps([r.to_dict() for r in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _mean(values: list[float | None]) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None
