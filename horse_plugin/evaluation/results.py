"""Rows of ``results.json``: one measured model each, comparable across methods."""

import contextlib
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

from horse_plugin.evaluation.metrics import Evaluation
from horse_plugin.model.loading import gpus_in_use
from horse_plugin.storage.files import to_json, write

try:
    import resource
except ImportError:  # Windows has none
    resource = None

T = TypeVar("T")
STATUS = Path("/proc/self/status")


def row(method: str, dataset: str, hparams, evaluation: Evaluation, edit_seconds=None) -> dict:
    """Return one object of ``results.json``; figures are in percent, drift in nats a token.

    A figure that does not apply is None.

    Args:
        method: a name such as ``HORSE`` or ``unedited``.
        dataset: the name of what the records came from.
        hparams: the settings, for the model's name and the seed.
        edit_seconds: how long the edit took, without loading and evaluation.
    """
    return {
        "method": method,
        "dataset": dataset,
        "model": hparams.model_name,
        "n_edits": len(evaluation.records),
        **evaluation.summary(),
        "edit_seconds": edit_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "seed": hparams.seed,
        "versions": versions(),
    }


def save(path, rows: list[dict]):
    """Write the rows as JSON."""
    write(path, to_json(rows) + "\n")


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("horse_plugin", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory_mb() -> float | None:
    """Return the peak memory of the process so far in MiB: on all GPUs if it uses any.

    None is unknown, as on Windows.
    """
    if gpus := gpus_in_use():
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**20
    if resource is None:
        return None
    with contextlib.suppress(OSError, StopIteration):
        # ru_maxrss would count what the process had before it became this program: its parent's.
        lines = STATUS.read_text().splitlines()
        peak = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(peak) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reset_peak_memory():
    """Let :func:`peak_memory_mb` count from now on, where the system can (CUDA, Linux)."""
    for gpu in gpus_in_use():
        torch.cuda.reset_peak_memory_stats(gpu)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def timed(run: Callable[[], T], *devices: torch.device) -> tuple[float, T]:
    """Return the seconds until all devices have done a function's work, and its result."""
    start = time.perf_counter()
    result = run()
    wait_for(*devices)
    return time.perf_counter() - start, result


def wait_for(*devices: torch.device):
    """Wait until GPUs have done what they were asked for."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
