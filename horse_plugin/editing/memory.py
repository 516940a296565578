"""What an edit or a training step takes beside the model, estimated before the work."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from horse_plugin import distributed
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.ridge import doubles_are_fast
from horse_plugin.model.backbone import Backbone

GB = 1e9
# Where the system says which control group a process is in, and what groups may take.
OWN_GROUP, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def check_memory(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    hparams: HORSEHyperParams,
    training: bool = False,
    on_top: bool = False,
    sums: int = 0,
    advice: str = "Edit fewer facts at once",
):
    """Refuse an edit or a training step that would take more memory than is allowed, or is free.

    Args:
        hparams: ``edit_memory_gb`` is the most that it may take; None is what is free.
        training: whether it is a training step.
        on_top: whether edits are in force that it keeps.
        sums: how often the sums of an edit in blocks are in memory.
        advice: what to do instead.

    Raises:
        HorseError: it would take more, in this process or in another one; the message says how
            much.
    """
    with distributed.raise_on_all_ranks():
        needed = needed_bytes(backbone, prompts, hparams, training, on_top)
        needed += sums * sum(8 * d * (d + d_out) for d, d_out in backbone.shapes)
        limit = hparams.edit_memory_gb
        allowed = free_bytes(backbone.edit_device) if limit is None else limit * GB
        if allowed is None or needed <= allowed:
            return
        of = "are free" if limit is None else "are allowed (edit_memory_gb)"
        if backbone.keys_device == backbone.edit_device != torch.device("cpu"):
            advice += ", or set offload_keys: true"
        raise HorseError(
            f"edit_memory_gb: {len(prompts):,} prompts take about {needed / GB:.1f} GB beside the "
            f"model, and {allowed / GB:.1f} GB {of}. {advice}."
        )


def check_edit_memory(
    backbone: Backbone, prompts: Sequence[Prompt], hparams: HORSEHyperParams, **options
):
    """Do what :func:`check_memory` does for an edit of so many prompts, in blocks if it is in such.

    Raises:
        UsageError: it would be in blocks, and there are several processes.
        HorseError: as :func:`check_memory`.
    """
    check_blocks(prompts, hparams)
    block = prompts[: hparams.edit_block]
    sums = 1 if hparams.edit_sweeps == 1 else 2
    sums = sums if len(prompts) > len(block) else 0
    check_memory(backbone, block, hparams, sums=sums, **options)


def check_blocks(prompts: Sequence[Prompt], hparams: HORSEHyperParams):
    """Refuse an edit in blocks where several processes make it.

    Raises:
        UsageError: there are several, and more prompts than ``edit_block``.
    """
    if distributed.world_size() > 1 and len(prompts) > hparams.edit_block:
        raise UsageError(
            f"edit_block: several processes edit {len(prompts):,} prompts at once, in no "
            f"blocks of {hparams.edit_block:,}. Raise it, or edit in one process."
        )


def needed_bytes(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    hparams: HORSEHyperParams,
    training: bool = False,
    on_top: bool = False,
) -> float:
    """Return the bytes that an edit or a training step takes beside the model, about.

    Args:
        prompts: those that it captures.
        on_top: whether edits are in force that it keeps.
    """
    local = [prompts[i] for i in distributed.local_indices(prompts)]
    n, n_all = (sum(len(p.keys_at) for p in of) for of in (local, prompts))
    if training:
        return training_bytes(backbone, n, hparams, n_all)
    return edit_bytes(backbone, n, hparams, on_top, n_all)


def edit_bytes(
    backbone: Backbone,
    n: int,
    hparams: HORSEHyperParams,
    on_top: bool = False,
    n_all: int | None = None,
) -> float:
    """Return the bytes that an edit of n answer tokens takes beside the model, about.

    Counted are keys and gradients (Sec. 2.1), residuals (Eq. 4), the metric, the largest system of
    Eq. 2 or a pass of the network if that is larger, the shifts, and the weights as they were. An
    edit on top of others also takes their shifts and what they write at its keys. A pass of the
    model, which ``batch_tokens`` bounds, is left out.

    Args:
        on_top: whether edits are in force that it keeps.
        n_all: the answer tokens of all processes; None is n.
    """
    item, shapes = torch.finfo(backbone.edit_dtype).bits // 8, backbone.shapes
    captures = 1 if hparams.edit_sweeps == 1 else 2  # the earlier one, while the next is made
    rows = _captured(backbone, captures) + captures * item * sum(1 + d_out for _, d_out in shapes)
    systems = [_system(backbone, n, n_all or n, *shape) for shape in shapes]
    shifts = sum(min(n * (d + d_out), d * d_out) for d, d_out in shapes)
    if on_top:
        rows += item * max(d + 2 * d_out for d, d_out in shapes)
        shifts = sum(2 * d * d_out for d, d_out in shapes)  # none is kept as factors
    metric = sum(d * d for d, _ in shapes) if hparams.preserve != "none" else 0
    numbers = max(*systems, _chunk(backbone, n, hparams)) + shifts + metric
    return n * rows + item * numbers + _weights(backbone)


def training_bytes(
    backbone: Backbone, n: int, hparams: HORSEHyperParams, n_all: int | None = None
) -> float:
    """Return the bytes that a training step on n answer tokens takes beside the model, about.

    Counted are keys and gradients of all sweeps, residuals before and after the spread with their
    gradients, all systems of Eq. 2 with the shifts and the gradients at the weights, the network's
    graph of one chunk, the network with its optimiser, the metric, and the weights as they were.

    Args:
        n_all: the answer tokens of all processes; None is n.
    """
    n_all = n_all or n
    item, shapes = torch.finfo(backbone.edit_dtype).bits // 8, backbone.shapes
    sweeps, widths = hparams.train_sweeps or hparams.edit_sweeps, sum(d_out for _, d_out in shapes)
    rows = _captured(backbone, sweeps) + item * (5 * sweeps + 2) * widths
    has_metric = hparams.preserve != "none"
    metric = sum(d * d for d, _ in shapes) if has_metric else 0
    is_moved = backbone.keys_device != backbone.edit_device
    is_moved |= backbone.model.dtype != backbone.edit_dtype
    copies = has_metric + is_moved  # H', and H in float32 on the device
    wide = _numbers_of_a_double(backbone)
    systems = sum(wide * min(n_all, d) ** 2 + copies * _rows(n, n_all, d) * d for d, _ in shapes)
    systems += max(_system(backbone, n, n_all, *shape) for shape in shapes)
    shifts = sum(2 * d * d_out for d, d_out in shapes)
    chunk = _chunk(backbone, n, hparams) * (1 + hparams.n_blocks)
    network = sum(
        hparams.n_blocks * sum(shape) * (2 * hparams.rank + 1 + 2 * shapes.count(shape))
        for shape in set(shapes)
    )
    numbers = systems + shifts + metric + chunk + 4 * network
    return n * rows + item * numbers + 2 * _weights(backbone)


def _captured(backbone: Backbone, times: int) -> int:
    """Return the bytes of an answer token's keys and gradients, captured so many times.

    Where they wait in the memory of the CPU, it is those of one edit module, once.
    """
    modules = zip(backbone.modules.values(), backbone.shapes, strict=True)
    each = [(d + d_out) * module.weight.element_size() for module, (d, d_out) in modules]
    return times * sum(each) if backbone.keys_device == backbone.edit_device else max(each)


def _weights(backbone: Backbone) -> int:
    return sum(module.weight.nbytes for module in backbone.modules.values())


def _chunk(backbone: Backbone, n: int, hparams: HORSEHyperParams) -> int:
    """Return how many numbers the hypernetwork takes for each of its blocks in one pass."""
    return 5 * min(n, hparams.editor_batch_size) * max(sum(shape) for shape in backbone.shapes)


def _system(backbone: Backbone, n: int, n_all: int, d: int, d_out: int) -> int:
    """Return how many numbers Eq. 2 takes for n keys of one edit module, of n_all."""
    square = _numbers_of_a_double(backbone) * min(n_all, d) ** 2
    return 3 * square + _rows(n, n_all, d) * d + d * d_out


def _rows(n: int, n_all: int, d: int) -> int:
    """Return how many keys a process holds in Eq. 2: in the dual those of all processes."""
    return n_all if n_all < d else n


def _numbers_of_a_double(backbone: Backbone) -> int:
    """Return how many numbers one of a Gram matrix takes: GPUs may compute it in float64."""
    return 2 if doubles_are_fast(backbone.edit_device) and backbone.edit_dtype.itemsize < 8 else 1


def free_bytes(device: torch.device) -> float | None:
    """Return the memory that is free on a device, or None where the system does not say.

    Of a CPU it is what the system has, or what a control group of this process has left. Pages
    of files that the system keeps at hand count as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError):  # another system
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    return min([*found, *_left_in_groups()], default=None)


def _left_in_groups() -> Iterator[float]:
    """Yield what the control group of this process, and each above it, has left of its limit."""
    path = ""
    with contextlib.suppress(OSError, StopIteration):
        lines = OWN_GROUP.read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::")).strip("/")
    for group in (CONTROL_GROUPS / path, *(CONTROL_GROUPS / path).parents):
        if not group.is_relative_to(CONTROL_GROUPS):
            break
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or no limit
            names = ("memory.max", "memory.current", "memory.stat")
            limit, used, stat = ((group / name).read_text() for name in names)
            of = dict(line.split() for line in stat.splitlines())
            yield int(limit) - int(used) + int(of["active_file"]) + int(of["inactive_file"])
