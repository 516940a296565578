"""Keys and value gradients at the answer tokens, for all edit modules in one pass (Sec. 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backbone import Backbone
from .errors import HALF_HINT, HorseError
from .prompts import Prompt


@dataclass
class Trace:
    """What the hypernetwork sees of an edit; lists run over the edit modules, lowest first.

    Attributes:
        keys: H_l, n×d, the inputs of each edit module at the n answer positions.
        grads: ∇G_l, n×d', the gradients of the summed cross-entropy at its outputs.
        value_norms: the mean norm of a row of its outputs there.
        owners: n, the index of the prompt that each row belongs to, on the CPU.

    All in ``Backbone.edit_dtype``. Rows are in the order of the prompts, the tokens of
    one answer in sequence.
    """

    keys: list[torch.Tensor]
    grads: list[torch.Tensor]
    value_norms: list[float]
    owners: torch.Tensor


def trace(backbone: Backbone, prompts: Sequence[Prompt], batch_tokens: int) -> Trace:
    """Run the prompts through the unedited model, forward and backward.

    The graph starts at the lowest edit module's output: nothing below it needs a gradient. The
    cross-entropy is summed, so that a token's gradient does not depend on its batch.

    Raises:
        HorseError: a key or gradient that is not finite, naming the record and the module.
    """
    seen = {name: _Seen(backbone.edit_device, backbone.edit_dtype) for name in backbone.modules}
    places = []
    for batch in backbone.batches(prompts, batch_tokens, "trace"):
        states = backbone.trunk(batch)
        hooks = [
            module.register_forward_hook(seen[name].hook(batch))
            for name, module in backbone.modules.items()
        ]
        try:
            with torch.enable_grad():
                logits = backbone.top(batch, states)
                F.cross_entropy(
                    logits.to(backbone.edit_dtype), batch.labels.to(logits.device), reduction="sum"
                ).backward()
        finally:
            for hook in hooks:
                hook.remove()
        for s in seen.values():
            s.collect()
        places.append(_places(batch))
    places = torch.cat(places)
    order = places.argsort(stable=True).to(backbone.edit_device)
    owners = places[order.cpu()]
    for name, s in seen.items():
        for what, rows in (("keys", s.keys), ("gradient", s.grads)):
            bad = ~torch.cat(rows)[order].isfinite().all(-1).cpu()
            if bad.any():
                record = owners[bad][0].item()
                raise HorseError(
                    f"record {record}: the {what} at {name} is not finite. {HALF_HINT}"
                )
    return Trace(
        keys=[torch.cat(s.keys)[order] for s in seen.values()],
        grads=[torch.cat(s.grads)[order] for s in seen.values()],
        value_norms=[torch.cat(s.norms).mean().item() for s in seen.values()],
        owners=owners,
    )


def _places(batch) -> torch.Tensor:
    """For each answer token of the batch, the index of its prompt."""
    return torch.tensor(batch.index)[batch.rows.cpu()]


class _Seen:
    """What one edit module lets through, gathered over batches."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.kept = {"device": device, "dtype": dtype}
        self.keys, self.grads, self.norms = [], [], []

    def hook(self, batch):
        def record(module, args, output):
            if output.dim() != 3:
                raise HorseError(
                    f"{type(module).__name__}: works on flattened tokens, which HORSE cannot edit."
                )
            if not output.requires_grad:  # the graph starts here
                output = output.detach().requires_grad_()
            else:
                output.retain_grad()
            rows, cols = batch.rows.to(output.device), batch.cols.to(output.device)
            self.keys.append(args[0][rows, cols].detach().to(**self.kept))
            self.norms.append(output[rows, cols].detach().to(**self.kept).norm(dim=-1))
            self._pending = output, rows, cols
            return output.clone()  # some models write into it

        return record

    def collect(self):
        """Take the gradient that the backward pass left."""
        output, rows, cols = self._pending
        self.grads.append(output.grad[rows, cols].to(**self.kept))
        del self._pending
