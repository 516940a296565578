"""Rows of ``results.json``: one measured model each, comparable across methods."""

import contextlib
import json
import resource
import sys
from pathlib import Path

import torch

from horse_plugin.editing.editor import versions
from horse_plugin.evaluation.metrics import Evaluation
from horse_plugin.storage import archive


def row(method: str, dataset: str, hparams, evaluation: Evaluation, edit_seconds=None) -> dict:
    """One object of ``results.json``; figures in percent, null where none applies.

    Args:
        method: a name such as ``HORSE`` or ``unedited``.
        dataset: what the records came from.
        edit_seconds: what the edit took, loading and evaluation left out.
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


def peak_memory_mb() -> float:
    """Peak memory so far: of the GPU where there is one, of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reset_peak_memory():
    """Let :func:`peak_memory_mb` count from now on, where the system can (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def save(path, rows: list[dict]):
    archive.write(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
