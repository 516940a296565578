"""Where the time of an edit goes, stage by stage, beside the least it could take on this machine.

A floor counts the operations of a stage over the machine's measured rate of matrix products, or
its bytes over the measured bandwidth; attention, norms and padding are left out of it.
"""

import collections
import platform
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from horse_plugin.data.records import EditRecord
from horse_plugin.editing.crowding import Crowding
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.solve import edit_mus, ridge_of, solve
from horse_plugin.editing.sweeps import sweeps
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory, timed, versions
from horse_plugin.method.residual import residual
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.training.trainer import HORSETrainer


@dataclass
class Stage:
    """One stage: its seconds, its peak memory in MB and the fewest seconds possible, if known."""

    name: str
    seconds: float
    peak_memory_mb: float | None
    floor_seconds: float | None = None


def bench(backbone: Backbone, hparams, records: Sequence[EditRecord], others: bool = True) -> dict:
    """Measure one edit of all the records and, with ``others``, its evaluation and a training step.

    An untrained network is calibrated beforehand, so that it costs what a trained one does. Trunk
    states that there is no room for are computed in the stages after the trunk. The model is left
    as it was.

    Returns:
        ``stages`` of the edit, ``others`` (the metric, which is made once for each model;
        evaluation before and after the edit, and a training step, with trunk states kept), measured
        rates of the machine, sizes, versions.
    """
    with tempfile.TemporaryDirectory() as stats:
        return _bench(backbone, replace(hparams, stats_dir=stats), records, others)


def _bench(backbone: Backbone, hp, records: Sequence[EditRecord], others: bool) -> dict:
    device, clock = backbone.edit_device, _Clock(backbone.devices)
    rates = {
        "model_flops": matrix_rate(backbone.model.dtype, device),
        "solver_flops": matrix_rate(backbone.edit_dtype, device),
        "bytes": bandwidth(device),
    }
    editor = HorseEditor.from_backbone(backbone, hp)
    roots = clock("metric", lambda: editor.roots)
    once, clock.stages = clock.stages, []  # for each model, whatever the number of edits
    network = editor.network or editor.untrained_network(editor.capture(records[:64]))

    with torch.no_grad():
        edits = clock("tokenise", lambda: backbone.prepare(records, kinds=["edit"]))
        prompts = edits.to_capture(hp.keep_next)
        clock("trunk", lambda: backbone.cache_trunk_states(prompts))
        captured = clock("capture", lambda: capture(backbone, prompts))
        keys, grads = captured.keys, captured.grads

        def pseudo_pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
            rows = hp.editor_batch_size  # in the chunks of an edit, which keeps the residuals only
            found = []
            for l, (h, g) in enumerate(zip(keys, grads, strict=True)):
                chunks = zip(h.split(rows), g.split(rows), strict=True)
                parts = [network(l, *chunk) for chunk in chunks]
                found.append(tuple(torch.cat(part) for part in zip(*parts, strict=True)))
            return found

        pseudo = clock("network", pseudo_pairs)

        def residuals() -> list[torch.Tensor]:
            etas = network.log_eta.exp()
            parts = zip(keys, pseudo, etas, strict=True)
            raw = [residual(h.to(eta), *p, eta) for h, p, eta in parts]
            return network.spread_out(raw, keys, grads)

        spread = clock("residual and spread", residuals)
        if hp.edit_sweeps > 1:
            ridge = ridge_of(0, backbone, captured, edit_mus(network, hp), roots)
            parts = backbone, network, captured, hp, roots, Crowding.of(ridge).step(hp)
            last = clock("further sweeps", lambda: collections.deque(sweeps(*parts), maxlen=1))
            captured, spread = last[0]
        tensors = clock("solve", lambda: solve(backbone, network, captured, spread, hp, roots))
        delta = EditDelta(tensors, [])
        before = clock("apply", lambda: backbone.weights.add(delta.lazy_shifts()))
        backbone.weights.restore(before)
    stages, clock.stages = clock.stages, once
    for stage, floor in _floors(backbone, network, prompts, rates).items():
        next(s for s in stages if s.name == stage).floor_seconds = floor

    if others:
        evaluated = backbone.prepare(records)
        backbone.cache_trunk_states(evaluated.flat())
        known = captured.predicted
        evaluator = clock("evaluation before", lambda: Evaluator(backbone, evaluated, known=known))
        clock("evaluation after", evaluator.evaluate)
        trainer = HORSETrainer(hp, records, records, "unused", backbone, progress=False)
        trainer.roots  # noqa: B018 they are of the model, not of a step
        clock("training step", lambda: trainer.train_step(evaluated))
    return {
        "model": backbone.fingerprint()["name"],
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "n_edits": len(records),
        "n_tokens": sum(len(p.inputs) for p in prompts),
        "n_answer_tokens": len(captured.record_of_row),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rates": rates,
        "stages": [asdict(s) for s in stages],
        "others": [asdict(s) for s in clock.stages],
        "versions": versions(),
    }


