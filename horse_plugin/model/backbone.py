"""The language model's own forward pass, cut in two.

Blocks below the lowest edited one (the trunk) never change, so their output is computed once and
the edited blocks (the top) run on it as often as needed. Both halves are the model's own forward
with taps: leave at the first edited block, enter there, and keep only the answer positions in the
last block's MLP and before the output head. No architecture is written out here.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from horse_plugin.data.formats import load_records
from horse_plugin.data.prompts import KINDS, Batch, PreparedEdits, Prompt, ask, batches, prepare
from horse_plugin.data.seam import PLAIN, Seam
from horse_plugin.data.subjects import at_subjects
from horse_plugin.distributed import local_indices
from horse_plugin.errors import UsageError, first_line
from horse_plugin.model.fingerprint import fingerprint
from horse_plugin.model.guard import guard, guarded, hooked, none_packed, with_forward
from horse_plugin.model.loading import load_model, quiet_transformers
from horse_plugin.model.modules import (
    find_blocks,
    find_edit_modules,
    find_last_mlp,
    first_edited_block,
    shape_of,
)
from horse_plugin.model.sharding import Lockstep
from horse_plugin.model.trunk_cache import TrunkCache
from horse_plugin.model.weights import EditWeights
from horse_plugin.progress import Job

T = TypeVar("T")
# The time of a token in a step, over that of one whose trunk state is kept, as measured on a CPU. A
# token of each prompt is written in a pass, and of ordinary text every token goes through the head.
WORK = {"trunk": 2.5, "capture": 3, "statistics": 3.5, "ordinary text": 3, "writing": 100}

# oneDNN keeps what it compiled for the last 1,024 shapes of products. Batches have shapes of their
# own, so that this grows to gigabytes; a few are as quick.
for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, "64")


UNFUSED = 256  # the most tokens of a sequence whose attention runs unfused


class StopForward(Exception):
    """Carries a value out of a forward pass that need not go on."""

    def __init__(self, value):
        self.value = value


class Backbone:
    """A causal language model seen as trunk, edited blocks and head.

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
        modules: name → edit module, from the lowest block to the highest.
        weights: their weights, :class:`horse_plugin.model.weights.EditWeights`.
        device: where token ids go in.
        edit_device: where the hypernetwork works: with the lowest edit module.
        keys_device: where keys and gradients are kept.
        edit_dtype: the precision of everything that decides an edit: float32, or float64 for
            models of that precision.
        blocks: all transformer blocks.
        lockstep: what keeps processes together that share out the trunk.
        job: what passes are steps of, in :meth:`one_job`; None otherwise.
        first_edited: the index of the lowest edited block.
        head: the output head.
        last_mlp: the name of the last block's MLP, which works at answer positions only, or None.

    Raises:
        UsageError: a named module is missing, or none can be found.
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
        self.token, self.seam = token, seam
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self._max_length = batch_tokens, max_length
        self.progress, self.job = progress, None
        self.device = model.get_input_embeddings().weight.device
        self.head = model.get_output_embeddings()
        _, self.blocks = find_blocks(model)
        if any(p.is_inference() for p in model.parameters()):
            raise UsageError(
                f"{type(model).__name__}: loaded in inference mode, so that no weight can be "
                "changed. Load it outside torch.inference_mode."
            )
        self.modules = find_edit_modules(model, inner_params, token)
        self.edit_device = next(iter(self.modules.values())).weight.device
        self.keys_device = torch.device("cpu") if offload_keys else self.edit_device
        self.edit_dtype = torch.promote_types(model.dtype, torch.float32)
        self.weights = EditWeights(self.modules, self.edit_dtype)
        self.first_edited = first_edited_block(model, inner_params, token)
        self.last_mlp = find_last_mlp(model)
        sharded = any(hasattr(t, "to_local") for t in self._trunk_weights())
        self.lockstep = Lockstep(self._through_trunk if sharded else None)
        limits = trunk_cache_gb, trunk_disk_gb, trunk_dir
        self.trunk_cache = TrunkCache(self._trunk_weights, self._probe, *limits)
        self._turn = None
        self._check_halves()

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

    def _few_tokens(self) -> list[int]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return [7919 * i % vocabulary for i in range(1, 12)]

    @torch.no_grad()
    def _through_trunk(self) -> torch.Tensor:
        """Return what the trunk makes of a few tokens."""
        return self._pass_trunk(torch.tensor([self._few_tokens()], device=self.device))

    def _probe(self) -> torch.Tensor:
        """Return what tells another trunk; a sharded one cannot run when one process wants to."""
        return torch.empty(0) if self.lockstep.is_sharded else self._through_trunk()

    @guarded
    @torch.no_grad()
    def _check_halves(self):
        """Compare trunk and top with the model's own forward pass, on a few tokens.

        Where they differ, the last MLP runs at all positions; it may mix tokens.

        Raises:
            UsageError: they differ even so, or the model is not causal.
        """
        ids = self._few_tokens()
        made = [Prompt(tuple(ids), 6), Prompt(tuple(ids[1:]), 4)]
        (batch,) = batches(made, len(ids) * 4, self.device)
        logits = self._forward(batch.ids).logits
        whole = logits[batch.rows, batch.cols]
        if not whole.isfinite().all():
            return  # an edit will name the number
        n = batch.ids.shape[1] // 2
        if not self._agree(self._forward(batch.ids[:, :n]).logits, logits[:, :n]):
            raise UsageError(
                f"{type(self.model).__name__}: what it predicts depends on later tokens, so it "
                "is no causal language model. With is_decoder: true in its config it may be one."
            )
        problem = "their logits are not the model's own"
        for last_mlp in dict.fromkeys((self.last_mlp, None)):
            self.last_mlp = last_mlp
            try:
                states = self.trunk(batch)
                if states.shape[:2] != batch.ids.shape:
                    raise ValueError("the blocks hand on more than a hidden state per token")
                agree = self._agree(self.top(batch, states), whole)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                problem = first_line(error)  # a block has inputs or outputs of its own kind
                continue
            if agree:
                return
        raise UsageError(
            f"{type(self.model).__name__}: HORSE cannot run this architecture's blocks in two "
            f"halves ({problem})."
        )

    def _agree(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Return whether logits are the same but for their rounding."""
        least = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1
        return bool((found - wanted).abs().max() <= least * wanted.abs().max())

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
        seam = Seam(**{f.name: getattr(hparams, f.name) for f in fields(Seam)})
        return cls(model, tokenizer, **settings, seam=seam, progress=progress)

    @property
    def devices(self) -> set[torch.device]:
        """The devices that hold the model's weights."""
        return {p.device for p in self.model.parameters()}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d, d') of each edit module: the widths of its input and of its output."""
        return [shape_of(m) for m in self.modules.values()]

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
        """Refuse tokens that the tokenizer knows and the model does not."""
        n = self.model.get_input_embeddings().weight.shape[0]
        for kind, groups in edits.prompts.items():
            for i, group in enumerate(groups):
                for token in {t for p in group for q in (p, *p.accepted) for t in q.ids if t >= n}:
                    text = self.tokenizer.convert_ids_to_tokens(token)
                    raise UsageError(
                        f"record {i}: {text!r} in its {kind} prompt is token {token}, but the "
                        f"model has {n}. Is this its tokenizer? If you added tokens, call "
                        "model.resize_token_embeddings first."
                    )

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
    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits at the batch's answer positions, n×vocabulary."""
        return self.top(batch, self.trunk(batch))

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
        new = [new[i] for i in local_indices(new)]
        with self.lockstep.loop():
            for batch in self.batches(new, "trunk", progress):
                if self.trunk_cache.full:
                    break
                inputs = [p.inputs for p in batch.prompts]
                rows = zip(inputs, self._run_trunk(batch.ids), strict=True)
                self.trunk_cache.put(inputs, [states[: len(i)] for i, states in rows])

    def _run_trunk(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lockstep.run(lambda: self._pass_trunk(ids))

    def _pass_trunk(self, ids: torch.Tensor) -> torch.Tensor:
        def leave(block, args, kwargs):
            raise StopForward(args[0] if args else kwargs["hidden_states"])

        first = self.blocks[self.first_edited]
        with hooked(first.register_forward_pre_hook, leave, with_kwargs=True):
            return self._stopped(lambda: self._forward(ids))

    @functools.cached_property
    def _blocks_return_tuples(self) -> bool:
        """Whether a block returns a tuple: one token through the first block tells."""

        def leave(block, args, output):
            raise StopForward(isinstance(output, tuple))

        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with hooked(self.blocks[0].register_forward_hook, leave), torch.no_grad():
            return self._stopped(lambda: self._forward(ids))

    def _stopped(self, run: Callable[[], object]):
        """Return what a hook takes out of a forward pass."""
        try:
            run()
        except StopForward as stopped:
            return stopped.value

    def _forward(self, ids: torch.Tensor):
        """Run the model's own forward pass, without what its config would add to the output."""
        with none_packed.in_this_thread():
            return self.model(
                input_ids=ids,
                use_cache=False,
                return_dict=True,
                output_hidden_states=False,
                output_attentions=False,
            )

    @guarded
    def top(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Return the logits at the answer positions, n×vocabulary, from the trunk's states."""

        def enter(block, args, kwargs):
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        def at_answers(x: torch.Tensor) -> torch.Tensor:
            return x[batch.rows.to(x.device), batch.cols.to(x.device)]

        def into_mlp(mlp, args):  # some add the residual themselves
            return tuple(
                at_answers(x)[None] if torch.is_tensor(x) and x.shape[:2] == batch.ids.shape else x
                for x in args
            )

        def out_of_mlp(mlp, args, output):
            whole = output.new_zeros(*batch.ids.shape, output.shape[-1])
            whole[batch.rows.to(output.device), batch.cols.to(output.device)] = output[0]
            return whole

        def into_head(head, args):
            return (at_answers(args[0]),)

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._skipped(self.blocks[: self.first_edited]))
            first = self.blocks[self.first_edited]
            stack.enter_context(hooked(first.register_forward_pre_hook, enter, with_kwargs=True))
            stack.enter_context(hooked(self.head.register_forward_pre_hook, into_head))
            if self.last_mlp:
                mlp = self.model.get_submodule(self.last_mlp)
                stack.enter_context(hooked(mlp.register_forward_pre_hook, into_mlp))
                stack.enter_context(hooked(mlp.register_forward_hook, out_of_mlp))
            if torch.is_grad_enabled():
                stack.enter_context(self.unfused_attention(batch.ids.shape[1]))
            return self._forward(batch.ids).logits

    @guarded
    @torch.no_grad()
    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Return what goes into the head at the answer positions, n×d: small enough to keep."""

        def leave(head, args):  # runs before the hook of ``top`` that selects the positions
            x = args[0]
            raise StopForward(x[batch.rows.to(x.device), batch.cols.to(x.device)])

        with hooked(self.head.register_forward_pre_hook, leave):
            return self._stopped(lambda: self.logits(batch))

    @guarded
    @torch.no_grad()
    def read_out(self, batch: Batch, head_inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits that :meth:`head_inputs` led to, n×vocabulary.

        It is the model's own forward pass with all blocks skipped, since some models scale or cap
        their logits after the head.
        """

        def into_head(head, args):
            return (head_inputs,)

        register = self.head.register_forward_pre_hook
        with self._skipped(self.blocks), hooked(register, into_head):
            return self._forward(batch.ids).logits

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
        longer = tuple(self._few_tokens())
        shorter = longer[-4:]

        def second_logits(prompts) -> torch.Tensor:  # the first token comes from the cache's fill
            options = {"min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
            return self.generate(prompts, 2, **options).logits[1][-1]

        return self._agree(second_logits([longer, shorter]), second_logits([shorter]))

    @contextlib.contextmanager
    def _skipped(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Let blocks pass their input on, for the length of a ``with``."""
        returns_tuple = self._blocks_return_tuples

        def identity(hidden_states, *args, **kwargs):
            return (hidden_states, None) if returns_tuple else hidden_states

        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(with_forward(block, identity))
            yield

    def unfused_attention(self, n_tokens: int = 0) -> contextlib.AbstractContextManager:
        """On a CPU, run attention of short sequences unfused inside a ``with``.

        The fused kernel is slow backwards on some of them. The other one keeps a score for each
        pair of tokens, so that long sequences would take memory by the square of their length.

        Args:
            n_tokens: the length of the sequences.
        """
        if self.device.type == "cpu" and n_tokens <= UNFUSED:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    def key_positions(self, name: str, batch: Batch) -> torch.Tensor:
        """Return the n positions of keys in an edit module's input in ``top``.

        They count the tokens of all rows in sequence, since some models flatten them. The last
        block's MLP gets the answer positions only.

        Raises:
            UsageError: keys are to be read elsewhere in the last block, which no answer feels.
        """
        if not (self.last_mlp and name.startswith(f"{self.last_mlp}.")):
            return batch.key_rows * batch.ids.shape[1] + batch.key_cols
        if any(p.subject is not None for p in batch.prompts):
            raise UsageError(
                f"{name}: in the last block, where no answer reads the subject's token. With "
                "token: subject, inner_params names modules of lower blocks."
            )
        return torch.arange(len(batch.rows), device=batch.rows.device)
