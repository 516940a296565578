"""A folder of edits made one on top of the other, and the list of those that are in force.

    ledger.json     the list, oldest first; an undone edit stays in it, and in its folder
    <name>/         one edit each: delta.safetensors, edit.json, results.json

A folder with a single edit, as :meth:`EditDelta.save` writes it, is read like a ledger of one.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from horse_plugin.editing.delta import DELTA, LEDGER, EditDelta
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation import results
from horse_plugin.storage import archive

ENTRY = {"name": str, "made": str, "n_edits": int, "undone": (str, type(None))}
UNFINISHED = "unfinished"  # ``undone`` of an edit whose folder is about to get its name
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class Ledger:
    """The edits of one folder.

    Attributes:
        entries: name, ``made``, ``n_edits`` and ``undone`` (when, or None) of each, oldest first.
    """

    def __init__(self, folder):
        """Open the ledger in the folder, or begin one there.

        Raises:
            UsageError: a single edit is in the folder.
            HorseError: a damaged list.
        """
        self.folder, self.entries = Path(folder), []
        if Path(folder, DELTA).exists():
            raise UsageError(f"{folder}: holds a single edit, not a chain; choose another folder.")
        path = self.folder / LEDGER
        if path.exists():
            self.entries = _read(path)

    @classmethod
    def at(cls, folder) -> "Ledger":
        """The ledger that is in the folder.

        Raises:
            UsageError: there is none.
        """
        if not Path(folder, LEDGER).exists():
            raise UsageError(f"{folder}: holds no chain of edits; `horse edit --onto` makes one.")
        return cls(folder)

    def deltas(self) -> list[EditDelta]:
        """The edits in force, oldest first."""
        return [EditDelta.load(self.folder / e["name"]) for e in self.entries if not e["undone"]]

    def new_name(self, name: str | None = None) -> str:
        """The name of the next edit: the given one, or the next free number.

        Raises:
            UsageError: it is taken, or no plain name for a folder.
        """
        if name is None:
            count = len(self.entries) + 1
            while (self.folder / f"{count:03d}").exists():
                count += 1
            return f"{count:03d}"
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r}: not a name for an edit; use letters, digits, . _ and -.")
        if (self.folder / name).exists() or name == LEDGER:
            raise UsageError(f"{self.folder}: {name} is there already; choose another name.")
        return name

    def add(self, delta: EditDelta, rows: Sequence[dict] = ()):
        """Put an edit, and what was measured of it, on top; whole or not at all.

        It is in force from the moment in which its folder has its name, wherever a kill comes.
        """
        entry = {"name": delta.name, "made": delta.about["made"], "n_edits": len(delta.records)}
        with archive.new_folder(self.folder / delta.name) as made:
            delta.save(made)
            results.save(made / "results.json", list(rows))
            self._write([*self.entries, entry | {"undone": UNFINISHED}])
        self.entries.append(entry | {"undone": None})
        self._write(self.entries)

    def undo(self, name: str | None = None) -> str:
        """Take an edit out of force, the last one by default; its folder stays.

        Raises:
            UsageError: no such edit is in force.
        """
        active = [e["name"] for e in self.entries if not e["undone"]]
        name = name or next(reversed(active), "")
        if name not in active:
            there = f"in force are {', '.join(active)}" if active else "none is in force"
            raise UsageError(f"{self.folder}: no edit{name and f' {name}'} to undo; {there}.")
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entries = [e | {"undone": now} if e["name"] == name else e for e in self.entries]
        self._write(entries)
        self.entries = entries
        return name

    def _write(self, entries: list[dict]):
        text = json.dumps({"edits": entries, "sha256": _digest(entries)}, indent=1)
        archive.write(self.folder / LEDGER, text + "\n")


def read_edits(folder) -> list[EditDelta]:
    """The edits in force in a folder: those of its ledger, or the single one it holds.

    Raises:
        UsageError: neither is there.
        HorseError: something is damaged.
    """
    if Path(folder, LEDGER).exists():
        return Ledger(folder).deltas()
    return [EditDelta.load(folder)]


def _digest(entries) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise HorseError(f"{path}: damaged, or not a ledger ({error}).") from None
    archive.check_form(path, content, {"edits": [ENTRY], "sha256": str})
    entries = content["edits"]
    whole = json.dumps({"edits": entries, "sha256": _digest(entries)}, indent=1) + "\n"
    if text != whole:
        raise HorseError(f"{path}: damaged: its content does not match its checksum.")
    for entry in entries:
        if not NAME.fullmatch(entry["name"]):
            raise HorseError(f"{path}: {entry['name']!r} is no name for an edit.")
    if entries and entries[-1]["undone"] == UNFINISHED:
        *entries, last = entries
        if (path.parent / last["name"]).exists():
            entries.append(last | {"undone": None})
    return entries
