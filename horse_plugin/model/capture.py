"""Keys and gradients at the answer tokens, for all edit modules in one pass (Sec. 2.1)."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from horse_plugin import distributed
from horse_plugin.data.prompts import UNKNOWN, Prompt
from horse_plugin.errors import HALF_PRECISION_HINT, HorseError
from horse_plugin.method.finite import first_not_finite
from horse_plugin.method.losses import cross_entropy, likeliest
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded, hooked

HOLDS = 0.9  # the probability from which on an answer token needs no more, if no other is given
KEPT = 0.5  # ... and the token that follows it, as a share of its probability before the edit


@dataclass(kw_only=True)
class Notes:
    """What a capture leaves for the next one of the same prompts in the same edit.

    Attributes:
        value_norms: the mean norm of a row of each edit module's outputs before the edit.
        holds: n, on the CPU, whether the row's prompt needs no more: the model gives each token of
            the answer the probability that was asked for, and the token that followed it at least
            ``KEPT`` of the one it had. Where the edit must do nothing, there is no more to do.
        followed: what followed each answer before the edit, if it is read: the likeliest token, and
            the most that it may cost after the edit, in nats. On the CPU, one per prompt of this
            process.
    """

    value_norms: list[float]
    holds: torch.Tensor
    followed: tuple[torch.Tensor, torch.Tensor]


@dataclass(kw_only=True)
class Capture(Notes):
    """What the hypernetwork reads of an edit; lists run over the edit modules, lowest first.

    Keys and gradients have their module's own dtype, of which no bit is lost, and are on
    ``Backbone.keys_device``; all else is in ``Backbone.edit_dtype``. Rows are in the order of the
    prompts, the tokens of one answer in sequence; of several processes each holds the rows of the
    prompts that it runs.

    Attributes:
        prompts: what was read, on all processes.
        keys: H_l, n×d, the inputs of each edit module at the n answer positions.
        grads: ∇G_l, n×d', the gradients of the summed cross-entropy at its outputs; 0 where nothing
            is asked for.
        record_of_row: n, the index of the record that each row belongs to, on the CPU; records of
            edits in force come after those of the edit.
        still: n, on the CPU, whether the edit must do nothing at the row, as at a contrast.
        losses: n, on the CPU, what the token of each row costs, in nats; of a token that follows an
            answer, what it costs more than it may.
        predicted: prompt → the tokens that the model predicts for its answer, on the CPU; contrasts
            are left out.
        seconds: how long the capture took.
    """

    prompts: Sequence[Prompt]
    keys: list[torch.Tensor]
    grads: list[torch.Tensor]
    record_of_row: torch.Tensor
    still: torch.Tensor
    losses: torch.Tensor
    predicted: dict[Prompt, torch.Tensor]
    seconds: float


@guarded
def capture(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    earlier: Notes | None = None,
    holds_from: float | None = None,
) -> Capture:
    """Run the prompts through the model as it is, forward and backward.

    The graph starts at the lowest edit module's output, since nothing below it needs a gradient,
    and its linear maps have none before a prompt's first key (:mod:`horse_plugin.model.backward`).
    The cross-entropy is summed, so that a token's gradient does not depend on its batch. That of a
    token that follows an answer counts as far as it exceeds what it may cost.

    Prompts that are likely to need no more run forward first, and backward only if they do: those
    that held in the earlier capture, and contrasts.

    Args:
        earlier: the last capture of the same prompts in the same edit, or its notes.
        holds_from: the probability from which on an answer token needs no more; None is ``HOLDS``.

    Raises:
        HorseError: a key or a gradient is not finite; the message names the record and the module.
    """
    start = time.perf_counter()
    local = distributed.local_indices(prompts)
    sizes = torch.tensor([len(prompts[i].keys_at) for i in local], dtype=torch.long)
    records = torch.tensor([prompts[i].record for i in local], dtype=torch.long)
    record_of_row = records.repeat_interleave(sizes)
    first_rows = sizes.cumsum(0) - sizes
    still = torch.tensor([prompts[i].still for i in local], dtype=torch.bool)
    holds = torch.ones_like(still)
    captured = {
        name: _ModuleRows(backbone, len(record_of_row), *shape, module.weight.dtype)
        for (name, module), shape in zip(backbone.modules.items(), backbone.shapes, strict=True)
    }
    if earlier:
        followed, allowed = earlier.followed
    else:
        followed = torch.zeros(len(local), dtype=torch.long)
        allowed = torch.zeros(len(local), dtype=backbone.edit_dtype)
    row_losses = torch.zeros(len(record_of_row), dtype=backbone.edit_dtype)
    still_rows, predicted = still.repeat_interleave(sizes), [None] * len(local)
    likely = still | earlier.holds[first_rows] if earlier else still

    def read(of_prompts: list[int], backward: bool):
        """Run some of this process's prompts; the host reads what came of them after the loop."""
        task, found, read_by = "capture" if backward else "check", [], []
        for batch in backbone.batches([prompts[local[i]] for i in of_prompts], task):
            index = [of_prompts[i] for i in batch.index]
            states = backbone.trunk(batch)
            rows = torch.cat([torch.arange(sizes[i]) + first_rows[i] for i in index])
            of = torch.tensor(batch.per_label(index))
            end = torch.tensor([label == UNKNOWN for p in batch.prompts for label in p.labels])
            at = rows.to(backbone.keys_device, non_blocking=True)
            with contextlib.ExitStack() as hooks:
                for name, module in backbone.modules.items():
                    positions = backbone.key_positions(name, batch)
                    hook = captured[name].hook(positions, at, backward)
                    hooks.enter_context(hooked(module.register_forward_hook, hook))
                if backward:
                    hooks.enter_context(backbone.late_gradients(batch))
                with torch.set_grad_enabled(backward):
                    logits = backbone.top(batch, states)
                    ends = end.nonzero()[:, 0]
                    follows = (followed[of[ends]], allowed[of[ends]]) if earlier else None
                    losses, follows = _losses(logits, batch.labels, ends, follows, row_losses.dtype)
                    if backward:
                        losses.sum().backward()
            if backward:
                for module_rows in captured.values():
                    module_rows.collect()
            tokens = likeliest(logits.detach())
            found.append((rows, of, end, losses.detach(), tokens, *follows))
            read_by += zip(index, batch.prompts, strict=True)
        if not found:
            return
        parts = [torch.cat(part).cpu() for part in zip(*found, strict=True)]
        rows, of, end, losses, tokens, next_tokens, may_cost = parts
        followed[of[end]], allowed[of[end]] = next_tokens, may_cost
        row_losses[rows] = losses  # a prompt has as many rows as tokens to predict
        lacking = losses > torch.where(end, 0, -math.log(holds_from or HOLDS))
        holds[of[lacking]] = False
        done = of[end & (losses == 0)]
        still_rows[first_rows[done] + sizes[done] - 1] = True
        tokens = tokens.split([len(p.labels) for _, p in read_by])
        for (i, p), part in zip(read_by, tokens, strict=True):
            predicted[i] = part[: len(p.answer)]

    with backbone.lockstep.loop():
        read(likely.nonzero()[:, 0].tolist(), backward=False)
        read((~likely | ~(holds | still)).nonzero()[:, 0].tolist(), backward=True)
        holds |= still
        for name, module_rows in captured.items():
            for what, values in (("keys", module_rows.keys), ("gradient", module_rows.grads)):
                if (row := first_not_finite(values)) is not None:
                    record = record_of_row[row].item()
                    raise HorseError(
                        f"record {record}: the {what} at {name} is not finite. "
                        f"{HALF_PRECISION_HINT}"
                    )
    answers = distributed.gather_answers(prompts, predicted)
    norms = torch.stack([module_rows.norms for module_rows in captured.values()], -1)
    norms = earlier.value_norms if earlier else distributed.mean_of_rows(norms).tolist()
    return Capture(
        prompts=prompts,
        keys=[module_rows.keys for module_rows in captured.values()],
        grads=[module_rows.grads for module_rows in captured.values()],
        value_norms=norms,
        record_of_row=record_of_row,
        still=still_rows,
        losses=row_losses,
        holds=holds.repeat_interleave(sizes),
        followed=(followed, allowed),
        predicted={
            replace(p, ends=False): a for p, a in zip(prompts, answers, strict=True) if not p.still
        },
        seconds=time.perf_counter() - start,
    )


