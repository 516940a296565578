"""One edit as an object: the shifts that it adds, and the facts that it was made for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from horse_plugin.data.records import EditRecord
from horse_plugin.distributed import is_main_process
from horse_plugin.editing.archive import MADE_FOR
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.evaluation.facts import FACTS_FILE, save_facts
from horse_plugin.method.finite import all_finite
from horse_plugin.storage.digest import text_digest
from horse_plugin.storage.files import locked_folder, to_json, write
from horse_plugin.storage.schema import Maybe, check_form, count, finite, read_text
from horse_plugin.storage.tensors import load_tensors, save_tensors

DELTA, EDIT = "delta.safetensors", "edit.json"
CHAIN_FILE = "ledger.json"  # the name is that of 0.1, so that its chains still load
TEXT, NUMBER = Maybe(str), Maybe((int, float))
QUERY = {"prompt": str, "answer": str, "accepted": Maybe([str])}
RECORD = {"prompt": str, "target_new": str, "rephrases": [str]}
RECORD |= {"unrelated": [QUERY], "portability": [QUERY], "subject": TEXT, "ground_truth": TEXT}
RECORD |= {"case_id": Maybe((int, str))}
COSTS = {"drift": NUMBER, "perplexity": NUMBER}


def _of_all(value) -> bool:
    """Be the form of a number of facts, and that of all which were measured."""
    return isinstance(value, list) and len(value) == 2 and all(map(count, value))


FIGURES = {
    "before": {str: NUMBER},
    "after": {str: NUMBER},
    "kinds": Maybe({str: {"before": COSTS, "after": COSTS}}),
    "examples": Maybe([dict.fromkeys(("kind", "prompt", "before", "after"), str)]),
    "conflicts": Maybe({str: count}),
    "held": Maybe(_of_all),
    "kept": Maybe(_of_all),
}
BUDGET = {"max_drift": finite, "edit_ridge": finite, "drift": NUMBER, "trials": Maybe(list)}
BUDGET |= {"efficacy": NUMBER, "efficacy_without": NUMBER}
FORM = MADE_FOR | {
    "name": TEXT,
    "made": TEXT,
    "onto": Maybe([str]),
    "command": TEXT,
    "weights": {str: str},
    "original": {str: str},
    "moved": Maybe({str: (int, float)}),
    "seconds": NUMBER,
    "figures": Maybe(FIGURES),
    "budget": Maybe(BUDGET),
    "edit_json": str,
}


@dataclass(eq=False)
class EditDelta:
    """The weight shifts ΔW_l of one edit (Eq. 2).

    Attributes:
        tensors: for each edit module either ``<name>.shift``, d×d', or the factors
            ``<name>.keys``, n×d, and ``<name>.factors``, n×d', with ΔW = keysᵀ · factors, whichever
            hold fewer numbers.
        records: the facts.
        about: the description: model fingerprint, modules, network, hparams, versions; ``name``,
            ``made`` (UTC), ``seconds``; ``onto``, the names of the edits in force then; ``weights``
            and ``original``, the digests of the edit modules' weights right before this edit and
            before the first edit of its editor;
            ``moved``, ‖ΔW‖/‖W‖ of each module (Frobenius); ``figures`` if the edit was measured.
        facts: what became of each fact, :func:`horse_plugin.evaluation.facts.fact_rows`; empty if
            the edit was not measured, and when it is loaded. :meth:`save` writes it as CSV.
    """

    tensors: dict[str, torch.Tensor]
    records: list[EditRecord]
    about: dict = field(default_factory=dict)
    facts: list[dict] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    def shift(self, module: str, device=None) -> torch.Tensor:
        """Return ΔW of one module, d×d', computed on a device; None is where the tensors are."""
        if f"{module}.shift" in self.tensors:
            return self.tensors[f"{module}.shift"].to(device)
        keys, factors = (
            self.tensors[f"{module}.{part}"].to(device) for part in ("keys", "factors")
        )
        return keys.T @ factors

    def to(self, device) -> "EditDelta":
        """Return the same edit with its tensors on a device."""
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()})

    @property
    def shifts(self) -> dict[str, torch.Tensor]:
        """Module name → ΔW, d×d', computed where the tensors are."""
        return dict(self.lazy_shifts())

    def lazy_shifts(self, device=None) -> "LazyShifts":
        """Return :attr:`shifts`, each made when it is asked for, so that one is in memory."""
        return LazyShifts(self, device)

    @property
    def name(self) -> str:
        return self.about.get("name") or "edit"

    def save(self, folder):
        """Write ``edit.json``, ``delta.safetensors`` and any facts into a folder; others stay.

        The second file holds the checksum of the first, so that a pair which does not belong
        together is refused as damaged. It is written last: without it, there is no edit.

        Raises:
            UsageError: the folder holds an edit, or a chain of edits, already.
            HorseError: another process writes into it.
        """
        if not is_main_process():  # which writes it
            return
        folder = check_free(folder)
        described = {**self.about, "records": [r.to_dict() for r in self.records]}
        text = to_json(described).encode()
        about = {**self.about, "kind": "delta", "edit_json": text_digest(text, 64)}
        with locked_folder(folder):
            check_free(folder)
            write(folder / EDIT, text)
            if self.facts:
                save_facts(folder / FACTS_FILE, self.facts)
            save_tensors(folder / DELTA, self.tensors, about)

    @classmethod
    def load(cls, folder) -> "EditDelta":
        """Return the edit that :meth:`save` wrote.

        Raises:
            UsageError: the folder holds no edit.
            HorseError: the edit is damaged.
        """
        folder = Path(folder).expanduser()
        path, described = folder / DELTA, folder / EDIT
        if not path.exists():
            raise UsageError(f"{folder}: holds no edit.")
        tensors, about = load_tensors(path)
        if about.pop("kind", None) != "delta":
            raise UsageError(f"{folder}: {DELTA} holds no edit.")
        check_form(path, about, FORM)
        check_form(path, about, {"figures": Maybe({"after": {"efficacy": finite}})})
        _check_tensors(path, tensors, about["modules"])
        try:
            text = read_text(described)
            if text_digest(text, 64) != about.pop("edit_json"):
                raise ValueError("its content does not match its checksum")
            content = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise HorseError(f"{described}: damaged, or not a HORSE edit ({error}).") from None
        check_form(described, content, {"records": [RECORD]})
        try:
            records = [EditRecord.from_dict(r) for r in content["records"]]
        except TypeError as error:  # a field that records do not have
            raise HorseError(f"{described}: damaged, or not a HORSE edit ({error}).") from None
        return cls(tensors, records, about)


