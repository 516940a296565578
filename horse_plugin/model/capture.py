"""Keys and gradients at the answer tokens, for all edit modules in one pass (Sec. 2.1)."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from horse_plugin import distributed
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HALF_PRECISION_HINT, HorseError
from horse_plugin.model.backbone import Backbone

IGNORED = -100  # the label that cross_entropy leaves out
HOLDS = 0.9  # the probability from which on an answer needs no more


@dataclass
class Capture:
    """What the hypernetwork reads of an edit; lists run over the edit modules, lowest first.

    Keys, gradients and norms are in ``Backbone.edit_dtype``. Rows are in the order of the prompts,
    the tokens of one answer in sequence; of several processes each holds the rows of the prompts
    that it runs.

    Attributes:
        keys: H_l, n×d, the inputs of each edit module at the n answer positions.
        grads: ∇G_l, n×d', the gradients of the summed cross-entropy at its outputs.
        value_norms: the mean norm of a row of each module's outputs there.
        prompt_of_row: n, the index of the prompt that each row belongs to, on the CPU.
        still: n, on the CPU, whether the edit must do nothing at the row.
        holds: n, on the CPU, whether the model gives each token of the row's answer a probability
            of at least ``HOLDS``, or must do nothing there.
        predicted: prompt → the tokens that the model predicts for its answer, on the CPU; those
            where the edit must do nothing are left out.
        seconds: how long the capture took.
    """

    keys: list[torch.Tensor]
    grads: list[torch.Tensor]
    value_norms: list[float]
    prompt_of_row: torch.Tensor
    still: torch.Tensor
    holds: torch.Tensor
    predicted: dict[Prompt, torch.Tensor]
    seconds: float


def capture(backbone: Backbone, prompts: Sequence[Prompt], known: Capture | None = None) -> Capture:
    """Run the prompts through the model as it is, forward and backward.

    The graph starts at the lowest edit module's output, since nothing below it needs a gradient.
    The cross-entropy is summed, so that a token's gradient does not depend on its batch.

    Args:
        known: an earlier capture of the same prompts. Those that hold in it are not run. Their keys
            and what the model predicts are as they were, and their gradients are 0.

    Raises:
        HorseError: a key or a gradient is not finite; the message names the record and the module.
    """
    start = time.perf_counter()
    local = distributed.local_indices(prompts)
    sizes = torch.tensor([len(prompts[i].keys_at) for i in local], dtype=torch.long)
    prompt_of_row = torch.tensor(local, dtype=torch.long).repeat_interleave(sizes)
    first_rows = sizes.cumsum(0) - sizes
    still = torch.tensor([prompts[i].still for i in local], dtype=torch.bool)
    holds = known.holds[first_rows] if known else torch.zeros_like(still)
    run = (~holds).nonzero()[:, 0].tolist()  # indices into ``local``
    where = {"device": backbone.edit_device, "dtype": backbone.edit_dtype}
    captured = {
        name: _ModuleRows(len(prompt_of_row), *shape, where)
        for name, shape in zip(backbone.modules, backbone.shapes, strict=True)
    }
    predicted = [None] * len(local)
    if known:
        predicted = [  # nothing reads what is predicted at a contrast
            torch.tensor(prompts[i].answer) if prompts[i].still else known.predicted[prompts[i]]
            for i in local
        ]
        for module_rows, keys in zip(captured.values(), known.keys, strict=True):
            module_rows.keys.copy_(keys)
            module_rows.grads.zero_()
    with distributed.raise_on_all_ranks():
        for batch in backbone.batches([prompts[local[i]] for i in run], "capture"):
            index = [run[i] for i in batch.index]
            states = backbone.trunk(batch)
            rows = torch.cat([torch.arange(sizes[i]) + first_rows[i] for i in index])
            rows = rows.to(backbone.edit_device)
            hooks = [
                module.register_forward_hook(
                    captured[name].hook(backbone.key_positions(name, batch), rows)
                )
                for name, module in backbone.modules.items()
            ]
            try:
                with torch.enable_grad():
                    logits = backbone.top(batch, states)
                    ignored = still[index].to(batch.rows.device)[batch.rows]
                    labels = batch.labels.masked_fill(ignored, IGNORED).to(logits.device)
                    logits = logits.to(backbone.edit_dtype)
                    losses = F.cross_entropy(logits, labels, reduction="none")
                    losses.sum().backward()
            finally:
                for hook in hooks:
                    hook.remove()
            for module_rows in captured.values():
                module_rows.collect()
            tokens = logits.detach().argmax(-1).split([len(p.answer) for p in batch.prompts])
            for i, part in zip(index, tokens, strict=True):
                predicted[i] = part
            worst = torch.zeros(len(index)).to(losses)  # of each answer: its least likely token's
            worst.scatter_reduce_(0, batch.rows.to(losses.device), losses.detach(), "amax")
            holds[index] = (worst <= -math.log(HOLDS)).cpu()
        for name, module_rows in captured.items():
            for what, values in (("keys", module_rows.keys), ("gradient", module_rows.grads)):
                bad = ~values.isfinite().all(-1).cpu()
                if bad.any():
                    record = prompt_of_row[bad][0].item()
                    raise HorseError(
                        f"record {record}: the {what} at {name} is not finite. "
                        f"{HALF_PRECISION_HINT}"
                    )
    answers = distributed.gather_answers(prompts, predicted)
    norms = torch.stack([module_rows.norms for module_rows in captured.values()], -1)
    norms = known.value_norms if known else distributed.mean_of_rows(norms).tolist()
    return Capture(
        keys=[module_rows.keys for module_rows in captured.values()],
        grads=[module_rows.grads for module_rows in captured.values()],
        value_norms=norms,
        prompt_of_row=prompt_of_row,
        still=still.repeat_interleave(sizes),
        holds=holds.repeat_interleave(sizes),
        predicted={p: a for p, a in zip(prompts, answers, strict=True) if not p.still},
        seconds=time.perf_counter() - start,
    )


class _ModuleRows:
    """The rows of one edit module, filled batch by batch."""

    def __init__(self, n: int, d: int, d_out: int, where: dict):
        self.keys, self.grads = torch.empty(n, d, **where), torch.empty(n, d_out, **where)
        self.norms = torch.empty(n, **where)

    def hook(self, positions: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor):
        """Return a forward hook that fills the rows ``at`` with a batch's answer positions."""

        def record(module, args, output):
            if output.dim() != 3:
                raise HorseError(
                    f"{type(module).__name__}: works on flattened tokens, which HORSE cannot edit."
                )
            if not output.requires_grad:  # the graph starts here
                output = output.detach().requires_grad_()
            else:
                output.retain_grad()
            rows, cols = (position.to(output.device) for position in positions)
            values = output[rows, cols].detach().to(self.norms)
            self.keys[at] = args[0][rows, cols].detach().to(self.keys)
            self.norms[at] = values.norm(dim=-1)
            self._pending = output, rows, cols, at
            return output.clone()  # some models write into it

        return record

    def collect(self):
        """Take the gradient that the backward pass left."""
        output, rows, cols, at = self._pending
        self.grads[at] = output.grad[rows, cols].to(self.grads)
        del self._pending
