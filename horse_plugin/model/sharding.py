"""The trunk's weights shared out over the processes (FSDP2), where no GPU holds the whole model.

Each process holds an equal part of attention and MLP of every block below the lowest edited one.
The parts come together for the length of a pass, so that all processes run the trunk as often as
each other.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from horse_plugin import distributed
from horse_plugin.errors import UsageError


def check_shards(hparams):
    """Refuse settings that a sharded trunk does not fit.

    Raises:
        UsageError: the message says what to change.
    """
    if distributed.world_size() == 1:
        raise UsageError(
            "shard_trunk: shares the trunk out over several processes, but there is one. Start "
            "them with torchrun, or set shard_trunk: false."
        )
    if hparams.trunk_bits:
        raise UsageError("shard_trunk: a trunk in trunk_bits is not sharded. Choose one of them.")


def shard(model, blocks: Sequence[nn.Module], device: torch.device):
    """Leave this process its part of the blocks, and put it and the rest of the model on a device.

    Args:
        model: a model on the CPU, whose parameters take no gradient.
        blocks: the blocks of its trunk, of which one is on the device as a whole at a time.

    Raises:
        UsageError: torch is too old, or there is no block to shard.
    """
    # Before 2.8 what stands alone, as each part of a block does here, keeps what it gathered.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        raise UsageError(f"shard_trunk: needs torch 2.8 or later, and this is {torch.__version__}.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not blocks:
        raise UsageError("shard_trunk: the lowest block is edited (inner_params), so none is left.")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in blocks:
        for part in block.children():  # so that a block which is skipped gathers nothing
            if any(p.dim() > 1 for p in part.parameters()):  # else a norm, which is small
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
    model.to(device)


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a sharded weight, or the weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


class Lockstep:
    """Lets all processes run a sharded trunk as often as each other.

    Args:
        run_empty: runs the trunk for its parts alone; None if the trunk is not sharded.
    """

    def __init__(self, run_empty: Callable[[], object] | None):
        self._run_empty = run_empty

    @property
    def is_sharded(self) -> bool:
        return self._run_empty is not None

    def run(self, pass_of_trunk: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the trunk, with all processes.

        One that fails half-way ends, for the others wait for its parts and hear of nothing else.
        """
        if not self.is_sharded:
            return pass_of_trunk()
        _any_runs(True)
        try:
            return pass_of_trunk()
        except Exception as error:
            raise SystemExit(f"horse: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def loop(self) -> Iterator[None]:
        """Run passes of the trunk in a ``with``; what fails in one process fails in all.

        A process that is done takes part in the passes of the others. No collective function may
        be called inside.
        """
        with distributed.raise_on_all_ranks():
            error = None
            try:
                yield
            except Exception as raised:
                error = raised
            while self.is_sharded and _any_runs(False):
                self._run_empty()
            if error:
                raise error


def _any_runs(runs: bool) -> bool:
    """Return whether any process runs the trunk next; each says so before a pass, or after all."""
    return bool(distributed.sum_over_ranks(torch.tensor(float(runs))))
