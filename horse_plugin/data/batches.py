"""Prompts side by side, in batches that waste little on padding."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from horse_plugin.data.prompts import Prompt


@dataclass(frozen=True)
class Batch:
    """Prompts side by side, padded on the right.

    Causal attention never looks right, so padded positions need no mask, and a tokenizer's
    ``padding_side`` does not matter.

    Attributes:
        prompts: the prompts, one a row.
        index: the index of each row's prompt in the sequence that was batched.
        ids: B×L token ids.
        rows, cols: the n answer positions; the i-th is ``ids[rows[i], cols[i]]``.
        labels: the n answer tokens predicted there, ``UNKNOWN`` where an answer ends.
        key_rows, key_cols: the positions where an edit reads keys; without subjects, ``rows`` and
            ``cols``.
    """

    prompts: tuple[Prompt, ...]
    index: tuple[int, ...]
    ids: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    labels: torch.Tensor
    key_rows: torch.Tensor
    key_cols: torch.Tensor

    def per_label(self, of_prompts: Sequence) -> list:
        """Return, for each of the n answer positions, the value that is given for its prompt."""
        pairs = zip(of_prompts, self.prompts, strict=True)
        return [value for value, p in pairs for _ in p.labels]


# No row of a batch is shorter than this share of its longest row, to waste little on padding.
FILLED = 0.8
SMALL = 512  # tokens, padding included, for which a GPU hardly takes longer than for one


def batches(prompts: Sequence[Prompt], max_tokens: int, device="cpu") -> Iterable[Batch]:
    """Yield the prompts in batches of at most ``max_tokens`` padded tokens, longest first.

    A prompt longer than ``max_tokens`` makes a batch of its own. On a GPU a few prompts of any
    lengths are one batch, since each batch costs a pass.
    """
    lengths = [len(p.inputs) for p in prompts]
    small = 0 if torch.device(device).type == "cpu" else SMALL
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    while order:
        width = lengths[order[0]]
        alike = bisect.bisect_right(order, -FILLED * width, key=lambda i: -lengths[i])
        n_rows = max(1, min(max(alike, small // width), max_tokens // width))
        yield _batch(prompts, order[:n_rows], width, device)
        order = order[n_rows:]


def _batch(prompts, index, width, device) -> Batch:
    chosen = tuple(prompts[i] for i in index)
    ids = torch.tensor([p.inputs + (0,) * (width - len(p.inputs)) for p in chosen])
    n_labels = torch.tensor([len(p.labels) for p in chosen])
    rows = torch.arange(len(chosen)).repeat_interleave(n_labels)
    cols = torch.cat([torch.arange(p.start - 1, len(p.inputs)) for p in chosen])
    labels = torch.tensor([token for p in chosen for token in p.labels])
    key_rows = torch.tensor([i for i, p in enumerate(chosen) for _ in p.keys_at])
    key_cols = torch.tensor([at for p in chosen for at in p.keys_at])
    tensors = ids, rows, cols, labels, key_rows, key_cols
    tensors = (t.to(device, non_blocking=True) for t in tensors)  # nobody writes into them
    return Batch(chosen, tuple(index), *tensors)
