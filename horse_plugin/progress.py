"""One line on a terminal for a whole job: the step that it is at, and an estimate of its end."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

LINE = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
T = TypeVar("T")


class Job:
    """A job of several steps, each of which does some of its work; used in a ``with``.

    Where nobody watches, as in a log file, nothing is written. At the end the line goes away.

    Args:
        name: what the line begins with.
        work: an estimate of the work of the planned steps, in any unit. It grows if more is done,
            and less is no error either.
        planned: the names of these steps; the work of another is added when it begins.
        file: where the line goes; None is the standard error stream.
    """

    def __init__(self, name: str, work: float, planned: Sequence[str], file=None):
        style = {"bar_format": LINE, "leave": False, "disable": None, "smoothing": 0, "file": file}
        self._name, self._planned = name, planned
        self._bar = tqdm(total=work, desc=name, **style)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error):
        self._bar.close()

    def watch(self, step: str, items: Sequence[tuple[T, float]]) -> Iterator[T]:
        """Yield the items of a step, each given with its work, done when the next is asked for."""
        self._bar.set_description_str(f"{self._name}, {step}")
        if step not in self._planned:
            self._bar.total += sum(work for _, work in items)
        for item, work in items:
            yield item
            self._bar.total = max(self._bar.total, self._bar.n + work)
            self._bar.update(work)
