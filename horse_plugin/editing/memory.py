"""What an edit takes beside the model, estimated before the work."""

from collections.abc import Sequence
from pathlib import Path

import torch

from horse_plugin import distributed
from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import HorseError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.model.backbone import Backbone

GB = 1e9
CONTROL_GROUP = Path("/sys/fs/cgroup")


def check_memory(backbone: Backbone, prompts: Sequence[Prompt], hparams: HORSEHyperParams):
    """Refuse an edit that would take more memory than is allowed, or than is free.

    Args:
        hparams: ``edit_memory_gb`` is the most that it may take; None is what is free.

    Raises:
        HorseError: it would take more; the message says how much.
    """
    needed, limit = needed_bytes(backbone, prompts, hparams), hparams.edit_memory_gb
    allowed = free_bytes(backbone.edit_device) if limit is None else limit * GB
    if allowed is None or needed <= allowed:
        return
    of = "are free" if limit is None else "are allowed (edit_memory_gb)"
    raise HorseError(
        f"edit_memory_gb: {len(prompts):,} prompts take about {needed / GB:.1f} GB beside the "
        f"model, and {allowed / GB:.1f} GB {of}. Edit fewer facts at once."
    )


def needed_bytes(backbone: Backbone, prompts: Sequence[Prompt], hparams: HORSEHyperParams) -> float:
    """Return the bytes that an edit of these prompts takes beside the model, about.

    Counted are keys and gradients (Sec. 2.1), residuals (Eq. 4), the metric, the largest system of
    Eq. 2, the shifts, and the weights as they were. An edit on top of others also takes their
    shifts and what they ask for, and solves in float64 for that. A pass of the model, which
    ``batch_tokens`` bounds, is left out.
    """
    local = distributed.local_indices(prompts)
    n = sum(len(prompts[i].keys_at) for i in local)
    below = sum(len(prompts[i].keys_at) for i in local if prompts[i].in_force)
    item = torch.finfo(backbone.edit_dtype).bits // 8
    captures = 1 if hparams.edit_sweeps == 1 else 2  # the earlier one, while the next is made
    modules = zip(backbone.modules.values(), backbone.shapes, strict=True)
    captured = sum(captures * (d + d_out) * m.weight.element_size() for m, (d, d_out) in modules)
    rows = sum(captures * (1 + d_out) for _, d_out in backbone.shapes)
    systems = [_system(n, *shape) for shape in backbone.shapes]
    shifts = sum(min(n * (d + d_out), d * d_out) for d, d_out in backbone.shapes)
    if below:
        rows += sum(2 * d_out for _, d_out in backbone.shapes)
        systems += [2 * _system(below, *shape) for shape in backbone.shapes]
        shifts = sum(2 * d * d_out for d, d_out in backbone.shapes)  # none is kept as factors
    metric = sum(d * d for d, _ in backbone.shapes) if hparams.preserve != "none" else 0
    weights = sum(module.weight.nbytes for module in backbone.modules.values())
    return n * captured + item * (n * rows + max(systems) + shifts + metric) + weights


def _system(n: int, d: int, d_out: int) -> int:
    """Return how many numbers Eq. 2 takes for n keys of one edit module."""
    return 3 * min(n, d) ** 2 + n * d + d * d_out


def free_bytes(device: torch.device) -> float | None:
    """Return the memory that is free on a device, or None where the system does not say.

    Of a CPU it is what the system has, or what the control group of this process has left. Pages
    of files that the system keeps at hand count as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
        names = ("memory.max", "memory.current", "memory.stat")
        limit, used, stat = ((CONTROL_GROUP / name).read_text() for name in names)
        of = dict(line.split() for line in stat.splitlines())
        found.append(int(limit) - int(used) + int(of["active_file"]) + int(of["inactive_file"]))
    except (OSError, ValueError, KeyError):  # another system, or no limit
        pass
    return min(found, default=None)
