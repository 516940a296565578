"""Ready-made logs for a training to watch: TensorBoard, trackio and Weights & Biases.

A log is any function that takes a flat dict of figures after each step. ``training.csv`` is written
with or without one.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

from horse_plugin.distributed import is_main_process
from horse_plugin.errors import UsageError, not_installed

Log = Callable[[dict[str, float]], None]

# name → the package that it needs, which is also the name of our extra
LOGS = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "horse"


@contextlib.contextmanager
def ready_log(name: str, folder, settings: dict | None = None) -> Iterator[Log]:
    """Yield the log of that name, which is closed at the end of a ``with``.

    Of several processes the main one alone has it; those of the others do nothing.

    Args:
        name: one of :data:`LOGS`. ``tensorboard`` writes its files into the folder; the others
            write where their own settings say, into the project ``horse``.
        folder: of the training's archive; its name is that of the run.
        settings: of the run, for those that show them.

    Raises:
        UsageError: no such log, or its package is not installed.
    """
    if name not in LOGS:
        raise UsageError(f"log: {name!r} is not one of {', '.join(LOGS)}.")
    if not is_main_process():
        yield lambda figures: None
        return
    try:
        library = importlib.import_module(LOGS[name])
    except ImportError as error:
        raise not_installed("log", error, name) from None
    if name == "tensorboard":
        with library.SummaryWriter(str(Path(folder).expanduser())) as writer:
            yield lambda figures: _scalars(writer, figures)
        return
    library.init(project=PROJECT, name=Path(folder).name, config=settings or {})
    try:
        yield lambda figures: library.log(_without_step(figures), step=figures["step"])
    finally:
        library.finish()


def _without_step(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "step"}


def _scalars(writer, figures: dict[str, float]):
    for name, value in _without_step(figures).items():
        writer.add_scalar(name, value, figures["step"])
    writer.flush()  # so that it can be watched
