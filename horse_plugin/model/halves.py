"""The language model's own forward pass, cut in two.

Blocks below the lowest edited one (the trunk) never change, so their output is computed once and
the edited blocks (the top) run on it as often as needed. Both halves are the model's own forward
with taps: leave at the first edited block, enter there, and keep only the answer positions in the
last block's MLP and before the output head. No architecture is written out here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from horse_plugin.data.batches import Batch, batches
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import UsageError, first_line
from horse_plugin.method.finite import all_finite
from horse_plugin.model.backward import gradients_at
from horse_plugin.model.guard import guard, guarded, hooked, none_packed, with_forward
from horse_plugin.model.modules import (
    find_blocks,
    find_edit_modules,
    find_last_mlp,
    first_edited_block,
    shape_of,
)

UNFUSED = 256  # the most tokens of a sequence whose attention runs unfused


class StopForward(Exception):
    """Carries a value out of a forward pass that need not go on."""

    def __init__(self, value):
        self.value = value


class Halves:
    """A causal language model seen as trunk, edited blocks and head.

    Args:
        model: a Hugging Face causal language model.
        inner_params: names of the edit modules, with or without ``.weight``; found when empty.
        token: where edits read keys, by which modules are found.

    Attributes:
        modules: name → edit module, from the lowest block to the highest.
        device: where token ids go in.
        edit_device: where the hypernetwork works: with the lowest edit module.
        blocks: all transformer blocks.
        first_edited: the index of the lowest edited block.
        head: the output head.
        last_mlp: the name of the last block's MLP, which works at answer positions only, or None.
        late_backward: whether backward passes can leave out what lies before a prompt's first key.

    Raises:
        UsageError: a named module is missing, or none can be found.
    """

    def __init__(self, model, inner_params: Sequence[str] = (), token: str = "ans"):
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        if self.device.type == "meta":
            raise UsageError(
                f"{type(model).__name__}: its embeddings are offloaded, so that token ids have "
                "no place to go in. Keep them on a device (device_map)."
            )
        self.head = model.get_output_embeddings()
        _, self.blocks = find_blocks(model)
        if any(p.is_inference() for p in model.parameters()):
            raise UsageError(
                f"{type(model).__name__}: loaded in inference mode, so that no weight can be "
                "changed. Load it outside torch.inference_mode."
            )
        self.modules = find_edit_modules(model, inner_params, token)
        self.edit_device = next(iter(self.modules.values())).weight.device
        self.first_edited = first_edited_block(model, inner_params, token)
        self.last_mlp = find_last_mlp(model)
        self.late_backward = False  # until it was tried

    def held(self) -> contextlib.AbstractContextManager:
        """Hold the model for the length of a ``with``, see :mod:`horse_plugin.model.guard`."""
        return guard(self.model)

    @guarded
    @torch.no_grad()
    def check_halves(self):
        """Compare trunk and top with the model's own forward pass, on a few tokens.

        Where they differ, the last MLP runs at all positions; it may mix tokens. And where
        gradients differ, backward passes run at all positions, too.

        Raises:
            UsageError: they differ even so, or the model is not causal.
        """
        ids = self.few_tokens()
        made = [Prompt(tuple(ids), 6), Prompt(tuple(ids[1:]), 7, subject=2)]
        (batch,) = batches(made, len(ids) * 4, self.device)
        logits = self._forward(batch.ids).logits
        whole = logits[batch.rows, batch.cols]
        if not all_finite(whole):
            return  # an edit will name the number
        n = batch.ids.shape[1] // 2
        if not self.agree(self._forward(batch.ids[:, :n]).logits, logits[:, :n]):
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
                agree = self.agree(self.top(batch, states), whole)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                problem = first_line(error)  # a block has inputs or outputs of its own kind
                continue
            if agree:
                self.late_backward = self._late_gradients_agree(batch, states)
                return
        raise UsageError(
            f"{type(self.model).__name__}: HORSE cannot run this architecture's blocks in two "
            f"halves ({problem})."
        )

    def agree(self, found: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Return whether logits are the same but for their rounding."""
        least = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1
        return bool((found - wanted).abs().max() <= least * wanted.abs().max())

    @torch.enable_grad()
    def _late_gradients_agree(self, batch: Batch, states: torch.Tensor) -> bool:
        """Return whether gradients are the same where positions before the first key have none."""
        at, found = batch.late().to(states.device), []
        try:
            for context in (contextlib.nullcontext(), self._late_gradients(batch)):
                entering = states.detach().requires_grad_()
                with context:
                    logits = self.top(batch, entering.clone())  # some models write into it
                (grad,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), entering)
                found.append(grad.flatten(0, -2)[at].float())
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False  # it has no backward pass, or one of its own kind; an edit will say so
        whole, late = found
        least = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.03
        return bool(((late - whole).norm(dim=-1) <= least * whole.norm(dim=-1)).all())

    def late_gradients(self, batch: Batch) -> contextlib.AbstractContextManager:
        """Let ``top`` in a ``with`` have gradients from each prompt's first key on only.

        Before it they are wrong, see :mod:`horse_plugin.model.backward`.
        """
        return self._late_gradients(batch) if self.late_backward else contextlib.nullcontext()

    def _late_gradients(self, batch: Batch) -> contextlib.AbstractContextManager:
        at = batch.late().to(self.edit_device, non_blocking=True)
        return gradients_at(self.blocks[self.first_edited :], at, batch.ids.numel())

    def few_tokens(self) -> list[int]:
        """Return some token ids, all over the vocabulary, to try the model on."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return [7919 * i % vocabulary for i in range(1, 12)]

    @property
    def devices(self) -> set[torch.device]:
        """The devices that hold the model's weights."""
        return {p.device for p in self.model.parameters()}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d, d') of each edit module: the widths of its input and of its output."""
        return [shape_of(m) for m in self.modules.values()]

    @guarded
    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits at the batch's answer positions, n×vocabulary."""
        return self.top(batch, self.trunk(batch))

    @guarded
    @torch.no_grad()
    def trunk(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states that enter the first edited block, B×L×d.

        Padded positions hold anything.
        """
        return self.pass_trunk(batch.ids)

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

    def pass_trunk(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what token ids are when they enter the first edited block, B×L×d."""

        def leave(block, args, kwargs):
            raise StopForward(args[0] if args else kwargs["hidden_states"])

        first = self.blocks[self.first_edited]
        with hooked(first.register_forward_pre_hook, leave, with_kwargs=True):
            return self._stopped(lambda: self._forward(ids))

    def _stopped(self, run: Callable[[], object]):
        """Return what a hook takes out of a forward pass."""
        try:
            run()
        except StopForward as stopped:
            return stopped.value

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

    @functools.cached_property
    def _blocks_return_tuples(self) -> bool:
        """Whether a block returns a tuple: one token through the first block tells."""

        def leave(block, args, output):
            raise StopForward(isinstance(output, tuple))

        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with hooked(self.blocks[0].register_forward_hook, leave), torch.no_grad():
            return self._stopped(lambda: self._forward(ids))

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
