"""Prompts side by side, in batches that waste little on padding."""

import bisect
import itertools
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

    def late(self) -> torch.Tensor:
        """Return, on the CPU, the positions from each prompt's first key or answer position on.

        They count the tokens of all rows in sequence.
        """
        ends = [i * self.ids.shape[1] + len(p.inputs) for i, p in enumerate(self.prompts)]
        spans = zip(ends, self.prompts, strict=True)
        return torch.cat([torch.arange(end - p.n_late, end) for end, p in spans])


# A pass costs as much as so many tokens beside its own: less padding is cheaper than another pass.
PASS_ON_CPU, PASS_ON_GPU = 64, 512


def batches(prompts: Sequence[Prompt], max_tokens: int, device="cpu") -> Iterable[Batch]:
    """Yield the prompts in batches of at most ``max_tokens`` padded tokens, longest first.

    A prompt longer than ``max_tokens`` makes a batch of its own. Shorter prompts join a batch, all
    of one length together, as long as its padding costs less than a pass of their own.
    """
    lengths = [len(p.inputs) for p in prompts]
    a_pass = PASS_ON_CPU if torch.device(device).type == "cpu" else PASS_ON_GPU
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    while order:
        width = lengths[order[0]]
        index = order[: max(1, max_tokens // width)]
        padding = list(itertools.accumulate(width - lengths[i] for i in index))
        n = bisect.bisect_right(padding, a_pass)
        if n < len(index):
            n = bisect.bisect_left(index, -lengths[index[n]], key=lambda i: -lengths[i])
        yield _batch(prompts, index[:n], width, device)
        order = order[n:]


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
