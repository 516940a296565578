"""Queries as tokens: where the answer lies, and batches that waste little on padding."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from horse_plugin.data.records import Query
from horse_plugin.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """A query as token ids; ``ids[start:]`` is the answer, predicted from the position before."""

    ids: tuple[int, ...]
    start: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only ever predicted."""
        return self.ids[:-1]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.start :]


def tokenize(tokenizer, queries: Sequence[Query], max_length: int | None = None) -> list[Prompt]:
    """Tokenise each query as ``prompt + " " + answer`` in one piece.

    The answer is found from the tokenizer's offsets, or from the prompt's own length where the
    tokenizer has none; never from the tokenizer's class. A BOS token appears once where the
    tokenizer sets one, an EOS token not at all. A prompt over ``max_length`` tokens loses its
    beginning (after BOS), never its answer.

    Raises:
        UsageError: an answer that the tokenizer turns into nothing, or one over ``max_length``.
    """
    return [
        _shorten(_tokenize(tokenizer, query), max_length, query, tokenizer) for query in queries
    ]


def _tokenize(tokenizer, query: Query) -> Prompt:
    prompt = query.prompt.rstrip()
    text = f"{prompt} {query.answer.strip()}"
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    else:
        ids = tokenizer(text)["input_ids"]
        n_prompt = len(_without_eos(tokenizer(prompt)["input_ids"], tokenizer))
        ends = [0] * n_prompt + [len(text)] * (len(ids) - n_prompt)
    ids = _without_eos(ids, tokenizer)
    bos = tokenizer.bos_token_id
    extra = 1 if bos is not None and list(ids[:2]) == [bos, bos] else 0
    ids, ends = ids[extra:], ends[extra : len(ids)]
    start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    if start >= len(ids) or not query.answer.strip():
        raise UsageError(f"answer {query.answer!r}: the tokenizer has no tokens for it.")
    if start == 0:
        raise UsageError(f"prompt {query.prompt!r}: the tokenizer has no tokens for it.")
    return Prompt(tuple(ids), start)


def _without_eos(ids: Sequence[int], tokenizer) -> Sequence[int]:
    eos = tokenizer.eos_token_id
    if len(ids) > 1 and eos is not None and ids[-1] == eos:
        return ids[:-1]
    return ids


def _shorten(prompt: Prompt, max_length: int | None, query: Query, tokenizer) -> Prompt:
    if max_length is None or len(prompt.ids) <= max_length:
        return prompt
    n_bos = int(prompt.ids[0] == tokenizer.bos_token_id)
    keep = max_length - n_bos
    if keep <= len(prompt.answer):
        raise UsageError(f"answer {query.answer[:40]!r}: longer than max_length={max_length}.")
    ids = prompt.ids[:n_bos] + prompt.ids[-keep:]
    return Prompt(ids, len(ids) - len(prompt.answer))


@dataclass(frozen=True)
class Batch:
    """Prompts side by side, padded on the right.

    Causal attention never looks right, so padded positions need no mask, and a tokenizer's
    ``padding_side`` does not matter.

    Attributes:
        prompts: the prompts, one a row.
        index: where each row stood in the sequence that was batched.
        ids: B×L token ids.
        rows, cols: the n answer positions: row ``rows[i]``, position ``cols[i]``.
        labels: the n answer tokens predicted there.
    """

    prompts: tuple[Prompt, ...]
    index: tuple[int, ...]
    ids: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    labels: torch.Tensor


# No row of a batch is shorter than this share of its longest: what is shorter is paid in padding.
FILLED = 0.8


def batches(prompts: Sequence[Prompt], max_tokens: int, device="cpu") -> Iterable[Batch]:
    """Yield the prompts in batches of at most ``max_tokens`` padded tokens, longest first.

    A prompt longer than ``max_tokens`` makes a batch of its own.
    """
    lengths = [len(p.inputs) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    while order:
        width = lengths[order[0]]
        alike = bisect.bisect_right(order, -FILLED * width, key=lambda i: -lengths[i])
        n_rows = max(1, min(alike, max_tokens // width))
        yield _batch(prompts, order[:n_rows], width, device)
        order = order[n_rows:]


def _batch(prompts, index, width, device) -> Batch:
    chosen = tuple(prompts[i] for i in index)
    ids = torch.tensor([p.inputs + (0,) * (width - len(p.inputs)) for p in chosen])
    n_answer = torch.tensor([len(p.answer) for p in chosen])
    rows = torch.arange(len(chosen)).repeat_interleave(n_answer)
    cols = torch.cat([torch.arange(p.start - 1, len(p.inputs)) for p in chosen])
    labels = torch.tensor([token for p in chosen for token in p.answer])
    return Batch(chosen, tuple(index), *(t.to(device) for t in (ids, rows, cols, labels)))
