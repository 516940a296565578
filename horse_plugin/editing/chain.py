"""A chain: a folder of edits made one on top of the other, and the list of those in force.

    ledger.json     the list, oldest first; an undone edit stays in it, and in its folder
    now.json        the figures of the edits in force, as `horse eval` measured them last
    <name>/         one edit each: delta.safetensors, edit.json, results.json, facts.csv

A folder with a single edit, as :meth:`EditDelta.save` writes it, is read like a chain of one.
"""

import contextlib
import datetime
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from horse_plugin.distributed import is_main_process
from horse_plugin.editing.delta import CHAIN_FILE, DELTA, EditDelta
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation import results
from horse_plugin.storage.digest import json_digest
from horse_plugin.storage.files import locked_folder, new_folder, to_json, write
from horse_plugin.storage.hub import local
from horse_plugin.storage.schema import Maybe, count, finite, read_json, read_text

ENTRY = {"name": str, "made": str, "n_edits": count, "onto": Maybe([str]), "undone": Maybe(str)}
NOW = "now.json"
UNFINISHED = "unfinished"  # the ``undone`` of an edit whose folder has no final name yet
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class Chain:
    """The chain of edits in one folder.

    Whoever changes it locks the folder meanwhile. To make an edit on top of the others and add it,
    lock the folder from reading to adding, with :func:`horse_plugin.storage.files.locked_folder`.

    Attributes:
        folder: its path.
        entries: ``name``, ``made``, ``n_edits``, ``onto`` (the edits in force then; not in chains
            of 0.1) and ``undone`` (a time, or None) of each edit, oldest first.
    """

    def __init__(self, folder):
        """Open the chain in the folder, or begin one there.

        Raises:
            UsageError: the folder holds a single edit.
            HorseError: the list is damaged.
        """
        self.folder, self.entries = Path(folder).expanduser(), []
        if (self.folder / DELTA).exists():
            raise UsageError(f"{folder}: holds a single edit, not a chain; choose another folder.")
        self.entries = self._listed()

    def _listed(self) -> list[dict]:
        path = self.folder / CHAIN_FILE
        return _read(path) if path.exists() else []

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Lock the folder, whose list must be the one that this object has read."""
        with locked_folder(self.folder):
            if is_main_process() and self._listed() != self.entries:
                raise HorseError(
                    f"{self.folder}: another process has changed the chain. Open it again."
                )
            yield

    @classmethod
    def at(cls, folder) -> "Chain":
        """Return the chain that is in the folder.

        Raises:
            UsageError: there is none.
        """
        if not Path(folder, CHAIN_FILE).expanduser().exists():
            raise UsageError(f"{folder}: holds no chain of edits; `horse edit --onto` makes one.")
        return cls(folder)

    def deltas(self) -> list[EditDelta]:
        """Return the edits in force, oldest first."""
        return [EditDelta.load(self.folder / name) for name in self.in_force]

    @property
    def in_force(self) -> list[str]:
        """The names of the edits in force, oldest first."""
        return [e["name"] for e in self.entries if not e["undone"]]

    def save_now(self, rows: Sequence[dict]):
        """Keep figures of the edits in force, one row of ``results.json`` for each with facts.

        Raises:
            HorseError: another process writes into the folder, or has changed the chain.
        """
        with self._changing():
            write(self.folder / NOW, to_json({"edits": self.in_force, "rows": list(rows)}) + "\n")

    def now(self) -> dict[str, dict]:
        """Return name → row of figures that :meth:`save_now` kept of just these edits, or nothing.

        Raises:
            HorseError: the file is damaged.
        """
        path = self.folder / NOW
        if not path.exists():
            return {}
        kept = read_json(path, {"edits": [str], "rows": [{"method": str, "efficacy": finite}]})
        return {r["method"]: r for r in kept["rows"]} if kept["edits"] == self.in_force else {}

    def new_name(self, name: str | None = None) -> str:
        """Return the name of the next edit: the given one, or the next free number.

        Raises:
            UsageError: the name is taken, or no plain name for a folder.
        """
        if name is None:
            numbers = (f"{i:03d}" for i in itertools.count(len(self.entries) + 1))
            return next(n for n in numbers if not self._is_taken(n))
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r}: not a name for an edit; use letters, digits, . _ and -.")
        if self._is_taken(name):
            raise UsageError(f"{self.folder}: {name} is there already; choose another name.")
        return name

    def _is_taken(self, name: str) -> bool:
        """Return whether a folder has the name, or an edit whose folder somebody removed."""
        names = {CHAIN_FILE, NOW, *(entry["name"] for entry in self.entries)}
        return name in names or (self.folder / name).exists()

    def add(self, delta: EditDelta, rows: Sequence[dict] = ()):
        """Put an edit and its figures on top, whole or not at all.

        The edit is in force from the moment when its folder has its final name, wherever a kill
        comes.

        Args:
            rows: its rows of ``results.json``.

        Raises:
            UsageError: the edit's name is taken, or no plain name for a folder.
            HorseError: another process writes into the folder, or has changed the chain.
        """
        entry = {"name": delta.name, "made": delta.about["made"], "n_edits": len(delta.records)}
        entry["onto"] = self.in_force
        if not is_main_process():  # which writes it
            self.entries.append(entry | {"undone": None})
            return
        with self._changing():
            with new_folder(self.folder / self.new_name(delta.name)) as made:
                delta.save(made)
                results.save(made / "results.json", list(rows))
                self._write([*self.entries, entry | {"undone": UNFINISHED}])
            self.entries.append(entry | {"undone": None})
            self._write(self.entries)

    def undo(self, name: str | None = None) -> str:
        """Take an edit out of force, the last one by default; its folder stays. Return its name.

        Raises:
            UsageError: no such edit is in force.
            HorseError: another process writes into the folder, or has changed the chain.
        """
        with self._changing():
            active = self.in_force
            name = name or next(reversed(active), "")
            if name not in active:
                there = f"in force are {', '.join(active)}" if active else "none is in force"
                raise UsageError(f"{self.folder}: no edit{name and f' {name}'} to undo; {there}.")
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            self._mark(name, now)
        return name

    def redo(self, name: str):
        """Put an undone edit back into force, in its old place.

        Raises:
            UsageError: no such edit is undone.
            HorseError: another process writes into the folder, or has changed the chain.
        """
        with self._changing():
            undone = [e["name"] for e in self.entries if e["undone"]]
            if name not in undone:
                there = f"undone are {', '.join(undone)}" if undone else "none is undone"
                raise UsageError(f"{self.folder}: no edit {name} to put back; {there}.")
            if not (self.folder / name / DELTA).exists():
                raise UsageError(f"{self.folder}: the files of {name} are gone; it stays undone.")
            self._mark(name, None)

    def _mark(self, name: str, undone: str | None):
        entries = [e | {"undone": undone} if e["name"] == name else e for e in self.entries]
        self._write(entries)
        self.entries = entries

    def _write(self, entries: list[dict]):
        text = json.dumps({"edits": entries, "sha256": _digest(entries)}, indent=1)
        write(self.folder / CHAIN_FILE, text + "\n")


def read_edits(folder) -> list[EditDelta]:
    """Return the edits in force in a folder: those of its chain, or the single one it holds.

    Args:
        folder: a folder, or ``owner/name`` on the hub.

    Raises:
        UsageError: the folder holds neither, or there is no such folder on the hub.
        HorseError: something is damaged.
    """
    folder = local(folder)
    if Path(folder, CHAIN_FILE).exists():
        return Chain(folder).deltas()
    return [EditDelta.load(folder)]


def _digest(entries) -> str:
    return json_digest(entries, 64)


def _read(path: Path) -> list[dict]:
    entries = read_json(path, {"edits": [ENTRY], "sha256": str})["edits"]
    whole = json.dumps({"edits": entries, "sha256": _digest(entries)}, indent=1) + "\n"
    if read_text(path) != whole:
        raise HorseError(f"{path}: damaged: its content does not match its checksum.")
    for entry in entries:
        if not NAME.fullmatch(entry["name"]):
            raise HorseError(f"{path}: {entry['name']!r} is no name for an edit.")
    names = [e["name"] for e in entries if e["undone"] != UNFINISHED]
    if len(set(names)) < len(names):
        raise HorseError(f"{path}: damaged: an edit is in it twice.")
    if entries and entries[-1]["undone"] == UNFINISHED:
        *entries, last = entries
        if (path.parent / last["name"]).exists():
            entries.append(last | {"undone": None})
    return entries
