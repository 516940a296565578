"""Folders on the Hugging Face hub, by name: fetched once, and then read as any folder is."""

import re
from collections.abc import Mapping
from pathlib import Path

from horse_plugin.errors import HorseError, UsageError, reason

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
FILES = ("*.safetensors", "*.json", "*.csv", "README.md")  # what we write, and nothing else


def local(folder) -> Path:
    """Return a folder as it is, or a copy of the one of that name on the hub.

    Args:
        folder: a path, or ``owner/name`` or ``owner/name@revision`` where no such folder is here.

    Raises:
        UsageError: it looks like a name on the hub, and cannot be fetched from there.
    """
    path = Path(folder).expanduser()
    if path.exists() or not NAME.fullmatch(str(folder)):
        return path
    return fetch(str(folder))


def fetch(name: str) -> Path:
    """Return the copy of a repository's files in the hub's cache; code is never fetched.

    Raises:
        UsageError: it is no name on the hub, or it cannot be fetched.
    """
    named = NAME.fullmatch(name)
    if not named:
        raise UsageError(f"{name}: not a name on the hub, such as owner/name.")
    import huggingface_hub  # half a second, and folders do not need it

    try:
        return Path(
            huggingface_hub.snapshot_download(
                named[1], revision=named[2], allow_patterns=list(FILES)
            )
        )
    except Exception as error:  # whatever the hub, the network and the cache raise
        raise UsageError(f"{name}: no such folder, nor on the hub ({reason(error)}).") from None


def upload(name: str, files: Mapping[str, Path | bytes], message: str, private: bool) -> str:
    """Put files into a repository, made if need be, in one commit; return its address.

    Args:
        name: ``owner/name``. The token is the hub's own: ``hf auth login`` or ``HF_TOKEN``.
        files: the name in the repository → the file, or what is in it.
        private: whether a new repository is.

    Raises:
        UsageError: it is no name on the hub.
        HorseError: the hub refused it, or was not reached.
    """
    if not NAME.fullmatch(name) or "@" in name:
        raise UsageError(f"{name}: not a name on the hub, such as owner/name.")
    import huggingface_hub

    added = [huggingface_hub.CommitOperationAdd(at, file) for at, file in files.items()]
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, added, commit_message=message)
    except Exception as error:  # whatever the hub and the network raise
        raise HorseError(f"{name}: not pushed ({reason(error)}). `hf auth login`?") from None
    return str(address)
