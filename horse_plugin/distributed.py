"""Several processes that edit, train and evaluate as one, started by torchrun or accelerate launch.

Every process holds the model and is given all the records. Each runs the prompts that are its own
through the model and holds the rows of their answer tokens; sums go over the rows of all. Without
a process group there is one process, whose own is everything, and the functions change nothing.
Editing, training and evaluating are collective: every process makes the same calls.
"""

import atexit
import contextlib
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HorseError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets


def start():
    """Join the processes that the launcher has started; each takes a GPU if there are any."""
    launched = all(name in os.environ for name in LAUNCHED) and dist.is_available()
    if not launched or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(timeout=timedelta(hours=2))  # gloo for the CPU, NCCL for GPUs
    atexit.register(dist.destroy_process_group)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    return dist.get_rank() if _together() else 0


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def shares(prompts: Sequence[Prompt]) -> list[list[int]]:
    """For each process, the places of the prompts that are its own.

    A prompt's tokens decide, so that it comes back to the process that keeps its trunk states.
    """
    found = [[] for _ in range(size())]
    for i, p in enumerate(prompts):
        found[zlib.crc32(array("q", p.inputs)) % len(found) if len(found) > 1 else 0].append(i)
    return found


def own(prompts: Sequence[Prompt]) -> list[int]:
    """The places of this process's prompts."""
    return shares(prompts)[rank()]


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, in each of them the same bits. Gradients go through it."""
    if not _together():
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x)


def mean(rows: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of all processes."""
    if not _together():
        return rows.mean(0)
    count = torch.tensor(len(rows), dtype=rows.dtype, device=rows.device)
    return total(rows.sum(0)) / total(count)


def rows(n: int) -> tuple[int, slice]:
    """How many rows there are if this process has n, and which of them are its own."""
    counts = torch.zeros(size(), dtype=torch.long)
    counts[rank()] = n
    counts = total(counts).tolist()
    begin = sum(counts[: rank()])
    return sum(counts), slice(begin, begin + n)


def gather(x: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, by rank; each may have another number of them, or none."""
    if not _together():
        return x
    n, place = rows(len(x))
    everything = x.new_zeros(n, *x.shape[1:])
    everything[place] = x
    return total(everything)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails within in one process fails in all of them: none waits for ever for another.

    Nothing collective may be called within.

    Raises:
        HorseError: where another process failed, with what it said.
    """
    error = None
    try:
        yield
    except Exception as failed:
        if not _together():
            raise
        error = failed
    if _together():
        said = [None] * size()
        dist.all_gather_object(said, error and f"{error}")
        if error:
            raise error
        for text in filter(None, said):
            raise HorseError(text)
