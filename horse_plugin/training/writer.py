"""The files of a run, written by a thread while training goes on."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from horse_plugin.distributed import is_main_process, raise_on_all_ranks
from horse_plugin.storage.tensors import save_tensors
from horse_plugin.training.history import save_history

Part = tuple[str, dict[str, torch.Tensor], dict]  # a file: its name, tensors and description


class Writer:
    """Writes the archive, the checkpoint and the history of a run into its folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._written: Future | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the thread for the length of a ``with``, whose end waits for what it writes."""
        with ThreadPoolExecutor(1) as self._thread:
            yield

    def save(self, history: list[dict], *makers: Callable[[], Part]):
        """Have the thread write files one after the other, then the history.

        Training goes on meanwhile, at most until the next ones are to be written. Of several
        processes, only the main one makes and writes them.
        """
        self.wait()
        if is_main_process():
            parts = [make() for make in makers]
            self._written = self._thread.submit(_write, self.folder, parts, list(history))

    def wait(self):
        """Wait for the thread, and raise the error that it ended with, if it did.

        All processes wait, since each of them reads the archive next.
        """
        written, self._written = self._written, None
        with raise_on_all_ranks():
            if written:
                written.result()


def _write(folder: Path, parts: Sequence[Part], history: list[dict]):
    for name, tensors, about in parts:
        save_tensors(folder / name, tensors, about)
    save_history(folder, history)
