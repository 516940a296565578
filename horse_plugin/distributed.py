"""Several processes that work as one, started by torchrun, accelerate launch or Slurm's srun.

Every process (rank) holds the model and is given all the records. It runs its share of the prompts
through the model and holds the rows of their answer tokens; sums run over the rows of all ranks.
Without a process group there is one rank, which holds everything, and these functions change
nothing. Editing, training and evaluating are collective: every rank must make the same calls.
"""

import atexit
import contextlib
import os
import re
import zlib
from array import array
from collections.abc import Iterator, MutableMapping, Sequence
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist

from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HorseError, UsageError, reason

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets
SLURM = {"RANK": "PROCID", "WORLD_SIZE": "STEP_NUM_TASKS", "LOCAL_RANK": "LOCALID"}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # counts, labels and messages stay on the CPU


def initialize():
    """Join the processes that a launcher has started; each takes one GPU if there are any.

    Raises:
        UsageError: the caller has joined them in a way that HORSE cannot use.
    """
    if not dist.is_available():
        return
    if dist.is_initialized():
        if dist.get_world_size() > 1 and "cpu:" not in dist.get_backend_config():
            raise UsageError(
                "init_process_group: its group has no backend for the CPU, where counts and "
                'messages stay. Call it with "cpu:gloo,cuda:nccl".'
            )
        return
    _translate_slurm(os.environ)
    if not all(name in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        return
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")  # a launcher may show each process one GPU only
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backends = ",".join(f"{kind}:{BACKENDS[kind]}" for kind in kinds)
    dist.init_process_group(backends, timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)


def _translate_slurm(environment: MutableMapping[str, str]):
    """Say in torchrun's words what ``srun`` says of the tasks that it started; others come first.

    A batch script that starts one process without ``srun`` has no number of tasks of its step.
    """
    if "RANK" in environment or environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    environment |= {name: environment[f"SLURM_{theirs}"] for name, theirs in SLURM.items()}
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    environment.setdefault("MASTER_ADDR", "".join(filter(None, first.groups())))
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000  # jobs may share a host
    environment.setdefault("MASTER_PORT", str(port))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Return the number of this rank."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """Return whether this is the rank that writes and prints."""
    return rank() == 0


def shard(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return, for each rank, the indices of the prompts that it runs.

    A prompt's tokens decide, so that it always comes to the rank that caches its trunk states.
    """
    n_ranks = world_size()
    shards = [[] for _ in range(n_ranks)]
    for i, p in enumerate(prompts):
        shards[zlib.crc32(array("q", p.inputs)) % n_ranks if n_ranks > 1 else 0].append(i)
    return shards


def local_indices(prompts: Sequence[Prompt]) -> list[int]:
    """Return the indices of the prompts that this rank runs."""
    return shard(prompts)[rank()]


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of x over the ranks, the same bits on each. It is differentiable."""
    if not _is_distributed():
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x)


def mean_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean over the rows of all ranks."""
    if not _is_distributed():
        return rows.mean(0)
    count = torch.tensor(len(rows), dtype=rows.dtype, device=rows.device)
    return sum_over_ranks(rows.sum(0)) / sum_over_ranks(count)


def row_range(n: int) -> tuple[int, slice]:
    """Return how many rows all ranks hold if this one holds n, and which of them are this one's."""
    counts = torch.zeros(world_size(), dtype=torch.long)
    counts[rank()] = n
    counts = sum_over_ranks(counts).tolist()
    begin = sum(counts[: rank()])
    return sum(counts), slice(begin, begin + n)


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, in the order of the ranks, which may hold different numbers."""
    if not _is_distributed():
        return x
    n, local = row_range(len(x))
    gathered = x.new_zeros(n, *x.shape[1:])
    gathered[local] = x
    return sum_over_ranks(gathered)


def gather_answers(prompts: Sequence[Prompt], local: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return one value per answer token of every prompt, on the CPU.

    Args:
        prompts: all the prompts.
        local: for each prompt of this rank, in the order of :func:`local_indices`, one value per
            answer token, whole numbers.
    """
    values = torch.cat(list(local)).cpu() if local else torch.empty(0, dtype=torch.long)
    order = list(chain(*shard(prompts)))
    parts = gather_rows(values).split([len(prompts[i].answer) for i in order])
    by_index = dict(zip(order, parts, strict=True))
    return [by_index[i] for i in range(len(prompts))]


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Re-raise on every rank an error raised on any rank, so that no rank waits for a failed one.

    No collective function may be called inside.

    Raises:
        HorseError: on the other ranks, with the message of the failed one.
    """
    error = None
    try:
        yield
    except Exception as raised:
        if not _is_distributed():
            raise
        error = raised
    if _is_distributed():
        messages = [None] * world_size()
        dist.all_gather_object(messages, reason(error) if error else None)
        if error:
            raise error
        for message in messages:
            if message is not None:
                raise HorseError(message)
