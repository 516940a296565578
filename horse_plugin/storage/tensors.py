"""Tensors and what describes them in one safetensors file, so that one rename replaces both."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from horse_plugin.errors import HorseError, UsageError, first_line
from horse_plugin.storage.digest import tensors_digest
from horse_plugin.storage.files import check_name, write

FORMAT = 1


def save_tensors(path, tensors: dict[str, torch.Tensor], about: dict):
    """Write tensors, their JSON description, and a digest of both.

    Args:
        path: of the file.
        tensors: name → tensor.
        about: the description, which must be plain JSON.

    Raises:
        HorseError: the file could not be written.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = _header(tensors, {"format": FORMAT, **about})
    write(path, safetensors.torch.save(tensors, metadata={"horse": header}))


def _header(tensors: dict[str, torch.Tensor], about: dict) -> str:
    return json.dumps({"about": about, "sha256": tensors_digest(tensors, about)}, sort_keys=True)


def load_tensors(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the description that :func:`save_tensors` wrote.

    Raises:
        UsageError: there is no such file, or its name is not UTF-8.
        HorseError: the file is damaged, or is not ours.
    """
    check_name(path)
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {})["horse"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(header)["about"]
        found = about["format"]
        whole = header == _header(tensors, about)  # to the letter: JSON has several ways to say 1e5
    except Exception as error:  # whatever a damaged header provokes in the two parsers
        raise HorseError(f"{path}: damaged, or not a HORSE file ({first_line(error)}).") from None
    if not whole:
        raise HorseError(f"{path}: damaged: its content does not match its checksum.")
    if found != FORMAT:
        raise HorseError(f"{path}: format {found}; this version reads {FORMAT}.")
    del about["format"]
    return tensors, about
