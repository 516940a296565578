"""What goes to disk: safetensors and JSON, written whole or not at all, checked when read.

An archive (a trained hypernetwork) and a checkpoint are one safetensors file each, with their
description as JSON in its header, so that one rename replaces both together. A delta is a folder
of ``delta.safetensors`` and ``edit.json``.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from .errors import HorseError, UsageError
from .hypernetwork import HyperNetwork

FORMAT = 1
ARCHIVE, CHECKPOINT = "archive.safetensors", "checkpoint.safetensors"


def write(path, data: bytes | str):
    """Write a file under its final name only once it is complete."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    with _said_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def check_writable(folder):
    """Fail now rather than after the work if nothing can be written into the folder.

    Raises:
        UsageError: it is a file, or cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror or error}.") from None


def check_empty(folder) -> Path:
    """The folder's path, if it is still to be made or holds nothing.

    Raises:
        UsageError: there is something of that name already.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: there is something already; choose a new folder.")
    return folder


@contextlib.contextmanager
def new_folder(path) -> Iterator[Path]:
    """A folder to fill, which takes its final name when done.

    Raises:
        UsageError: there is something of that name already.
    """
    path = check_empty(path)
    with _said_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield made
            made.chmod(0o777 & ~_umask())
            made.replace(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _said_plainly(path: Path):
    try:
        yield
    except OSError as error:
        advice = " Free space or choose another place." if error.errno == errno.ENOSPC else ""
        raise HorseError(f"{path}: not written: {error.strerror or error}.{advice}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(path, tensors: dict[str, torch.Tensor], about: dict):
    """Write tensors with a JSON description, and a digest of both, into one safetensors file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = {"format": FORMAT, **about}
    header = json.dumps({"about": about, "sha256": _digest(tensors, about)}, sort_keys=True)
    write(path, safetensors.torch.save(tensors, metadata={"horse": header}))


def load_tensors(path) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of :func:`save_tensors`.

    Raises:
        UsageError: no such file.
        HorseError: the file is damaged, or not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["horse"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about, digest = header["about"], header["sha256"]
    except Exception as error:  # whatever a damaged header provokes in the two parsers
        reason = (str(error).splitlines() or ["?"])[0]
        raise HorseError(f"{path}: damaged, or not a HORSE file ({reason}).") from None
    if digest != _digest(tensors, about):
        raise HorseError(f"{path}: damaged: its content does not match its checksum.")
    if (found := about.pop("format")) != FORMAT:
        raise HorseError(f"{path}: format {found}; this version reads {FORMAT}.")
    return tensors, about


def digest(text: str) -> str:
    """Twelve hex digits that tell this text from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _digest(tensors: dict[str, torch.Tensor], about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def network_tensors(network: HyperNetwork) -> dict[str, torch.Tensor]:
    return {f"network.{name}": t for name, t in network.state_dict().items()}


def network_about(network: HyperNetwork) -> dict:
    """What is needed, beside the tensors, to build the network again."""
    block = next(iter(network.groups.values())).blocks
    return {
        "shapes": [list(s) for s in network.shapes],
        "rank": block[0].A.shape[1],
        "n_blocks": len(block),
        "spread": network.spread,
        "coefficient": network.coefficient,
    }


def load_network(folder, backbone) -> tuple[HyperNetwork, dict]:
    """A trained hypernetwork and its description, for use with ``backbone``.

    Raises:
        UsageError: no archive there, or one for another model or other modules.
        HorseError: a damaged archive.
    """
    network, about = read_network(folder)
    check_model(Path(folder, ARCHIVE), about, backbone)
    return place(network, backbone), about


def read_network(folder) -> tuple[HyperNetwork, dict]:
    """A trained hypernetwork and its description, whatever model they are for.

    Raises:
        UsageError: no archive there.
        HorseError: a damaged archive.
    """
    path = Path(folder, ARCHIVE)
    if not path.is_file():
        raise UsageError(f"archive: {folder} holds no {ARCHIVE}.")
    tensors, about = load_tensors(path)
    if about.get("kind") != "hypernetwork":
        raise UsageError(f"{path}: holds no hypernetwork.")
    network = HyperNetwork(**about["network"])
    network.load_state_dict(
        {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
    )
    return network, about


def place(network: HyperNetwork, backbone) -> HyperNetwork:
    """The network where the model's edits are decided, in their precision."""
    if backbone.edit_dtype is torch.float64:
        network.double()
    return network.to(backbone.edit_device)


def check_model(path, about: dict, backbone):
    """Refuse what was made for another model or other edit modules, by name.

    Raises:
        UsageError: naming both.
    """
    made, here = about["model"], backbone.fingerprint()
    if not same_model(made, here):
        raise UsageError(
            f"{path}: made for {_model_name(made)}, but this model is {_model_name(here)}."
        )
    if about["modules"] != list(backbone.modules):
        missing = [m for m in about["modules"] if m not in backbone.modules]
        raise UsageError(
            f"{path}: made for the modules {', '.join(about['modules'])}; "
            f"inner_params names others ({'without ' + missing[0] if missing else 'more'})."
        )


def same_model(a: dict, b: dict) -> bool:
    """Equal architecture and sizes, and embeddings that agree up to the rounding of a dtype."""
    names = ("architecture", "n_blocks", "hidden_size", "vocab_size")
    rows = zip(a["embedding_norms"], b["embedding_norms"], strict=True)
    return all(a[n] == b[n] for n in names) and all(
        abs(x - y) <= 2e-3 * max(abs(x), abs(y)) for x, y in rows
    )


def _model_name(fingerprint: dict) -> str:
    return "{name} ({architecture}, {n_blocks} blocks, width {hidden_size})".format(**fingerprint)