def _losses(logits, labels, ends, follows, dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return what each token of a batch costs, and what follows its answers.

    Args:
        ends: on the CPU, the indices of tokens that follow an answer.
        follows: on the CPU, such a token, and the most that it may cost; None reads both.
        dtype: to compute in.
    """
    to = {"device": logits.device, "non_blocking": True}
    ends, labels = ends.to(**to), labels.to(logits.device)
    if follows:
        tokens, allowed = (t.to(**to) for t in follows)
    else:
        best = logits.detach()[ends].log_softmax(-1, dtype=dtype).max(-1)
        tokens, allowed = best.indices, -best.values - math.log(KEPT)
    labels = labels.index_copy(0, ends, tokens)
    losses = cross_entropy(logits, labels, None, dtype)
    losses = (losses - torch.zeros_like(losses).index_copy(0, ends, allowed)).relu()
    return losses, (tokens, allowed)


class _ModuleRows:
    """The rows of one edit module, filled batch by batch."""

    def __init__(self, backbone: Backbone, n: int, d: int, d_out: int, dtype: torch.dtype):
        device = backbone.keys_device
        # Out of pinned memory a GPU fetches the keys of a module itself.
        pinned = device.type == "cpu" and backbone.edit_device.type == "cuda"
        own = {"dtype": dtype, "device": device, "pin_memory": pinned}
        self.keys, self.grads = torch.empty(n, d, **own), torch.zeros(n, d_out, **own)
        self.norms = torch.empty(n, dtype=backbone.edit_dtype, device=device)

    def hook(self, positions: torch.Tensor, at: torch.Tensor, backward: bool):
        """Return a forward hook that fills the rows ``at`` with a batch's positions of keys."""

        def record(module, args, output):
            if not backward:
                output = output.detach()
            elif not output.requires_grad:  # the graph starts here
                output = output.detach().requires_grad_()
            else:
                output.retain_grad()
            where = positions.to(output.device)
            values = output.flatten(0, -2)[where].detach().to(self.norms.dtype)
            self.keys[at] = args[0].flatten(0, -2)[where].detach().to(self.keys)
            self.norms[at] = values.norm(dim=-1).to(self.norms.device)
            self._pending = (output, where, at) if backward else None
            return output.clone()  # some models write into it

        return record

    def collect(self):
        """Take the gradient that the backward pass left."""
        output, where, at = self._pending
        self.grads[at] = output.grad.flatten(0, -2)[where].to(self.grads)
        del self._pending
