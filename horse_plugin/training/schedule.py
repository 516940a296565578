"""Which training records each step edits: a new order every epoch, and maybe sizes that vary."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

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
    network learns small edits and large ones. The last step of an epoch takes what is left, if that
    is enough for a step.

    Args:
        hparams: the sizes, ``seed``, ``max_epochs`` and ``max_iters``.
        n_records: how many training records there are.
    """

    def __init__(self, hparams: HORSEHyperParams, n_records: int):
        self.hparams, self.n_records = hparams, n_records
        self.steps = list(itertools.islice(self._all(), hparams.max_iters))

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Step:
        return self.steps[step]

    def indices(self, step: int) -> list[int]:
        """Return the indices of a step's records, none of them twice."""
        at = self[step]
        return self._order(at.epoch)[at.first : at.first + at.size]

    def used(self, n_steps: int) -> Sequence[int]:
        """Return the indices of the records that the first steps read, all if an epoch."""
        last = self[n_steps - 1]
        if last.epoch or self.n_records - last.first - last.size < self._sizes[0]:
            return range(self.n_records)
        return self._order(0)[: last.first + last.size]

    @property
    def mean_size(self) -> int:
        """The mean number of records in a step, rounded."""
        return round(sum(step.size for step in self.steps) / len(self))

    @property
    def _sizes(self) -> tuple[int, int]:
        most = self.hparams.edits_per_step
        return self.hparams.min_edits_per_step or most, most

    @functools.lru_cache(maxsize=1)  # noqa: B019, which goes with the one run that has it
    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.hparams.seed * 100_003 + epoch)
        return torch.randperm(self.n_records, generator=generator).tolist()

    def _all(self) -> Iterator[Step]:
        generator = torch.Generator().manual_seed(self.hparams.seed)
        least, most = self._sizes
        for epoch in range(self.hparams.max_epochs):
            first = 0
            while (left := self.n_records - first) >= least:
                part = torch.rand((), generator=generator).item()
                size = min(left, round(least * (most / least) ** part))
                yield Step(epoch, first, size)
                first += size


def described(n_steps: int, settings: dict) -> str:
    """Return so many steps in words, as in "40 steps of 125 records".

    Args:
        settings: the run's, by their present names.
    """
    least, most = settings.get("min_edits_per_step"), settings["edits_per_step"]
    return f"{n_steps} steps of {f'{least} to ' if least else ''}{most} records"
