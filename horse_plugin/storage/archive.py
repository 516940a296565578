"""What goes to disk: safetensors and JSON, written whole or not at all, checked when read.

An archive (a trained hypernetwork) and a checkpoint are one safetensors file each, with their
description as JSON in its header, so that one rename replaces both together. A delta is a folder
of ``delta.safetensors`` and ``edit.json``. A checksum tells accidents, not forgeries: whatever is
read is also checked for its form, by name.
"""

import contextlib
import fcntl
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

from horse_plugin import distributed as parallel
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.method.hypernetwork import HyperNetwork

FORMAT = 1
ARCHIVE, CHECKPOINT = "archive.safetensors", "checkpoint.safetensors"
PART = ".part"  # ends the name of what is still being written


def write(path, data: bytes | str):
    """Write a file under its final name only once it is complete."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    with _said_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
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
        made = Path(tempfile.mkdtemp(PART, f".{path.name}.", path.parent))
        try:
            yield made
            made.chmod(0o777 & ~_umask())
            made.replace(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def only_process(folder) -> Iterator[Path]:
    """Hold the folder, which is made if need be, against other processes that write into it.

    Of several processes that work as one, only the first writes, and holds it.

    The system lets go of it when the process ends, however it ends; what a killed one had begun
    to write is swept away by the next.

    Raises:
        HorseError: another process holds it.
        UsageError: it cannot be made or written to.
    """
    folder = Path(folder)
    if not parallel.first():
        yield folder
        return
    check_writable(folder)
    handle = os.open(folder, os.O_RDONLY)  # the folder is its own lock file
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise HorseError(
            f"{folder}: another process is writing into it. Wait for it, or choose another folder."
        ) from None
    try:
        for part in folder.glob(f".*{PART}"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        yield folder
    finally:
        os.close(handle)


@contextlib.contextmanager
def _said_plainly(path: Path):
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
    except safetensors.SafetensorError as error:  # how save_pretrained meets a full disk
        reason = str(error)
    else:
        return
    raise HorseError(f"{path}: not written: {reason}. Is there space, and a right to write?")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(path, tensors: dict[str, torch.Tensor], about: dict):
    """Write tensors with a JSON description, and a digest of both, into one safetensors file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = _header(tensors, {"format": FORMAT, **about})
    write(path, safetensors.torch.save(tensors, metadata={"horse": header}))


def _header(tensors: dict[str, torch.Tensor], about: dict) -> str:
    return json.dumps({"about": about, "sha256": _digest(tensors, about)}, sort_keys=True)


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
            header = (file.metadata() or {})["horse"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(header)["about"]
        found = about["format"]
        whole = header == _header(tensors, about)  # to the letter: JSON has several ways to say 1e5
    except Exception as error:  # whatever a damaged header provokes in the two parsers
        reason = (str(error).splitlines() or ["?"])[0]
        raise HorseError(f"{path}: damaged, or not a HORSE file ({reason}).") from None
    if not whole:
        raise HorseError(f"{path}: damaged: its content does not match its checksum.")
    if found != FORMAT:
        raise HorseError(f"{path}: format {found}; this version reads {FORMAT}.")
    del about["format"]
    return tensors, about


def text_digest(text: str) -> str:
    """Twelve hex digits that tell this text from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# What every description must hold; more is left to those who read it.
MODEL = {
    "name": str,
    "architecture": str,
    "n_blocks": int,
    "hidden_size": int,
    "vocab_size": int,
    "embedding_norms": [(int, float)],
}
MADE_FOR = {"model": MODEL, "modules": [str], "hparams": {"alg_name": str}, "versions": {}}
NETWORK = {
    "shapes": [list],
    "rank": int,
    "n_blocks": int,
    "spread": str,
    "coefficient": str,
}


def check_form(path, value, form, where: str = ""):
    """Check what JSON held against its form.

    Args:
        form: a type or a tuple of types; a list of one form, for lists of it; or a dict of forms,
            for objects that hold at least these.

    Raises:
        HorseError: naming file and field.
    """
    outer = type(form) if isinstance(form, (dict, list)) else form
    if not isinstance(value, outer) or (isinstance(value, bool) and outer is not bool):
        found = "missing" if value is None else f"{type(value).__name__}, which it must not be"
        raise HorseError(f"{path}: damaged: field {where or 'about'!r} is {found}.")
    if isinstance(form, dict):
        for name, inner in form.items():
            check_form(path, value.get(name), inner, f"{where}.{name}".lstrip("."))
    elif isinstance(form, list):
        for i, item in enumerate(value):
            check_form(path, item, form[0], f"{where}[{i}]")


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
    check_form(path, about, MADE_FOR | {"network": NETWORK})
    return network_of(path, tensors, about["network"]), about


def network_of(path, tensors: dict[str, torch.Tensor], form: dict) -> HyperNetwork:
    """The network that ``form`` describes and the tensors fill.

    Nothing is allocated for one that the tensors do not fill.

    Raises:
        HorseError: they do not fit each other.
    """
    tensors = {
        n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")
    }
    if max(form["n_blocks"], len(form["shapes"])) > len(tensors):
        raise HorseError(f"{path}: damaged: field 'network' asks for more than the file holds.")
    try:
        with torch.device("meta"):
            network = HyperNetwork(**{n: form[n] for n in NETWORK})
        shapes = {n: t.shape for n, t in network.state_dict().items()}
        if shapes != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("does not have the form of the tensors")
        network.to_empty(device="cpu").load_state_dict(tensors)
    except Exception as error:  # of a size, a name or a type that torch does not take
        reason = (str(error).splitlines() or ["?"])[0]
        raise HorseError(f"{path}: damaged: field 'network': {reason}.") from None
    return network


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
    rows = a["embedding_norms"], b["embedding_norms"]
    if any(a[n] != b[n] for n in names) or len(rows[0]) != len(rows[1]):
        return False
    return all(abs(x - y) <= 2e-3 * max(abs(x), abs(y)) for x, y in zip(*rows, strict=True))


def _model_name(fingerprint: dict) -> str:
    return "{name} ({architecture}, {n_blocks} blocks, width {hidden_size})".format(**fingerprint)
