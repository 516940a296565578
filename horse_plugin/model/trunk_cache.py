"""Trunk states kept from one call to the next: in memory, and beyond it in memory-mapped files."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from horse_plugin.model.sharding import local_part
from horse_plugin.storage.digest import sum_of_bits
from horse_plugin.storage.files import check_writable


class TrunkCache:
    """The hidden states of prompts, L×d each, found by their token ids.

    All are dropped once one of the weights that made them has been written to, or once
    :meth:`check` finds another trunk. A file loses its name as soon as it is mapped, so that its
    room on the disk is free again when the states are dropped or the process ends, however it ends.

    Args:
        weights: returns the trunk's parameters and buffers, as they are now.
        probe: returns what the trunk makes of a few tokens.
        memory_gb: room in the memory of the device that computes the states, in 10⁹ bytes.
        disk_gb: room in files, used after that, in 10⁹ bytes.
        folder: the folder of the files; None is the system's folder for temporary files.

    Attributes:
        full: whether there is no room left.

    Raises:
        UsageError: nothing can be written into the folder.
    """

    def __init__(
        self,
        weights: Callable[[], list[torch.Tensor]],
        probe: Callable[[], torch.Tensor],
        memory_gb: float = 0.0,
        disk_gb: float = 0.0,
        folder=None,
    ):
        self._find_weights, self._probe = weights, probe
        self._folder = folder or tempfile.gettempdir()
        self._limits = {"memory": int(memory_gb * 1e9), "disk": int(disk_gb * 1e9)}
        if disk_gb:
            check_writable(self._folder)
        self._forget()

    def _forget(self):
        self._weights, self._trunk = self._find_weights(), None
        self._versions = [p._version for p in self._weights]
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}
        self._room = dict(self._limits)
        self.full = not any(self._room.values())

    def check(self):
        """Drop the states if they are not of the trunk as it is now.

        No count of writes tells ``p.data = …``, another parameter, or a switched adapter. So the
        bits of all weights are summed, row by row, and a few tokens run through the trunk.
        """
        if self._kept and self._describe() != self._trunk:
            self._forget()

    def _describe(self) -> tuple:
        weights = [w for w in self._find_weights() if not w.is_meta]
        return [(id(w), sum_of_bits(local_part(w))) for w in weights], self._probe().tolist()

    def _drop_stale(self):
        if [p._version for p in self._weights] != self._versions:
            self._forget()

    @contextlib.contextmanager
    def for_a_while(self, anew: bool = False) -> Iterator[None]:
        """Drop at the end of a ``with`` what was kept inside it.

        Args:
            anew: whether nothing that was kept before is found inside, as by a first edit.
        """
        self._drop_stale()
        names = ("_weights", "_trunk", "_versions", "full")
        before = {name: getattr(self, name) for name in names}
        before |= {"_kept": dict(self._kept), "_room": dict(self._room)}
        if anew:  # with room of its own, since what is there stays for afterwards
            self._kept, self._room = {}, dict(self._limits)
            self.full = not any(self._room.values())
        try:
            yield
        finally:
            vars(self).update(before)
            self._drop_stale()

    def missing(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the prompts whose states are not kept."""
        self._drop_stale()
        return [p for p in prompts if p not in self._kept]

    def get(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor | None]:
        """Return each prompt's states, on the device that computed them, or None if not kept."""
        self._drop_stale()
        found = (self._kept.get(p) for p in prompts)
        return [None if s is None else s.to(self._device, non_blocking=True) for s in found]

    def put(self, prompts: Sequence[tuple[int, ...]], states: Sequence[torch.Tensor]):
        """Keep the states of these prompts, if there is room for all of them."""
        self._drop_stale()
        self._device = states[0].device
        sizes = [s.numel() for s in states]
        room = self._allocate(sum(sizes), states[0])
        if room is None:
            self.full = True
            return
        if not self._kept:
            self._trunk = self._describe()
        for prompt, s, part in zip(prompts, states, room.split(sizes), strict=True):
            self._kept[prompt] = part.view(s.shape).copy_(s)

    def _allocate(self, n: int, like: torch.Tensor) -> torch.Tensor | None:
        """Return room for n numbers in memory, else in a file, else None."""
        n_bytes = n * like.element_size()
        where = next((w for w in self._room if self._room[w] >= n_bytes), None)
        if where is None:
            return None
        self._room[where] -= n_bytes
        if where == "memory":
            try:
                return like.new_empty(n)
            except torch.OutOfMemoryError:  # states are kept for speed only
                self._room["memory"] = 0
                warnings.warn("trunk_cache_gb: no memory is free for more states", stacklevel=5)
                return self._allocate(n, like)
        handle, path = tempfile.mkstemp(".states", "horse-", self._folder)
        try:
            _reserve(handle, n_bytes)
            return torch.from_file(path, shared=True, size=n, dtype=like.dtype)
        except OSError as error:
            warnings.warn(f"trunk states: {self._folder}: {error.strerror}", stacklevel=5)
            return None
        finally:
            os.close(handle)
            os.unlink(path)


def _reserve(handle: int, n_bytes: int):
    """Take the room on the disk now: a full disk is an error here, and no crash later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, n_bytes)
        return
    while n_bytes > 0:  # macOS
        n_bytes -= os.write(handle, bytes(min(n_bytes, 2**20)))
