"""Our edits beside benchmarks/reference.py on a GPU, on a model of Llama-2-7B's shape.

    python -m benchmarks.gpu --data FACTS.json --out gpu.json

One call: random bf16 weights made on the device, 100 and 8,000 edits, ours and the reference in
turns, in one process; seconds, peak memory, every stage beside its floor. It writes JSON after each
step, so that little is lost if it is cut short, and prints Markdown for benchmarks/results.md.
Without a GPU it says so and is done. `--device cpu --config FOLDER` runs it on anything.

The vocabulary is the tokenizer's if that is larger than the config's. Products in float32 are that
(no TF32) unless torch is told otherwise; the JSON says which.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import transformers

from benchmarks.engine import Pair, seconds
from horse_plugin import EditRecord, HORSEHyperParams, load_records
from horse_plugin.assets import FACTS, hparams_folder
from horse_plugin.comparison.bench import bench
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import random_model


def enough(records: list[EditRecord], n: int) -> list[EditRecord]:
    """n records; if there are fewer, they come again with a number before the prompt."""
    more = (replace(r, prompt=f"{i}. {r.prompt}") for i in count(2) for r in records)
    return (records + [next(more) for _ in range(n - len(records))])[:n]


def turns(pair: Pair, times: int, until: float) -> list[dict]:
    """Seconds and peak memory in MB of ours and of the reference, turn by turn, at least one."""
    found = []
    while len(found) < times and not (found and time.perf_counter() > until):
        turn = {}
        for name, run in (("ours", pair.edit), ("reference", pair.edit_reference)):
            reset_peak_memory()
            turn[name] = {"seconds": seconds(run), "peak_memory_mb": peak_memory_mb()}
        found.append(turn)
    return found


def markdown(found: dict) -> str:
    """The tables for benchmarks/results.md."""
    about = found["edits"][0]["bench"]
    lines = [
        f"{about['device']}, {found['model']} with random weights in {about['dtype']}, "
        f"{found['model_mb']:.0f} MB of weights, torch {about['versions']['torch']}; medians",
        "",
        "| edits | turns | ours s | reference s | ratio | floor s | times the floor "
        "| ours peak MB | reference peak MB |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for e in found["edits"]:
        figures = [
            statistics.median(t[who][what] for t in e["turns"])
            for what in ("seconds", "peak_memory_mb")
            for who in ("ours", "reference")
        ]
        ours, reference, *peaks = figures
        floor = sum(s["floor_seconds"] or 0 for s in e["bench"]["stages"])
        ratio = statistics.median(
            t["reference"]["seconds"] / t["ours"]["seconds"] for t in e["turns"]
        )
        cells = [f"{e['bench']['n_edits']:,}", str(len(e["turns"])), f"{ours:.3f}"]
        cells += [f"{reference:.3f}", f"{ratio:.1f}", f"{floor:.3f}", f"{ours / floor:.1f}"]
        lines.append(f"| {' | '.join(cells + [f'{p:.0f}' for p in peaks])} |")
    for e in found["edits"]:
        lines += ["", f"| {e['bench']['n_edits']:,} edits | seconds | floor | peak MB |"]
        lines.append("|---|--:|--:|--:|")
        for s in e["bench"]["stages"]:
            floor = "" if s["floor_seconds"] is None else f"{s['floor_seconds']:.4f}"
            cells = s["name"], f"{s['seconds']:.4f}", floor, f"{s['peak_memory_mb']:.0f}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="the GPU by default")
    parser.add_argument("--config", help="folder or JSON of another model's config")
    parser.add_argument("--tokenizer", help="its folder; the default model's by default")
    parser.add_argument("--data", default=str(FACTS / "train.json"))
    parser.add_argument("--n-edits", type=int, nargs="+", default=[100, 8000])
    parser.add_argument("--times", type=int, default=3, help="turns, at most")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new turn after so long")
    parser.add_argument("--out", default="gpu.json")
    args = parser.parse_args()
    if not args.device and not torch.cuda.is_available():
        print("gpu.py: no CUDA GPU here, nothing measured; --device cpu runs it all the same.")
        return
    until = time.perf_counter() + 60 * args.minutes
    name = args.config or "Llama-2-7B's shape"
    paper = HORSEHyperParams.from_hparams(hparams_folder() / "HORSE/llama2-7b.yaml")
    hparams = replace(
        paper, device=args.device, tokenizer_name=args.tokenizer, inner_params=[], lr=None
    )
    if args.device == "cpu":
        hparams.half = None  # many CPUs multiply bf16 a hundred times slower than fp32
    with tempfile.TemporaryDirectory() as folder:
        if not args.config:  # the defaults are that model's
            transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        model, tokenizer = random_model(args.config or folder, hparams)
    records = load_records(args.data)
    found = {
        "model": Path(name).name,
        "model_mb": sum(p.nbytes for p in model.parameters()) / 2**20,
        "float32_products": torch.get_float32_matmul_precision(),
        "edits": [],
    }
    for n in args.n_edits:
        some = enough(records, n)
        pair = Pair(replace(hparams), some, Backbone.of(model, tokenizer, hparams))
        few = Pair(replace(hparams), some[:32], pair.backbone)
        few.edit(), few.edit_reference()  # the libraries' own first-time work
        edits = {"turns": turns(pair, args.times, until)}
        # Training and evaluation belong to the first; thousands in one step are not trained on.
        edits["bench"] = bench(pair.backbone, pair.hparams, some, others=n <= 500)
        found["edits"].append(edits)
        Path(args.out).write_text(json.dumps(found, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