def weight_counts(backbone: Backbone) -> dict[str, int]:
    """Return the matrix entries of the model's parts.

    They are the trunk's blocks, the blocks from the first edited one on (``top``) and those over it
    (``above``), all without the last block's MLP (``last``), and the head. The last MLP and the
    head work at answer positions only.
    """
    sizes = [_entries(block) for block in backbone.blocks]
    last = _entries(backbone.model.get_submodule(backbone.last_mlp)) if backbone.last_mlp else 0
    sizes[-1] -= last
    first = backbone.first_edited
    return {
        "trunk": sum(sizes[:first]),
        "top": sum(sizes[first:]),
        "above": sum(sizes[first + 1 :]),
        "last": last,
        "head": backbone.head.weight.numel(),
    }


def _entries(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


class _Clock:
    """Runs stages and notes what each took."""

    def __init__(self, devices: Collection[torch.device]):
        self.devices, self.stages = devices, []

    def __call__(self, name: str, run):
        reset_peak_memory()
        seconds, result = timed(run, *self.devices)
        self.stages.append(Stage(name, seconds, peak_memory_mb()))
        return result


def matrix_rate(dtype: torch.dtype, device: torch.device, width: int | None = None) -> float:
    """Return the operations a second of a square matrix product, the best of a few."""
    width = width or (8192 if device.type == "cuda" else 1536)
    a = torch.randn(width, width, device=device).to(dtype)
    return 2 * width**3 / min(timed(lambda: a @ a, device)[0] for _ in range(6))


def bandwidth(device: torch.device, n_bytes: int = 2**28) -> float:
    """Return the bytes a second, read and written, of a copy, the best of a few."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / min(timed(lambda: target.copy_(source), device)[0] for _ in range(6))


def solve_operations(n: float, d: int, d_out: int) -> float:
    """Return the operations of Eq. 2 for n tokens.

    They are those of the Gram matrix (half of it), Cholesky, two triangular solves, and the product
    with H.
    """
    m = min(n, d)
    return n * d * m + m**3 / 3 + 2 * m * m * d_out + 2 * n * d * d_out


def _floors(backbone: Backbone, network, prompts, rates: dict) -> dict[str, float]:
    """Return the seconds of each stage that no implementation of the method goes below."""
    distinct = dict.fromkeys(prompts)
    tokens, late = sum(len(p.inputs) for p in distinct), sum(p.n_late for p in distinct)
    n, sizes = sum(len(p.answer) for p in prompts), weight_counts(backbone)
    item = torch.finfo(backbone.edit_dtype).bits // 8
    weight = torch.finfo(backbone.model.dtype).bits // 8
    # The gradient stops at the lowest module, and what lies before a prompt's first key needs none.
    # The last MLP and the head see answers only.
    captured = 2 * (sizes["top"] * tokens + sizes["above"] * late)
    captured += (4 if sizes["above"] else 2) * sizes["last"] * n + 4 * sizes["head"] * n
    lowrank = spread_bytes = solving = applying = 0
    for l, (d, d_out) in enumerate(network.shapes):
        for block in network.group_of(l)[0].blocks:
            lowrank += 4 * n * block.A.numel()
        spread_bytes += item * n * (2 * d + 5 * d_out)  # H, H̃, ∇G̃, R; then R, R_{l−1}, R'
        solving += solve_operations(n, d, d_out)
        applying += (2 * weight + item) * d * d_out
    return {
        "trunk": 2 * sizes["trunk"] * tokens / rates["model_flops"],
        "capture": captured / rates["model_flops"],
        "network": lowrank / rates["solver_flops"],
        "residual and spread": spread_bytes / rates["bytes"],
        "solve": solving / rates["solver_flops"],
        "apply": applying / rates["bytes"],
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the processor's with the number of its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.machine()
