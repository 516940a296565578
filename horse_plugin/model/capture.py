"""Keys and value gradients at the answer tokens, for all edit modules in one pass (Sec. 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from horse_plugin import distributed as parallel
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HALF_HINT, HorseError
from horse_plugin.model.backbone import Backbone


@dataclass
class Trace:
    """What the hypernetwork sees of an edit; lists run over the edit modules, lowest first.

    Attributes:
        keys: H_l, n×d, the inputs of each edit module at the n answer positions.
        grads: ∇G_l, n×d', the gradients of the summed cross-entropy at its outputs.
        value_norms: the mean norm of a row of its outputs there.
        owners: n, the index of the prompt that each row belongs to, on the CPU.

    All in ``Backbone.edit_dtype``. Rows are in the order of the prompts, the tokens of
    one answer in sequence; of several processes each holds the rows of its own prompts.
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
    own = parallel.own(prompts)
    sizes = torch.tensor([len(prompts[i].answer) for i in own], dtype=torch.long)
    owners = torch.tensor(own, dtype=torch.long).repeat_interleave(sizes)
    starts = sizes.cumsum(0) - sizes
    where = {"device": backbone.edit_device, "dtype": backbone.edit_dtype}
    seen = {
        name: _Seen(len(owners), *shape, where)
        for name, shape in zip(backbone.modules, backbone.shapes, strict=True)
    }
    with parallel.together():
        for batch in backbone.batches([prompts[i] for i in own], batch_tokens, "trace"):
            states = backbone.trunk(batch)
            at = torch.cat([torch.arange(sizes[i]) + starts[i] for i in batch.index])
            at = at.to(backbone.edit_device)
            hooks = [
                module.register_forward_hook(seen[name].hook(backbone.places(name, batch), at))
                for name, module in backbone.modules.items()
            ]
            try:
                with torch.enable_grad():
                    logits = backbone.top(batch, states)
                    labels = batch.labels.to(logits.device)
                    logits = logits.to(backbone.edit_dtype)
                    F.cross_entropy(logits, labels, reduction="sum").backward()
            finally:
                for hook in hooks:
                    hook.remove()
            for s in seen.values():
                s.collect()
        for name, s in seen.items():
            for what, rows in (("keys", s.keys), ("gradient", s.grads)):
                bad = ~rows.isfinite().all(-1).cpu()
                if bad.any():
                    record = owners[bad][0].item()
                    raise HorseError(
                        f"record {record}: the {what} at {name} is not finite. {HALF_HINT}"
                    )
    return Trace(
        keys=[s.keys for s in seen.values()],
        grads=[s.grads for s in seen.values()],
        value_norms=parallel.mean(torch.stack([s.norms for s in seen.values()], -1)).tolist(),
        owners=owners,
    )


class _Seen:
    """What one edit module lets through: n rows, filled batch by batch."""

    def __init__(self, n: int, d: int, d_out: int, where: dict):
        self.keys, self.grads = torch.empty(n, d, **where), torch.empty(n, d_out, **where)
        self.norms = torch.empty(n, **where)

    def hook(self, places: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor):
        """Fills the rows ``at`` with what a batch has at its answer positions, ``places``."""

        def record(module, args, output):
            if output.dim() != 3:
                raise HorseError(
                    f"{type(module).__name__}: works on flattened tokens, which HORSE cannot edit."
                )
            if not output.requires_grad:  # the graph starts here
                output = output.detach().requires_grad_()
            else:
                output.retain_grad()
            rows, cols = (place.to(output.device) for place in places)
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
