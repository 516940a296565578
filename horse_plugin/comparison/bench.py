"""Where the time of an edit goes, stage by stage, beside the least it could take on this machine.

A floor counts the operations of a stage over the machine's measured rate of matrix products, or
its bytes over the measured bandwidth; attention, norms and padding are left out of it.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from horse_plugin.data.records import EditRecord
from horse_plugin.editing.delta import EditDelta
from horse_plugin.editing.editor import HorseEditor, solve_shifts, versions
from horse_plugin.evaluation.metrics import Evaluator
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory
from horse_plugin.method.residual import residual, spread
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import trace
from horse_plugin.training.trainer import HORSETrainer


@dataclass
class Stage:
    """One stage: its seconds, its peak memory in MB, and the fewest seconds possible, if known."""

    name: str
    seconds: float
    peak_memory_mb: float
    floor_seconds: float | None = None


def bench(backbone: Backbone, hparams, records: Sequence[EditRecord], others: bool = True) -> dict:
    """Measure one edit of all the records and, with ``others``, its evaluation and a training step
    on them.

    An untrained network is fitted beforehand, so that it costs what a trained one does. Trunk
    states that there is no room for are computed in the stages after the trunk. The model is left
    as it was.

    Returns:
        ``stages`` of the edit, ``others`` (evaluation and training step, with trunk states kept),
        measured rates of the machine, sizes, versions.
    """
    hp, device, clock = hparams, backbone.edit_device, _Clock(backbone.device)
    rates = {
        "model_flops": matrix_rate(backbone.model.dtype, device),
        "solver_flops": matrix_rate(backbone.edit_dtype, device),
        "bytes": bandwidth(device),
    }
    fitting = backbone.tokenize([r.edit for r in records[:64]], hp.max_length)
    editor = HorseEditor.from_backbone(backbone, hp)
    if editor.network is None:
        network = editor._fitted(trace(backbone, fitting, hp.batch_tokens))
        editor = HorseEditor.from_backbone(backbone, hp, network)
    network = editor.network

    with torch.no_grad():
        queries = [r.edit for r in records]
        prompts = clock("tokenise", lambda: backbone.tokenize(queries, hp.max_length))
        clock("trunk", lambda: backbone.keep(prompts, hp.batch_tokens))
        traced = clock("trace", lambda: trace(backbone, prompts, hp.batch_tokens))
        pairs = list(zip(traced.keys, traced.grads, strict=True))

        def pseudo_pairs():  # in the chunks of an edit, which keeps only what becomes of them
            rows = hp.editor_batch_size
            for l, (h, g) in enumerate(pairs):
                chunks = zip(h.split(rows), g.split(rows), strict=True)
                found = [network(l, *chunk) for chunk in chunks]
                yield tuple(torch.cat(part) for part in zip(*found, strict=True))

        pseudo = clock("network", lambda: list(pseudo_pairs()))

        def residuals():
            etas = network.log_eta.exp()
            raw = [residual(h, *p, e) for (h, _), p, e in zip(pairs, pseudo, etas, strict=True)]
            return spread(raw, network.spread, network.spread_strength)

        spreads = clock("residual and spread", residuals)

        solved = clock("solve", lambda: solve_shifts(backbone, network, traced, spreads, hp))
        delta = EditDelta(solved, [])
        before = clock("apply", lambda: backbone.add(delta.shifts))
        backbone.restore(before)
    stages, clock.stages = clock.stages, []
    for stage, floor in _floors(backbone, network, prompts, rates).items():
        next(s for s in stages if s.name == stage).floor_seconds = floor

    if others:
        evaluator = Evaluator(backbone, records, hp.batch_tokens, hp.max_length)
        clock("evaluation", evaluator.evaluate)
        trainer = HORSETrainer(hp, records, records, "unused", backbone, progress=False)
        clock("training step", lambda: trainer.train_step(records))
    return {
        "model": backbone.fingerprint()["name"],
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "n_edits": len(records),
        "n_tokens": sum(len(p.inputs) for p in prompts),
        "n_answer_tokens": len(traced.keys[0]),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "rates": rates,
        "stages": [asdict(s) for s in stages],
        "others": [asdict(s) for s in clock.stages],
        "versions": versions(),
    }


class _Clock:
    """Runs stages and notes what each took."""

    def __init__(self, device: torch.device):
        self.device, self.stages = device, []

    def __call__(self, name: str, run):
        reset_peak_memory()
        seconds, result = _timed(run, self.device)
        self.stages.append(Stage(name, seconds, peak_memory_mb()))
        return result


def _timed(run, device):
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def matrix_rate(dtype: torch.dtype, device: torch.device, width: int | None = None) -> float:
    """Operations a second of a square matrix product, the best of a few."""
    width = width or (8192 if device.type == "cuda" else 1536)
    a = torch.randn(width, width, device=device).to(dtype)
    return 2 * width**3 / min(_timed(lambda: a @ a, device)[0] for _ in range(6))


def bandwidth(device: torch.device, n_bytes: int = 2**28) -> float:
    """Bytes a second, read and written, of a copy, the best of a few."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / min(_timed(lambda: target.copy_(source), device)[0] for _ in range(6))


def solve_operations(n: float, d: int, d_out: int) -> float:
    """Operations of Eq. 2 for n tokens: Gram matrix (half of it), Cholesky, two triangular solves,
    and the product with H."""
    m = min(n, d)
    return n * d * m + m**3 / 3 + 2 * m * m * d_out + 2 * n * d * d_out


def _floors(backbone: Backbone, network, prompts, rates: dict) -> dict[str, float]:
    """Seconds per stage that no implementation of the method goes below."""
    tokens = sum(len(p.inputs) for p in dict.fromkeys(prompts))
    n, sizes = sum(len(p.answer) for p in prompts), backbone.n_weights
    item = torch.finfo(backbone.edit_dtype).bits // 8
    weight = torch.finfo(backbone.model.dtype).bits // 8
    # The gradient stops at the lowest module; the last MLP and the head see answers only.
    traced = 2 * (sizes["top"] + sizes["above"]) * tokens
    traced += (4 if sizes["above"] else 2) * sizes["last"] * n + 4 * sizes["head"] * n
    lowrank = spread_bytes = solving = applying = 0
    for l, (d, d_out) in enumerate(network.shapes):
        for block in network._place(l)[0].blocks:
            lowrank += 4 * n * block.A.numel()
        spread_bytes += item * n * (2 * d + 5 * d_out)  # H, H̃, ∇G̃, R; then R, R_{l−1}, R'
        solving += solve_operations(n, d, d_out)
        applying += (2 * weight + item) * d * d_out
    return {
        "trunk": 2 * sizes["trunk"] * tokens / rates["model_flops"],
        "trace": traced / rates["model_flops"],
        "network": lowrank / rates["solver_flops"],
        "residual and spread": spread_bytes / rates["bytes"],
        "solve": solving / rates["solver_flops"],
        "apply": applying / rates["bytes"],
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.machine()