class LazyShifts(Mapping):
    """ΔW of each module of an edit, made whenever it is asked for."""

    def __init__(self, delta: EditDelta, device=None):
        self._delta, self._device = delta, device

    def __getitem__(self, module: str) -> torch.Tensor:
        return self._delta.shift(module, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta.modules)

    def __len__(self) -> int:
        return len(self._delta.modules)


def check_free(folder) -> Path:
    """Return the path of a folder that holds no edit and no chain of edits.

    Raises:
        UsageError: it does hold one, which is never overwritten.
    """
    path = Path(folder).expanduser()
    if (path / CHAIN_FILE).exists():
        raise UsageError(f"{folder}: holds a chain of edits; choose another folder, or --onto.")
    if (path / DELTA).exists():
        raise UsageError(f"{folder}: holds an edit already; choose another folder.")
    return path


def _check_tensors(path, tensors: dict[str, torch.Tensor], modules: list[str]):
    """Check that each module has a shift, or two factors that fit, and nothing else is there."""
    for module in modules:
        shift, keys, factors = (
            tensors.get(f"{module}.{part}") for part in ("shift", "keys", "factors")
        )
        parts = [t for t in (shift, keys, factors) if t is not None]
        whole = shift is not None if len(parts) == 1 else shift is None and len(parts) == 2
        if not whole or any(t.dim() != 2 or not t.is_floating_point() for t in parts):
            raise HorseError(f"{path}: damaged: {module}: neither a shift nor a pair of factors.")
        if len({len(t) for t in parts}) > 1 or len({t.dtype for t in parts}) > 1:
            raise HorseError(f"{path}: damaged: {module}: its factors do not fit each other.")
        if not all(map(all_finite, parts)):
            raise HorseError(f"{path}: {module}: the shift is not finite.")
    if {name.rpartition(".")[0] for name in tensors} != set(modules):
        raise HorseError(f"{path}: damaged: field 'modules' names others than the tensors do.")
