"""An edit as a PEFT LoRA adapter, which other programs load without this package.

ΔW = keysᵀ · factors is what LoRA calls B·A, transposed: an edit of n answer tokens is an adapter of
rank n, exactly. A smaller rank keeps the largest singular values of Lᵀ ΔW, with C̄ = L Lᵀ the metric
of the ridge term, so that ordinary text feels least of what is cut; without a metric, those of ΔW.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D

from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.sharing import front, portable, said
from horse_plugin.errors import UsageError
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.method.metric import whitened
from horse_plugin.model.guard import guarded
from horse_plugin.storage.files import new_folder, write

ROUNDING = 1e-6  # of the largest singular value: what float32 leaves of a shift that is 0 there


@dataclass
class Adapter:
    """Low-rank factors of an edit or of a chain of edits.

    Attributes:
        factors: module name → (keys, r×d; factors, r×d') with ΔW ≈ keysᵀ · factors, in the dtype
            of the model.
        rank: the largest r.
        error: ‖Lᵀ(ΔW − keysᵀ · factors)‖ / ‖Lᵀ ΔW‖ over all modules together (Frobenius).
        efficacy: of the edit and of the adapter, on the edited facts, in percent.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    error: float
    efficacy: tuple[float, float]

    @property
    def rank(self) -> int:
        return max(len(keys) for keys, _ in self.factors.values())


@guarded
def to_rank(
    editor: HorseEditor,
    deltas: Sequence[EditDelta],
    rank: int | None = None,
    max_error: float | None = None,
) -> Adapter:
    """Return the sum of the edits as factors of at most that rank, and what is lost by it.

    Without a rank, or with one that suffices, nothing is lost but rounding to the model's dtype.
    The editor's model is
    edited for the comparison and put back.

    Args:
        editor: an editor of the model that the edits were made on, itself unedited.
        deltas: the edits, oldest first.
        rank: the largest rank; None is exact.
        max_error: the largest :attr:`Adapter.error`, for which the least rank is found; or None.

    Raises:
        UsageError: the edits were made for another model, or none of them has facts.
    """
    backbone = editor.backbone
    if not (records := [r for delta in deltas for r in delta.records]):
        raise UsageError("export: no edit has facts, by which the adapter could be measured.")
    evaluator = Evaluator(backbone, backbone.prepare(records, kinds=["edit"]))
    editor.apply_chain(deltas)
    try:
        edited = evaluator.evaluate().mean("efficacy")
    finally:
        for _ in deltas:
            editor.undo()

    modules, cut = list(backbone.modules), rank is not None or max_error is not None
    roots = editor.roots if cut else [None] * len(modules)
    shifts = [sum(delta.shift(m).double() for delta in deltas) for m in modules]
    if max_error is not None:
        parts = zip(roots, shifts, strict=True)
        values = [torch.linalg.svdvals(whitened(shift, root)) for root, shift in parts]
        rank = min(rank or max(map(len, values)), _least_rank(values, max_error))
    factors, lost, norm = {}, 0.0, 0.0
    for module, root, shift in zip(modules, roots, shifts, strict=True):
        parts = _exact(deltas, module, rank) or _truncated(root, shift, rank)
        keys, values = factors[module] = tuple(part.to(backbone.model.dtype) for part in parts)
        left = whitened(shift - keys.T.double() @ values.double(), root)
        lost += left.square().sum().item()
        norm += whitened(shift, root).square().sum().item()
    rounded = {m: keys.T.float() @ values.float() for m, (keys, values) in factors.items()}
    with backbone.weights.shifted(rounded):
        kept = evaluator.evaluate().mean("efficacy")
    return Adapter(factors, (lost / norm) ** 0.5, (edited, kept))


def _exact(deltas: Sequence[EditDelta], module: str, rank: int | None):
    """Return the factors that the edits have already, if all have them and they are few enough."""
    parts = ("keys", "factors")
    if not all(f"{module}.{part}" in d.tensors for d in deltas for part in parts):
        return None
    keys, factors = (torch.cat([d.tensors[f"{module}.{part}"] for d in deltas]) for part in parts)
    return (keys, factors) if len(keys) <= (rank or min(keys.shape[1], factors.shape[1])) else None


def _least_rank(values: Sequence[torch.Tensor], max_error: float) -> int:
    """Return the least rank of all modules that keeps to the error, by their singular values."""
    width = max(map(len, values))
    squares = sum(torch.nn.functional.pad(v.square(), (0, width - len(v))) for v in values)
    left = squares.sum() - squares.cumsum(0)  # at rank 1, 2, …
    return 1 + int((left > max_error**2 * squares.sum()).sum())


def _truncated(root: torch.Tensor | None, shift: torch.Tensor, rank: int | None):
    """Return the best factors of that rank in the metric (Eckart and Young); without one, all."""
    U, S, Vh = torch.linalg.svd(whitened(shift, root), full_matrices=False)
    rank = rank or int((S / S[0] > ROUNDING).sum())
    U = U if root is None else root.to(U) @ U
    share = S[:rank].sqrt()
    return (U[:, :rank] * share).T.float(), (share[:, None] * Vh[:rank]).float()


def save_adapter(adapter: Adapter, backbone, folder, deltas: Sequence[EditDelta] = ()):
    """Write the adapter in PEFT's format, with a card; ``PeftModel.from_pretrained`` loads it.

    Modules of a smaller rank are filled up with zeros. The adapter is one for the plain model, also
    where the edited one has an adapter attached. That model is named by its hub id, or by the name
    of its folder, which is the same on another machine.

    Args:
        deltas: the edits, for the card.

    Raises:
        UsageError: something of that name exists.
    """
    if any("expert" in name for name in adapter.factors):
        warnings.warn(
            "PEFT reads the adapters of some mixtures of experts (Qwen3-Next among them) as of "
            "other weights, and then this one does nothing. Ask the adapted model for an edited "
            "fact, or export the whole model.",
            stacklevel=2,
        )
    rank, tensors = adapter.rank, {}
    of_plain = {_name_in_plain(module): parts for module, parts in adapter.factors.items()}
    for module, (keys, factors) in of_plain.items():
        missing = rank - len(keys)
        A = torch.nn.functional.pad(keys, (0, 0, 0, missing))
        B = torch.nn.functional.pad(factors, (0, 0, 0, missing)).T
        for name, matrix in (("lora_A", A), ("lora_B", B)):
            tensors[f"base_model.model.{module}.{name}.weight"] = matrix.cpu().contiguous()
    base = portable(str(backbone.model.config.name_or_path))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(of_plain),
        "r": rank,
        "lora_alpha": rank,  # PEFT multiplies by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": isinstance(next(iter(backbone.modules.values())), Conv1D),
        "inference_mode": True,
    }
    with new_folder(folder) as made:
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
        write(made / "adapter_model.safetensors", data)
        write(made / "adapter_config.json", json.dumps(config, indent=1))
        write(made / "README.md", _card(adapter, base, deltas))


def _card(adapter: Adapter, base: str, deltas: Sequence[EditDelta]) -> str:
    """Return a model card: the base model, what each edit holds and costs, what the rank loses."""
    edited, kept = adapter.efficacy
    lines = [
        front(base, "peft", "lora"),
        f"# Facts edited in {base}",
        f"A LoRA adapter of rank {adapter.rank}, made with horse-plugin. It holds {kept:.1f} "
        f"percent of the answers, and the edit itself {edited:.1f} percent.",
        "\n".join(map(said, deltas)),
    ]
    return "\n\n".join(lines) + "\n"


def _name_in_plain(module: str) -> str:
    """Return what a module is called in the model that no adapter of PEFT wraps."""
    return module.removeprefix("base_model.model.").removesuffix(".base_layer")
