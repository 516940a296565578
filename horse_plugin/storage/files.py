"""Files that are written whole or not at all, and folders that one process writes at a time."""

import contextlib
import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import safetensors

from horse_plugin.distributed import is_main_process
from horse_plugin.errors import HorseError, UsageError, first_line
from horse_plugin.storage.digest import text_digest

PART = ".horse-part"  # ends the name of what is still being written
LOCK = ".lock"  # in a folder that a process writes into
NAME_LOCK = ".horse-lock"  # ends the name of the lock of one file, or of a folder to be made
UMASK = os.umask(0)  # read once: while it is read, other threads would make files for everybody
os.umask(UMASK)


def write(path, data: bytes | str):
    """Write a file, which takes its final name only once it is complete.

    Of several processes that work as one, only the main one writes.

    Raises:
        HorseError: it could not be written, as on a full disk.
    """
    if not is_main_process():
        return
    path = Path(path).expanduser()
    data = data.encode() if isinstance(data, str) else data
    with _writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~UMASK)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def to_json(value) -> str:
    """Return indented JSON that every reader takes: a number that is not finite is null."""

    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    text = json.dumps(plain(value), indent=1, ensure_ascii=False)
    if any("\ud800" <= c <= "\udfff" for c in text):  # as a path that is not UTF-8 has them
        text = json.dumps(plain(value), indent=1)
    return text


def file_name(name: str) -> str:
    """Return a name from a file or a model as part of a file's name, which leads to no folder.

    Letters, digits, spaces and common marks stay. Another character becomes ``_``, and a digest
    tells such names apart.
    """
    plain = re.sub(r"[^\w .,=+@()-]", "_", name)
    plain = f"_{plain[1:]}" if plain.startswith(".") else plain
    return plain if plain == name else f"{plain}-{text_digest(name, 6)}"


def check_name(path):
    """Refuse a path that is not UTF-8, which safetensors writes and reads no file at.

    Raises:
        UsageError: it is not.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{path}: its name is not UTF-8; rename it.") from None


def check_writable(folder):
    """Fail before the work, rather than after it, if the folder cannot be written to.

    Raises:
        UsageError: it is a file, or cannot be made or written to, or its name is not UTF-8.
    """
    check_name(folder)
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror or error}.") from None


def check_empty(folder) -> Path:
    """Return the path of a folder that does not exist yet, or holds nothing; links are followed.

    Raises:
        UsageError: something of that name exists, or it is a mount point, which nothing replaces.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= {LOCK}):
        raise UsageError(f"{folder}: there is something already; choose a new folder.")
    if os.path.ismount(folder):
        raise UsageError(f"{folder}: is a mount point; choose a new folder in it.")
    return folder.resolve() if folder.is_symlink() else folder


@contextlib.contextmanager
def new_folder(path) -> Iterator[Path]:
    """Yield a folder to fill, which takes its final name at the end.

    Of several processes that work as one, only the main one makes it.

    Raises:
        HorseError: another process makes a folder of that name.
        UsageError: something of that name exists.
    """
    if not is_main_process():
        yield Path(path)
        return
    with reserved(path), _writing_errors(Path(path)):
        path = check_empty(path)
        made = path.parent / f".{path.name}{PART}"
        made.mkdir()
        try:
            yield made
            if path.exists():
                (path / LOCK).unlink(missing_ok=True)  # of a process that was killed
            made.replace(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def reserved(path) -> Iterator[None]:
    """Hold the name of a file or of a new folder against other processes that want to write it.

    Of several processes that work as one, only the main one holds it. What a killed process had
    begun to write under that name is removed.

    Raises:
        HorseError: another process holds the name.
        UsageError: the folder that it is in cannot be made or written to.
    """
    path = Path(path).expanduser()
    if not is_main_process():
        yield
        return
    check_writable(path.parent)
    with _locked(path.parent / f".{path.name}{NAME_LOCK}", path) as is_first:
        if is_first:
            of_a_write = f".{glob.escape(path.name)}.{'?' * 8}{PART}"  # as mkstemp names it
            for part in (path.parent / f".{path.name}{PART}", *path.parent.glob(of_a_write)):
                _remove(part)
        yield


@contextlib.contextmanager
def locked_folder(folder) -> Iterator[Path]:
    """Lock a folder, made if need be, against other processes that write into it.

    Of several processes that work as one, only the main one writes and holds the lock. The system
    releases it when the process ends, however it ends. What a killed process had begun to write is
    removed by the next one. A lock inside a lock of the same folder does nothing.

    Raises:
        HorseError: another process, or another thread, holds the folder.
        UsageError: the folder cannot be made or written to.
    """
    folder = Path(folder).expanduser()
    if not is_main_process():
        yield folder
        return
    check_writable(folder)
    with _locked(folder / LOCK, folder) as is_first:
        if is_first:
            _sweep(folder)
        yield folder


@contextlib.contextmanager
def _locked(lock_file: Path, path: Path) -> Iterator[bool]:
    """Hold a lock; yields whether this thread did not hold it already."""
    lock = filelock.FileLock(lock_file, blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise HorseError(
            f"{path}: another process is writing into it. Wait for it, or choose another name."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UsageError(f"{path}: cannot be locked ({first_line(error)}).") from None
    is_first = lock.lock_counter == 1
    try:
        yield is_first
    finally:
        if is_first:
            with contextlib.suppress(OSError):  # Windows removes no open file, and leaves it
                os.unlink(lock_file)  # who waits for it notices, and locks a new one
        lock.release()


def _sweep(folder: Path):
    """Remove what killed processes of ours had begun to write; a folder may have a writer still."""
    for part in folder.glob(f".*{PART}"):
        if part.is_symlink() or not part.is_dir():
            _remove(part)
            continue
        name = part.name.removeprefix(".").removesuffix(PART)
        with contextlib.suppress(HorseError), reserved(folder / name):
            pass  # which removes it
    for lock_file in folder.glob(f".*{NAME_LOCK}"):
        with contextlib.suppress(HorseError), _locked(lock_file, lock_file):
            pass  # which removes it


def _remove(part: Path):
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing_errors(path: Path):
    """Turn an error of the system into one line that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
    except safetensors.SafetensorError as error:  # how save_pretrained meets a full disk
        reason = first_line(error)
    else:
        return
    raise HorseError(f"{path}: not written: {reason}. Is there space, and a right to write?")
