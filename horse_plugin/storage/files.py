"""Files that are written whole or not at all, and folders that one process writes at a time."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import safetensors

from horse_plugin.distributed import is_main_process
from horse_plugin.errors import HorseError, UsageError, first_line

PART = ".part"  # ends the name of what is still being written
LOCK = ".lock"  # in a folder that a process writes into


def write(path, data: bytes | str):
    """Write a file, which takes its final name only once it is complete.

    Raises:
        HorseError: it could not be written, as on a full disk.
    """
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
            os.chmod(temporary, 0o666 & ~_umask())
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

    return json.dumps(plain(value), indent=1, ensure_ascii=False)


def check_writable(folder):
    """Fail before the work, rather than after it, if the folder cannot be written to.

    Raises:
        UsageError: it is a file, or cannot be made or written to.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror or error}.") from None


def check_empty(folder) -> Path:
    """Return the path of a folder that does not exist yet, or holds nothing.

    Raises:
        UsageError: something of that name exists.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= {LOCK}):
        raise UsageError(f"{folder}: there is something already; choose a new folder.")
    return folder


@contextlib.contextmanager
def new_folder(path) -> Iterator[Path]:
    """Yield a folder to fill, which takes its final name at the end.

    Raises:
        UsageError: something of that name exists.
    """
    path = check_empty(path)
    with _writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(PART, f".{path.name}.", path.parent))
        try:
            yield made
            made.chmod(0o777 & ~_umask())
            made.replace(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def locked_folder(folder) -> Iterator[Path]:
    """Lock a folder, made if need be, against other processes that write into it.

    Of several processes that work as one, only the main one writes and holds the lock. The system
    releases it when the process ends, however it ends. What a killed process had begun to write is
    removed by the next one.

    Raises:
        HorseError: another process holds the folder.
        UsageError: the folder cannot be made or written to.
    """
    folder = Path(folder).expanduser()
    if not is_main_process():
        yield folder
        return
    check_writable(folder)
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise HorseError(
            f"{folder}: another process is writing into it. Wait for it, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UsageError(f"{folder}: cannot be locked ({first_line(error)}).") from None
    try:
        for part in folder.glob(f".*{PART}"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        yield folder
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file, and leaves it
            os.unlink(lock.lock_file)  # who waits for it notices, and locks a new one
        lock.release()


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
