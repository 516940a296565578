"""One line on a terminal for a whole job: the step that it is at, and an estimate of its end."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

LINE = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
T = TypeVar("T")


class Job:
    """A job of several steps, each of which does some of its work; used in a ``with``.

    Where nobody watches, as in a log file, nothing is written. At the end the line goes away.

    Args:
        name: what the line begins with.
        planned: step → an estimate of its work, in any unit. It grows if more is done, and when
            another step begins; :meth:`finish` takes away what was not done.
        file: where the line goes; None is the standard error stream.
    """

    def __init__(self, name: str, planned: Mapping[str, float], file=None):
        style = {"bar_format": LINE, "leave": False, "disable": None, "smoothing": 0, "file": file}
        self._name, self._left = name, dict(planned)
        self._bar = tqdm(total=sum(planned.values()), desc=name, **style)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error):
        self._bar.close()

    def watch(self, step: str, items: Sequence[tuple[T, float]]) -> Iterator[T]:
        """Yield the items of a step, each given with its work, done when the next is asked for."""
        self._bar.set_description_str(f"{self._name}, {step}")
        self._plan(step, max(self._left.get(step, 0), sum(work for _, work in items)))
        for item, work in items:
            yield item
            self._left[step] -= work
            self._bar.update(work)

    def finish(self, *steps: str):
        """Leave the work out that is planned for these steps and was not done."""
        for step in steps:
            self._plan(step, 0)

    def _plan(self, step: str, work: float):
        """Have this much work left in a step."""
        self._bar.total += work - self._left.get(step, 0)
        self._left[step] = work
        self._bar.refresh()
