"""The language model: its edit modules, and its own forward pass cut in two.

Blocks below the lowest edited one (the trunk) never change, so their output is computed once and
the edited blocks (the top) run on it as often as needed. Both halves are the model's own forward
with taps: leave at the first edited block, enter there, and keep only the answer positions in the
last block's MLP and before the output head. No architecture is written out here.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from horse_plugin import distributed as parallel
from horse_plugin.data.prompts import Batch, Prompt, batches, tokenize
from horse_plugin.data.records import Query
from horse_plugin.errors import HALF_HINT, HorseError
from horse_plugin.model.loading import load_model
from horse_plugin.model.modules import (
    block_index,
    find_blocks,
    find_edit_modules,
    last_mlp,
    shape_of,
)
from horse_plugin.model.trunk_cache import TrunkStore
from horse_plugin.storage.digest import digest

# oneDNN keeps what it compiled for the last 1,024 shapes of products. Batches have shapes of their
# own, so that this grows to gigabytes; a few are as quick.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")


class _TrunkDone(Exception):
    """Carries the hidden states out of a forward pass at the first edited block."""

    def __init__(self, states):
        self.states = states


class Backbone:
    """A causal language model seen as trunk, edited blocks and head.

    Args:
        model: a Hugging Face causal language model; put into eval mode, gradients off.
        tokenizer: its tokenizer.
        inner_params: names of the edit modules, with or without ``.weight``; found when empty.
        trunk_cache_gb, trunk_disk_gb, trunk_dir: room for trunk states kept from one call to the
            next; see :class:`horse_plugin.model.trunk_cache.TrunkStore`.

    Attributes:
        modules: name → edit module, from the lowest block to the highest.
        device: where token ids go in.
        progress: show a bar while prompts run through; off by default.

    Raises:
        UsageError: a named module is missing, or none can be found.
    """

    def __init__(
        self,
        model,
        tokenizer,
        inner_params: Sequence[str] = (),
        trunk_cache_gb: float = 0.0,
        trunk_disk_gb: float = 0.0,
        trunk_dir=None,
    ):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.device = model.get_input_embeddings().weight.device
        self._head = model.get_output_embeddings()
        prefix, self._blocks = find_blocks(model)
        self.modules = find_edit_modules(model, inner_params)
        self._first = min(block_index(n, prefix) for n in self.modules)
        self._last_mlp = last_mlp(model)
        self.progress = False
        trunk = [model.get_input_embeddings(), *self._blocks[: self._first]]
        weights = [p for module in trunk for p in module.parameters()]
        self.states = TrunkStore(weights, trunk_cache_gb, trunk_disk_gb, trunk_dir)
        self._tuple_output = False  # whether blocks return a tuple; the first trunk run tells

    @classmethod
    def load(cls, hparams) -> "Backbone":
        """The backbone of the model that the hparams name."""
        return cls.of(*load_model(hparams), hparams)

    @classmethod
    def of(cls, model, tokenizer, hparams) -> "Backbone":
        """The backbone of a loaded model, with the settings of the hparams."""
        hp = hparams
        room = hp.trunk_cache_gb, hp.trunk_disk_gb, hp.trunk_dir
        return cls(model, tokenizer, hp.inner_params, *room)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d, d') of each edit module: width of its input and of its output."""
        return [shape_of(m) for m in self.modules.values()]

    @property
    def edit_device(self) -> torch.device:
        """Where keys, gradients and the hypernetwork live: with the lowest edit module."""
        return next(iter(self.modules.values())).weight.device

    @property
    def edit_dtype(self) -> torch.dtype:
        """The precision of everything that decides an edit: float32, or float64 for such models."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def n_weights(self) -> dict[str, int]:
        """Matrix entries of the trunk's blocks, of those from the first edited one on (``top``) and
        of those over it (``above``), both without the last block's MLP (``last``), and of the head:
        those two work at answer positions only."""
        sizes = [_entries(b) for b in self._blocks]
        last = _entries(self.model.get_submodule(self._last_mlp)) if self._last_mlp else 0
        sizes[-1] -= last
        first = self._first
        return {
            "trunk": sum(sizes[:first]),
            "top": sum(sizes[first:]),
            "above": sum(sizes[first + 1 :]),
            "last": last,
            "head": self._head.weight.numel(),
        }

    def fingerprint(self) -> dict:
        """What tells this model from others: names, sizes, and norms of a few embedding rows.

        Edits leave it alone, and so does loading the same weights in another dtype.
        """
        rows = self.model.get_input_embeddings().weight
        step = max(1, len(rows) // 16)
        return {
            "name": Path(str(self.model.config.name_or_path)).name,
            "architecture": type(self.model).__name__,
            "n_blocks": len(self._blocks),
            "hidden_size": rows.shape[1],
            "vocab_size": len(rows),
            "embedding_norms": rows[::step][:16].detach().float().norm(dim=-1).tolist(),
        }

    def tokenize(self, queries: Sequence[Query], max_length: int | None = None) -> list[Prompt]:
        """Queries as prompts, no longer than ``max_length`` and what the model can read."""
        return tokenize(self.tokenizer, queries, self.limit(max_length))

    def limit(self, max_length: int | None = None) -> int | None:
        """The most tokens that a prompt may have: ``max_length``, or what the model can read."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min((n for n in (max_length, limit) if n is not None), default=None)

    def batches(self, prompts: Sequence[Prompt], max_tokens: int, doing: str) -> Iterable[Batch]:
        """Batches on the model's device, with a progress bar where ``progress`` is set."""
        made = list(batches(prompts, max_tokens, self.device))
        return tqdm(made, desc=doing, unit="batch", leave=False, disable=not self.progress)

    def logits(self, batch: Batch) -> torch.Tensor:
        """n×vocabulary logits at the batch's answer positions."""
        return self.top(batch, self.trunk(batch))

    @torch.no_grad()
    def trunk(self, batch: Batch) -> torch.Tensor:
        """B×L×d hidden states entering the first edited block; padded positions hold anything.

        States that :meth:`keep` kept are taken from there, the others computed.
        """
        kept = self.states.get([p.inputs for p in batch.prompts])
        missing = [i for i, states in enumerate(kept) if states is None]
        if len(missing) == len(kept):
            return self._run_trunk(batch.ids)
        if missing:
            computed = self._run_trunk(batch.ids[missing])
            for i, states in zip(missing, computed, strict=True):
                kept[i] = states[: len(batch.prompts[i].inputs)]
        return nn.utils.rnn.pad_sequence(kept, batch_first=True)

    @torch.no_grad()
    def keep(self, prompts: Sequence[Prompt], max_tokens: int):
        """Compute these prompts' trunk states now and keep them, as far as there is room.

        Only this fills the store, so what a state was computed in, and hence its last bits,
        follows from the calls of ``keep`` and nothing else. Of several processes each keeps its
        own prompts' states.
        """
        by_inputs = {p.inputs: p for p in prompts}
        new = [by_inputs[inputs] for inputs in self.states.missing(list(by_inputs))]
        new = [new[i] for i in parallel.own(new)]
        for batch in self.batches(new, max_tokens, "trunk"):
            if self.states.full:
                break
            inputs = [p.inputs for p in batch.prompts]
            rows = zip(inputs, self._run_trunk(batch.ids), strict=True)
            self.states.put(inputs, [states[: len(i)] for i, states in rows])

    def _run_trunk(self, ids: torch.Tensor) -> torch.Tensor:
        def leave(block, args, kwargs):
            raise _TrunkDone(args[0] if args else kwargs["hidden_states"])

        def note(block, args, output):
            self._tuple_output = isinstance(output, tuple)

        with contextlib.ExitStack() as stack:
            for hook in (
                self._blocks[0].register_forward_hook(note),
                self._blocks[self._first].register_forward_pre_hook(leave, with_kwargs=True),
            ):
                stack.callback(hook.remove)
            try:
                self._forward(ids)
            except _TrunkDone as done:
                return done.states

    def _forward(self, ids: torch.Tensor):
        """The model's own forward pass; whatever its config would add to the output is left out."""
        self.model.eval()
        return self.model(
            input_ids=ids,
            use_cache=False,
            return_dict=True,
            output_hidden_states=False,
            output_attentions=False,
        )

    def top(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """n×vocabulary logits at the answer positions, from the trunk's states."""

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
            for block in self._blocks[: self._first]:
                stack.enter_context(_skipped(block, self._tuple_output))
            first = self._blocks[self._first]
            for hook in (
                first.register_forward_pre_hook(enter, with_kwargs=True),
                self._head.register_forward_pre_hook(into_head),
            ):
                stack.callback(hook.remove)
            if self._last_mlp:
                mlp = self.model.get_submodule(self._last_mlp)
                stack.callback(mlp.register_forward_pre_hook(into_mlp).remove)
                stack.callback(mlp.register_forward_hook(out_of_mlp).remove)
            if torch.is_grad_enabled():
                stack.enter_context(self.plain_attention())
            return self._forward(batch.ids).logits

    def plain_attention(self) -> contextlib.AbstractContextManager:
        """Within it attention runs unfused on a CPU, whose fused one is slow backwards on short
        sequences."""
        if self.device.type == "cpu":
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    def places(self, name: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the n answer positions in what goes through an edit module within
        :meth:`top`."""
        if self._last_mlp and name.startswith(f"{self._last_mlp}."):
            return torch.zeros_like(batch.rows), torch.arange(len(batch.rows)).to(batch.rows)
        return batch.rows, batch.cols

    @torch.no_grad()
    def add(self, shifts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add d×d' shifts ΔW to the named edit modules; returns the weights as they were.

        The sum is rounded once, from ``edit_dtype``. Should anything fail half-way, every
        weight is put back before the exception goes on.

        Raises:
            HorseError: a shift of another shape, or a sum that is not finite, naming the module.
        """
        before = {}
        try:
            for name, shift in shifts.items():
                module = self.modules[name]
                weight = module.weight
                before[name] = weight.detach().clone()
                shift = shift if isinstance(module, Conv1D) else shift.T
                if shift.shape != weight.shape:
                    raise HorseError(
                        f"{name}: the shift is {tuple(shift.shape)}, the weight "
                        f"{tuple(weight.shape)}."
                    )
                weight.copy_(weight.to(self.edit_dtype) + shift.to(weight.device, self.edit_dtype))
                if not weight.isfinite().all():
                    raise HorseError(f"{name}: the edited weight is not finite. {HALF_HINT}")
        except BaseException:
            self.restore(before)
            raise
        return before

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor]):
        """Put weights that :meth:`add` returned back, bit for bit."""
        for name, weight in weights.items():
            self.modules[name].weight.copy_(weight)

    def digests(self) -> dict[str, str]:
        """A digest of every edit module's weight as it is now, to the bit."""
        return {name: digest(module.weight) for name, module in self.modules.items()}

    @contextlib.contextmanager
    def shifted(self, shifts: dict[str, torch.Tensor]):
        """The model with the shifts added, for the length of a ``with``."""
        before = self.add(shifts)
        try:
            yield
        finally:
            self.restore(before)

    @contextlib.contextmanager
    def weight_gradients(self):
        """Let backward passes fill a dict: name → ∂L/∂W, d×d', summed over the passes.

        Call the yielded function after each backward pass; it takes the gradients out of the
        model at once, so that half-precision sums never lose small terms.
        """
        where = {"device": self.edit_device, "dtype": self.edit_dtype}
        total = {
            name: torch.zeros(shape, **where)
            for name, shape in zip(self.modules, self.shapes, strict=True)
        }

        def collect():
            for name, module in self.modules.items():
                grad = module.weight.grad
                total[name] += (grad if isinstance(module, Conv1D) else grad.T).to(**where)
                module.weight.grad = None

        weights = [m.weight.requires_grad_() for m in self.modules.values()]
        try:
            yield total, collect
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None


def _entries(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


@contextlib.contextmanager
def _skipped(block: nn.Module, tuple_output: bool):
    """The block passes its input on. Its own ``forward`` may be an instance attribute already
    (accelerate wraps it so), and comes back as it was."""

    def identity(hidden_states, *args, **kwargs):
        return (hidden_states, None) if tuple_output else hidden_states

    had, before = "forward" in block.__dict__, block.forward
    block.forward = identity
    try:
        yield
    finally:
        if had:
            block.forward = before
        else:
            del block.forward
