"""Which training records each step edits: a new order every epoch, and maybe sizes that vary."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from horse_plugin.errors import UsageError, counted
from horse_plugin.hparams import HORSEHyperParams


@dataclass(frozen=True)
class Step:
    """What one step edits.

    Attributes:
        epoch: the pass over the records that it belongs to, from 0.
        first, size: its place in the order of that epoch.
    """

    epoch: int
    first: int
    size: int


class Schedule:
    """The steps of a training run, by the settings and the number of records alone.

    A step has ``edits_per_step`` records. With ``min_edits_per_step`` its size is drawn
    log-uniformly between the two, as many sizes from 50 to 100 as from 500 to 1,000, so that one
    network learns small edits and large ones. The first step is the largest: it sets the network's
    scales, and shows at once whether memory is enough. The last step of an epoch takes what is
    left, if that is enough for a step, so that an epoch should hold several of the largest ones.

    More epochs begin with the steps of fewer.

    Args:
        hparams: the sizes, ``seed``, ``max_epochs`` and ``max_iters``.
        n_records: how many training records there are.

    Attributes:
        steps: from first to last.

    Raises:
        UsageError: there are fewer than ``edits_per_step`` training records.
    """

    def __init__(self, hparams: HORSEHyperParams, n_records: int):
        self.hparams, self.n_records = hparams, n_records
        if n_records < hparams.edits_per_step:
            raise UsageError(
                f"edits_per_step: {hparams.edits_per_step:,} in one step, but only {n_records:,} "
                "training records. Lower it, or train on more."
            )
        self._least = hparams.min_edits_per_step or hparams.edits_per_step
        self._order = functools.lru_cache(maxsize=1)(self._order_of)
        self.steps = list(itertools.islice(self._all(), hparams.max_iters))

    def __len__(self) -> int:
        return len(self.steps)

    def epoch(self, step: int) -> int:
        """Return the epoch of a step; steps after the end are of the last one."""
        return self.steps[min(step, len(self) - 1)].epoch

    def indices(self, step: int) -> list[int]:
        """Return the indices of a step's records, none of them twice."""
        at = self.steps[step]
        return self._order(at.epoch)[at.first : at.first + at.size]

    def used(self, n_steps: int) -> Sequence[int]:
        """Return the indices of the records that the first steps read.

        Those are all records if the steps fill an epoch: another epoch reads what this one leaves.
        """
        last = self.steps[n_steps - 1]
        if last.epoch or self.n_records - last.first - last.size < self._least:
            return range(self.n_records)
        return self._order(0)[: last.first + last.size]

    def _order_of(self, epoch: int) -> list[int]:
        return shuffled(self.n_records, self.hparams.seed, epoch)

    def _all(self) -> Iterator[Step]:
        sizes = self._sizes()
        for epoch in range(self.hparams.max_epochs):
            first = 0
            while (left := self.n_records - first) >= self._least:
                size = min(left, next(sizes))
                yield Step(epoch, first, size)
                first += size

    def _sizes(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.hparams.seed)
        least, most = self._least, self.hparams.edits_per_step
        yield most
        while True:
            drawn = 1.0 if least == most else torch.rand((), generator=generator).item()
            yield round(least * (most / least) ** drawn)


def shuffled(n: int, seed: int, turn: int) -> list[int]:
    """Return 0 … n−1 in an order of a run's own, another one at each turn."""
    generator = torch.Generator().manual_seed(seed * 100_003 + turn)
    return torch.randperm(n, generator=generator).tolist()


def described(n_steps: int, settings: dict) -> str:
    """Return so many steps in words, as in "40 steps of 125 records".

    Args:
        settings: the run's, by their present names.
    """
    least, most = settings.get("min_edits_per_step"), settings["edits_per_step"]
    sizes = f"{f'{least:,} to ' if least else ''}{counted(most, 'record')}"
    return f"{counted(n_steps, 'step')} of {sizes}"
