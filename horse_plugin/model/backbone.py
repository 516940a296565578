"""The language model that is edited: its two halves, and how prompts come to them.

Prompts are tokenised, batched and shared out over processes here; the states that the trunk makes
of them are kept, and a bar shows how far they are.
"""

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from horse_plugin import distributed
from horse_plugin.data.batches import Batch, batches
from horse_plugin.data.formats import load_records
from horse_plugin.data.prompts import (
    KINDS,
    PreparedEdits,
    Prompt,
    ask,
    prepare,
    text_prompts,
)
from horse_plugin.data.seam import PLAIN, Seam
from horse_plugin.data.subjects import at_subjects
from horse_plugin.errors import UsageError
from horse_plugin.model.fingerprint import fingerprint
from horse_plugin.model.guard import guard, guarded
from horse_plugin.model.halves import Halves
from horse_plugin.model.loading import load_model, quiet_transformers
from horse_plugin.model.sharding import Lockstep
from horse_plugin.model.trunk_cache import TrunkCache
from horse_plugin.model.weights import EditWeights
from horse_plugin.progress import Job

T = TypeVar("T")
# The time of a token in a step, over that of one whose trunk state is kept, as measured on a CPU. A
# token of each prompt is written in a pass, and of ordinary text every token goes through the head.
WORK = {"trunk": 2.5, "capture": 2.3, "statistics": 3.5, "ordinary text": 3, "writing": 100}

# oneDNN keeps what it compiled for the last 1,024 shapes of products. Batches have shapes of their
# own, so that this grows to gigabytes; a few are as quick.
for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, "64")


def _weakly(method: Callable[..., T]) -> Callable[..., T]:
    """Return a function that calls a method without keeping its owner.

    What an object of gigabytes is in a circle with waits for the garbage collector.
    """
    found = weakref.WeakMethod(method)
    return lambda *args: found()(*args)


