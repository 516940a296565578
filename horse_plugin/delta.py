"""One edit as a thing of its own: what it adds to which weights, and which facts it was for."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import archive
from .errors import HorseError, UsageError
from .records import EditRecord
from .ridge import Ridge


@dataclass
class EditDelta:
    """The weight shifts ΔW_l of one edit (Eq. 2).

    Attributes:
        tensors: per edit module either ``<name>.shift``, d×d', or the factors ``<name>.keys``,
            n×d, and ``<name>.factors``, n×d', with ΔW = keysᵀ · factors; whichever is smaller.
        records: the facts.
        about: model fingerprint, modules, network, hparams, versions, seconds.
    """

    tensors: dict[str, torch.Tensor]
    records: list[EditRecord]
    about: dict = field(default_factory=dict)

    @staticmethod
    def solve(name: str, keys: torch.Tensor, residual: torch.Tensor, lamda: torch.Tensor) -> dict:
        """Eq. 2 for one module, as entries of ``tensors``."""
        ridge = Ridge(keys, lamda.exp())
        n, d = keys.shape
        if ridge.dual and n * (d + residual.shape[1]) < d * residual.shape[1]:
            return {f"{name}.keys": keys, f"{name}.factors": ridge.factors(residual)}
        return {f"{name}.shift": ridge.shift(residual)}

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    def shift(self, module: str) -> torch.Tensor:
        """ΔW of one module, d×d'."""
        if f"{module}.shift" in self.tensors:
            return self.tensors[f"{module}.shift"]
        return self.tensors[f"{module}.keys"].T @ self.tensors[f"{module}.factors"]

    @property
    def shifts(self) -> dict[str, torch.Tensor]:
        return {module: self.shift(module) for module in self.modules}

    def save(self, folder):
        """Write ``edit.json`` and ``delta.safetensors`` into a folder; other files there stay.

        The second holds the checksum of the first, so that a pair which does not belong together
        is refused as damaged.
        """
        folder = Path(folder)
        described = {**self.about, "records": [r.to_dict() for r in self.records]}
        text = json.dumps(described, indent=1, ensure_ascii=False).encode()
        about = {**self.about, "kind": "delta", "edit_json": hashlib.sha256(text).hexdigest()}
        archive.write(folder / "edit.json", text)
        archive.save_tensors(folder / "delta.safetensors", self.tensors, about)

    @classmethod
    def load(cls, folder) -> "EditDelta":
        """The inverse of :meth:`save`.

        Raises:
            UsageError: no delta there.
            HorseError: a damaged one.
        """
        folder = Path(folder)
        tensors, about = archive.load_tensors(folder / "delta.safetensors")
        if about.pop("kind", None) != "delta":
            raise UsageError(f"{folder}: holds no delta.")
        path = folder / "edit.json"
        try:
            text = path.read_bytes()
            if hashlib.sha256(text).hexdigest() != about.pop("edit_json"):
                raise ValueError("its content does not match its checksum")
            records = [EditRecord.from_dict(r) for r in json.loads(text)["records"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HorseError(f"{path}: damaged, or not a HORSE edit ({error}).") from None
        return cls(tensors, records, about)
