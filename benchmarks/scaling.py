"""Time and memory of an edit over the number of facts, the model's width and depth, and processes.

    python -m benchmarks.scaling --data FACTS.json --out scaling.json

Every point is a process of its own: random weights of the default model's config, or of one like
it but wider or deeper; the median of a few edits, their peak memory from after loading on, and the
stages of `horse bench`. To the points over the number of facts it fits what the method says:

    seconds = a + b·n + c·(operations of the solve), peak memory = a + b·n

The solve of m answer tokens takes m·d·k + k³/3 + … operations, k = min(m, d): m³ while the dual is
the smaller system, linear in m from m = d on. JSON has the points and the fits; the Markdown tables
are for docs/scaling.md, and say where a figure is extrapolated. Points are kept in a .jsonl beside
it at once, and a run that was stopped goes on after them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers

from benchmarks.gpu import enough
from horse_plugin import HorseEditor, distributed, load_records
from horse_plugin.assets import DEFAULT_MODEL, FACTS
from horse_plugin.assets.default_model import resolve
from horse_plugin.comparison.bench import bench, solve_operations
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory
from horse_plugin.hparams import default_hparams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.model.loading import random_model

FAR = (100_000, 1_000_000)


def sized(config, width: int | None, depth: int | None):
    """The config of a model like this one, of another width or depth."""
    wide = (width or config.hidden_size) / config.hidden_size
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        setattr(config, name, round(getattr(config, name) * wide))
    config.num_hidden_layers = depth or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * config.num_hidden_layers
    return config


def point(args) -> dict | None:
    """Measure in this process; of several processes the first one says what it found."""
    default = replace(default_hparams(), archive=None)  # which is of another shape
    hparams = replace(default, device=args.device, inner_params=[], tokenizer_name=args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.AutoConfig.from_pretrained(resolve(args.config))
        sized(config, args.width, args.depth).save_pretrained(folder)
        backbone = Backbone.of(*random_model(folder, hparams), hparams)
    records = enough(load_records(args.data), args.alone)
    few = backbone.prepare(records[:32], ["edit"]).flat()
    network = HorseEditor.from_backbone(backbone, hparams).untrained_network(capture(backbone, few))
    editor = HorseEditor.from_backbone(backbone, hparams, network)
    editor.edit(records[:32])  # the libraries' own first-time work
    editor.undo()
    reset_peak_memory()
    seconds = []
    for _ in range(args.times):
        seconds.append(editor.edit(records).about["seconds"])
        editor.undo()
    found = {"seconds": statistics.median(seconds), "peak_memory_mb": peak_memory_mb()}
    if distributed.world_size() == 1:
        found["bench"] = bench(backbone, hparams, records, others=False)
    config = backbone.model.config
    found |= {
        "n_edits": len(records),
        "n_answer_tokens": sum(len(p.answer) for p in backbone.prepare(records, ["edit"]).flat()),
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "processes": distributed.world_size(),
        "shapes": backbone.shapes,
    }
    return found if distributed.is_main_process() else None


def measure(args, n: int, width=None, depth=None, processes: int = 1) -> dict:
    """A point, in new processes; or from the file, if an earlier run measured it."""
    settings = args.data, args.config, args.tokenizer, args.device, args.times
    asked = [*settings, n, width, depth, processes]
    kept = Path(args.out).with_suffix(".jsonl")
    for line in kept.read_text().splitlines() if kept.is_file() else ():
        point = json.loads(line)
        if point["asked"] == asked:
            return point["found"]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.scaling", "--alone", str(n)]
    command += ["--data", args.data, "--config", args.config]
    for name, value in (
        ("times", args.times),
        ("width", width),
        ("depth", depth),
        ("device", args.device),
        ("tokenizer", args.tokenizer),
    ):
        command += [f"--{name}", str(value)] if value is not None else []
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    print(
        f"{n} edits, width {found['width']}, depth {found['depth']}, {processes} processes: "
        f"{found['seconds']:.2f} s, {found['peak_memory_mb']:.0f} MB",
        file=sys.stderr,
    )
    with kept.open("a") as file:
        print(json.dumps({"asked": asked, "found": found}), file=file)
    return found


def fit(points: list[dict]) -> dict:
    """The constants of the two laws, by least squares of relative errors, and those errors."""

    def least_squares(columns, y):
        columns, y = np.array(columns, dtype=float).T, np.array(y)
        return np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0].tolist()

    n = [p["n_edits"] for p in points]
    solves = [next(s for s in p["bench"]["stages"] if s["name"] == "solve") for p in points]
    operations = [_operations(p) for p in points]
    per_operation = least_squares([operations], [s["seconds"] for s in solves])
    rest = [max(p["seconds"] - s["seconds"], 1e-9) for p, s in zip(points, solves, strict=True)]
    tokens = sum(p["n_answer_tokens"] for p in points) / sum(n)
    laws = {
        "tokens_per_edit": tokens,
        "shapes": points[-1]["shapes"],
        "seconds": least_squares([np.ones(len(n)), n], rest),
        "seconds_per_operation": per_operation[0],
        "megabytes": least_squares([np.ones(len(n)), n], [p["peak_memory_mb"] for p in points]),
    }
    laws["errors"] = [
        {k: predicted[k] / p[k] - 1 for k in predicted}
        for p in points
        for predicted in [extrapolate(laws, p["n_edits"])]
    ]
    return laws


def _operations(p: dict) -> float:
    return sum(solve_operations(p["n_answer_tokens"], *shape) for shape in p["shapes"])


def extrapolate(laws: dict, n: int) -> dict:
    tokens = {"n_answer_tokens": n * laws["tokens_per_edit"], "shapes": laws["shapes"]}
    a, b = laws["seconds"]
    at, each = laws["megabytes"]
    seconds = a + b * n + laws["seconds_per_operation"] * _operations(tokens)
    return {"seconds": seconds, "peak_memory_mb": at + each * n}


def markdown(found: dict) -> str:
    """The tables for docs/scaling.md."""

    def table(names, points, of):
        return [
            "",
            f"| {' | '.join(names)} | s | s per 1,000 | peak MB |",
            "|--:" * (len(names) + 3) + "|",
            *(
                f"| {' | '.join(f'{p[k]:,}' for k in of)} | {p['seconds']:,.2f} "
                f"| {1000 * p['seconds'] / p['n_edits']:,.2f} | {p['peak_memory_mb']:,.0f} |"
                for p in points
            ),
        ]

    about = found["edits"][0]["bench"]
    lines = [
        f"{about['device']}, {about['threads']} threads, {about['dtype']}, torch "
        f"{about['versions']['torch']}, random weights; median of {found['times']}"
    ]
    lines += table(["edits"], found["edits"], ["n_edits"])
    for n in FAR:
        p = extrapolate(found["fit"], n)
        lines.append(
            f"| {n:,}, extrapolated | {p['seconds']:,.0f} | {1000 * p['seconds'] / n:,.2f} "
            f"| {p['peak_memory_mb']:,.0f} |"
        )
    worst = {
        k: max(abs(e[k]) for e in found["fit"]["errors"]) for k in ("seconds", "peak_memory_mb")
    }
    lines += [
        "",
        f"The fit is off by at most {100 * worst['seconds']:.0f}% in time and "
        f"{100 * worst['peak_memory_mb']:.0f}% in memory at the measured points.",
    ]
    for name in ("width", "depth", "processes"):
        if found[name]:
            lines += table([name, "edits"], found[name], [name, "n_edits"])
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(FACTS / "train.json"))
    parser.add_argument(
        "--config", default=DEFAULT_MODEL, help="folder of a Llama-like model's config"
    )
    parser.add_argument("--tokenizer", help="its folder; the default model's by default")
    parser.add_argument("--device")
    parser.add_argument(
        "--n-edits", type=int, nargs="+", default=[100, 200, 500, 1000, 2000, 4000, 8000]
    )
    parser.add_argument("--widths", type=int, nargs="*", default=[192, 384, 576, 1152])
    parser.add_argument("--depths", type=int, nargs="*", default=[10, 20, 30, 60])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--model-edits", type=int, default=500, help="but over their number")
    parser.add_argument("--times", type=int, default=3, help="edits at each point")
    parser.add_argument("--out", default="scaling.json")
    for name in ("alone", "width", "depth"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        if (found := point(args)) is not None:
            print(json.dumps(found))
        return
    found = {"times": args.times, "edits": [measure(args, n) for n in sorted(args.n_edits)]}
    n = args.model_edits
    found["fit"] = fit(found["edits"])
    found["width"] = [measure(args, n, width=w) for w in args.widths]
    found["depth"] = [measure(args, n, depth=d) for d in args.depths]
    found["processes"] = [measure(args, n, processes=k) for k in args.processes]
    Path(args.out).write_text(json.dumps(found, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