class Backbone(Halves):
    """A causal language model and its tokenizer, with what runs prompts through its halves.

    It has the attributes of :class:`horse_plugin.model.halves.Halves`, too.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        inner_params: names of the edit modules, with or without ``.weight``; found when empty.
        batch_tokens: the most padded tokens in one pass of the model.
        max_length: the most tokens of prompt and answer; None is what the model can read.
        trunk_cache_gb, trunk_disk_gb, trunk_dir: room for trunk states, see
            :class:`horse_plugin.model.trunk_cache.TrunkCache`.
        progress: whether to show a bar while prompts run through the model.
        token: where edits read keys, at the answer tokens (``ans``) or where the subject ends
            (``subject``), see :mod:`horse_plugin.data.subjects`.
        offload_keys: whether keys and gradients wait in the host's memory for their module's turn.
        seam: how the model is asked, see :class:`horse_plugin.data.seam.Seam`.

    Attributes:
        weights: those of the edit modules, :class:`horse_plugin.model.weights.EditWeights`.
        keys_device: where keys and gradients are kept.
        edit_dtype: the precision of everything that decides an edit: float32, or float64 for
            models of that precision.
        lockstep: what keeps processes together that share out the trunk.
        job: what passes are steps of, in :meth:`one_job`; None otherwise.

    Raises:
        UsageError: a named module is missing, none can be found, or the model cannot run in halves.
    """

    def __init__(
        self,
        model,
        tokenizer,
        inner_params: Sequence[str] = (),
        batch_tokens: int = 4096,
        max_length: int | None = None,
        trunk_cache_gb: float = 0.0,
        trunk_disk_gb: float = 0.0,
        trunk_dir=None,
        progress: bool = False,
        token: str = "ans",
        offload_keys: bool = False,
        seam: Seam = PLAIN,
    ):
        distributed.initialize()
        super().__init__(model, inner_params, token)
        self.tokenizer, self.token, self.seam = tokenizer, token, seam
        self.batch_tokens, self._max_length = batch_tokens, max_length
        self.progress, self.job = progress, None
        self.keys_device = torch.device("cpu") if offload_keys else self.edit_device
        self.edit_dtype = torch.promote_types(model.dtype, torch.float32)
        self.weights = EditWeights(self.modules, self.edit_dtype)
        sharded = any(hasattr(t, "to_local") for t in self._trunk_weights())
        self.lockstep = Lockstep(_weakly(self._through_trunk) if sharded else None)
        limits = trunk_cache_gb, trunk_disk_gb, trunk_dir
        of_trunk = _weakly(self._trunk_weights), _weakly(self._probe)
        self.trunk_cache = TrunkCache(*of_trunk, *limits)
        self._turn = None
        self.check_halves()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the model for the length of a ``with``, see :mod:`horse_plugin.model.guard`.

        Trunk states are dropped if others changed the trunk in the meantime.
        """
        with guard(self.model) as turn:
            if turn != self._turn:
                self._turn = turn
                self.trunk_cache.check()
            yield

    def _trunk_weights(self) -> list[torch.Tensor]:
        trunk = [self.model.get_input_embeddings(), *self.blocks[: self.first_edited]]
        return [t for module in trunk for t in (*module.parameters(), *module.buffers())]

    @torch.no_grad()
    def _through_trunk(self) -> torch.Tensor:
        """Return what the trunk makes of a few tokens."""
        return self.pass_trunk(torch.tensor([self.few_tokens()], device=self.device))

    def _probe(self) -> torch.Tensor:
        """Return what tells another trunk; a sharded one cannot run when one process wants to."""
        return torch.empty(0) if self.lockstep.is_sharded else self._through_trunk()

    @classmethod
    def load(cls, hparams, progress: bool = False) -> "Backbone":
        """Return the backbone of the model that the hparams name."""
        return cls.of(*load_model(hparams), hparams, progress)

    @classmethod
    def of(cls, model, tokenizer, hparams, progress: bool = False) -> "Backbone":
        """Return the backbone of a loaded model, with the settings of the hparams."""
        names = """inner_params batch_tokens max_length trunk_cache_gb trunk_disk_gb trunk_dir
            token offload_keys""".split()
        settings = {name: getattr(hparams, name) for name in names}
        return cls(model, tokenizer, **settings, seam=Seam.of(hparams), progress=progress)

    @property
    def max_length(self) -> int | None:
        """The most tokens that a prompt may have: the setting, or less if the model reads less."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min((n for n in (self._max_length, limit) if n is not None), default=None)

    def fingerprint(self) -> dict:
        """Return what tells this model from others, :mod:`horse_plugin.model.fingerprint`."""
        return fingerprint(self.model, self.blocks)

    def prepare(
        self, records, kinds: Sequence[str] = tuple(KINDS), warn: bool = True
    ) -> PreparedEdits:
        """Tokenise the prompts of records, or pass on what is prepared already.

        Args:
            records: edit records, or anything that :func:`horse_plugin.load_records` takes.
            kinds: the kinds of prompts that are wanted.
            warn: whether to warn of prompts without a subject, if keys are read there.
        """
        if isinstance(records, PreparedEdits):
            return records
        records = load_records(records)
        edits = prepare(self.tokenizer, records, self.max_length, kinds, self.seam)
        self._check_tokens(edits)
        return self.place_keys(edits, warn)

    def _check_tokens(self, edits: PreparedEdits):
        for kind, groups in edits.prompts.items():
            for i, group in enumerate(groups):
                ids = {t for p in group for q in (p, *p.accepted) for t in q.ids}
                self._check_ids(ids, f"record {i}, {kind} prompt")

    def _check_ids(self, ids: Iterable[int], where: str):
        """Refuse tokens that the tokenizer knows and the model does not."""
        n = self.model.get_input_embeddings().weight.shape[0]
        for token in (t for t in ids if t >= n):
            text = self.tokenizer.convert_ids_to_tokens(token)
            raise UsageError(
                f"{where}: {text!r} is token {token}, but the model has {n}. Is this its "
                "tokenizer? If you added tokens, call model.resize_token_embeddings first."
            )

    def read_text(self, text: str, size: int) -> list[Prompt]:
        """Return ordinary text as prompts of at most ``size`` tokens, of which all count."""
        ids = self.tokenizer(text)["input_ids"]
        self._check_ids(ids, "ordinary text")
        return text_prompts(ids, min(size, self.max_length or size))

    def ask(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt as the model is asked it, up to where the answer begins."""
        return ask(self.tokenizer, self.seam.ask(self.tokenizer, prompt))

    def place_keys(self, edits: PreparedEdits, warn: bool = False) -> PreparedEdits:
        """Return prepared edits with their keys where an edit of just these records reads them.

        Args:
            warn: whether to warn of prompts without a subject.
        """
        if self.token == "subject":
            return at_subjects(self.tokenizer, edits, self.max_length, warn, self.seam)
        return edits

    def batches(
        self, prompts: Sequence[Prompt], task: str, progress: bool | None = None
    ) -> Iterable[Batch]:
        """Yield batches of at most ``batch_tokens`` padded tokens, on the model's device.

        Args:
            task: what the progress bar says.
            progress: whether to show the bar; None is the backbone's own setting.
        """
        made = list(batches(prompts, self.batch_tokens, self.device))
        show = self.progress if progress is None else progress
        if show and self.job:
            return self.step(task, [(batch, batch.ids.numel()) for batch in made])
        hidden = None if show else True  # None: where nobody watches, as in a log file
        return tqdm(made, desc=task, unit="batch", leave=False, disable=hidden)

    @contextlib.contextmanager
    def one_job(self, name: str, tokens: dict[str, int]) -> Iterator[None]:
        """Show the passes in a ``with`` as steps of one job, where their bars would be shown.

        Args:
            tokens: step → an estimate of the tokens that it takes through the model.
        """
        work = {step: n * WORK.get(step, 1) for step, n in tokens.items()}
        with Job(name, work) if self.progress else contextlib.nullcontext() as self.job:
            try:
                yield
            finally:
                self.job = None

    def step(self, name: str, items: Sequence[tuple[T, int]]) -> Iterable[T]:
        """Yield items that are given with their tokens, as a step of the job, if there is one."""
        if self.job is None:
            return [item for item, _ in items]
        return self.job.watch(name, [(item, n * WORK.get(name, 1)) for item, n in items])

    @guarded
    @torch.no_grad()
    def trunk(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states that enter the first edited block, B×L×d.

        Cached states are used, the others computed. Padded positions hold anything.
        """
        states = self.trunk_cache.get([p.inputs for p in batch.prompts])
        missing = [i for i, s in enumerate(states) if s is None]
        if len(missing) == len(states):
            return self._run_trunk(batch.ids)
        if missing:
            rows = torch.tensor(missing).to(batch.ids.device, non_blocking=True)
            computed = self._run_trunk(batch.ids[rows])
            for i, s in zip(missing, computed, strict=True):
                states[i] = s[: len(batch.prompts[i].inputs)]
        return nn.utils.rnn.pad_sequence(states, batch_first=True)

    @guarded
    @torch.no_grad()
    def cache_trunk_states(self, prompts: Sequence[Prompt], progress: bool | None = None):
        """Compute these prompts' trunk states now and keep them, as far as there is room.

        Nothing else fills the cache, so that the last bits of a state follow from the calls of
        this method alone. Of several processes each keeps the states of the prompts that it runs.

        Args:
            progress: as in :meth:`batches`.
        """
        by_inputs = {p.inputs: p for p in prompts}
        new = [by_inputs[inputs] for inputs in self.trunk_cache.missing(list(by_inputs))]
        new = [new[i] for i in distributed.local_indices(new)]
        with self.lockstep.loop():
            for batch in self.batches(new, "trunk", progress):
                if self.trunk_cache.full:
                    break
                inputs = [p.inputs for p in batch.prompts]
                rows = zip(inputs, self._run_trunk(batch.ids), strict=True)
                self.trunk_cache.put(inputs, [states[: len(i)] for i, states in rows])

    def _run_trunk(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lockstep.run(lambda: self.pass_trunk(ids))

    def generate(self, prompts: Sequence[tuple[int, ...]], n_tokens: int, **options):
        """Let the model go on from prompts of any lengths, greedily and side by side.

        Args:
            prompts: their token ids. They are padded on the left, so :attr:`pads_left` must hold
                unless they are of one length. A prompt's own first token pads it, so that what
                looks for repetition meets no token which the prompt has not.
            n_tokens: the most tokens of each continuation.
            options: of transformers' ``generate``, whose result is returned.
        """
        n_before = [max(map(len, prompts)) - len(p) for p in prompts]
        ids = [p[:1] * n + p for n, p in zip(n_before, prompts, strict=True)]
        mask = [(0,) * n + (1,) * len(p) for n, p in zip(n_before, prompts, strict=True)]
        with quiet_transformers():
            return self.model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
                synced_gpus=self.lockstep.is_sharded,
                **options,
            )

    @functools.cached_property
    @torch.no_grad()
    def pads_left(self) -> bool:
        """Whether the model goes on from a prompt beside a longer one as from the prompt alone.

        Recurrent blocks may feel the padding before it.
        """
        longer = tuple(self.few_tokens())
        shorter = longer[-4:]

        def second_logits(prompts) -> torch.Tensor:  # the first token comes from the cache's fill
            options = {"min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
            return self.generate(prompts, 2, **options).logits[1][-1]

        return self.agree(second_logits([longer, shorter]), second_logits([shorter]))
