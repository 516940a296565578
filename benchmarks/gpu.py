"""Our engine beside benchmarks/reference.py on a GPU, on a model of Llama-2-7B's shape.

    python -m benchmarks.gpu --data FACTS.json --tokenizer FOLDER --out gpu.json

One call on a machine that has torch and transformers and nothing of ours: random bf16 weights made
on the device; edits of 100, 500, 1,000 and 8,000 facts and training steps on 500 and 1,000, ours
and the reference in turns, in one process; seconds, memory over the weights, every stage of an edit
beside its floor. Weights are put back after the clock; trunk states of training steps are kept from
the first turn on. JSON is written after every turn, so that little is lost if it is cut short, and
Markdown for benchmarks/results.md is printed. Without a GPU it says so and is done.
`--device cpu --config FOLDER` runs it on anything.

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

from benchmarks import reference as plain
from benchmarks.engine import Pair, seconds
from horse_plugin import EditRecord, HORSEHyperParams, load_records
from horse_plugin.assets import FACTS
from horse_plugin.comparison.bench import bench, device_name, matrix_rate
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory, versions
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import random_model

MEMORY = "/dev/shm"
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16)


def enough(records: list[EditRecord], n: int) -> list[EditRecord]:
    """n records; if there are fewer, they come again with a number before the prompt."""
    more = (replace(r, prompt=f"{i}. {r.prompt}") for i in count(2) for r in records)
    return (records + [next(more) for _ in range(n - len(records))])[:n]


def timed(run) -> dict[str, float]:
    """Seconds, and peak memory in MB over what was there before."""
    reset_peak_memory()
    before = peak_memory_mb()
    found = seconds(run)
    return {"seconds": found, "peak_memory_mb": peak_memory_mb() - before}


def turn(ours, reference) -> dict[str, dict]:
    """Ours and the reference, one after the other; the reference's files are in its figures, too.

    They lie in memory where the system has a folder for that.
    """
    spent = []

    def counted(use):
        def file(*args):
            start = time.perf_counter()
            found = use(*args)
            spent.append(time.perf_counter() - start)
            return found

        return file

    names = ("save_file", "load_file")
    uses, folder = [getattr(plain, name) for name in names], tempfile.tempdir
    found = {"ours": timed(ours)}
    try:
        tempfile.tempdir = MEMORY if Path(MEMORY).is_dir() else folder
        for name, use in zip(names, uses, strict=True):
            setattr(plain, name, counted(use))
        found["reference"] = timed(reference)
    finally:
        tempfile.tempdir = folder
        for name, use in zip(names, uses, strict=True):
            setattr(plain, name, use)
    found["reference"]["file_seconds"] = sum(spent)
    return found


def rates(device: torch.device) -> dict[str, float]:
    """Operations a second of square products, in each precision that the hardware has for them."""
    found = {str(d).removeprefix("torch."): matrix_rate(d, device) for d in PRECISIONS}
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        found["tf32"] = matrix_rate(torch.float32, device)
        torch.set_float32_matmul_precision(before)
    return found


def markdown(found: dict) -> str:
    """The tables for benchmarks/results.md."""
    about = found["about"]
    lines = [
        f"{about['device']}, {found['model']} with random weights in {about['dtype']}, "
        f"{found['model_mb']:.0f} MB of weights, torch {about['versions']['torch']}; medians; "
        "peak memory is over the weights",
        "",
        "| work | facts | turns | ours s | reference s | of it files s | ratio | floor s "
        "| floor s, TF32 | ours peak MB | reference peak MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for w in found["work"]:

        def median(who, what, turns=w["turns"]):
            return statistics.median(t[who][what] for t in turns)

        ratios = (t["reference"]["seconds"] / t["ours"]["seconds"] for t in w["turns"])
        floors = [f"{f:.3f}" for f in _floors(w.get("bench"), found["rates"])] or ["", ""]
        seconds_of = median("ours", "seconds"), median("reference", "seconds")
        cells = [w["work"], f"{w['facts']:,}", str(len(w["turns"]))]
        cells += [f"{s:.3f}" for s in (*seconds_of, median("reference", "file_seconds"))]
        cells += [f"{statistics.median(ratios):.1f}", *floors]
        cells += [f"{median(who, 'peak_memory_mb'):.0f}" for who in ("ours", "reference")]
        lines.append(f"| {' | '.join(cells)} |")
    for w in found["work"]:
        if "bench" not in w:
            continue
        lines += ["", f"| {w['facts']:,} edits | seconds | floor | peak MB |"]
        lines.append("|---|--:|--:|--:|")
        for s in w["bench"]["stages"]:
            floor = "" if s["floor_seconds"] is None else f"{s['floor_seconds']:.4f}"
            cells = s["name"], f"{s['seconds']:.4f}", floor, f"{s['peak_memory_mb']:.0f}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _floors(measured: dict | None, rates: dict[str, float]) -> list[float]:
    """The floor of an edit, and that with products of the network and the solve in TF32."""
    if measured is None:
        return []
    floors = {s["name"]: s["floor_seconds"] or 0 for s in measured["stages"]}
    faster = 1 - rates["float32"] / rates.get("tf32", rates["float32"])
    saved = faster * (floors["network"] + floors["solve"])
    return [sum(floors.values()), sum(floors.values()) - saved]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="the GPU by default")
    parser.add_argument("--config", help="folder or JSON of another model's config")
    parser.add_argument("--tokenizer", help="its folder; the default model's by default")
    parser.add_argument("--data", default=str(FACTS / "train.json"))
    parser.add_argument("--n-edits", type=int, nargs="+", default=[100, 500, 1000, 8000])
    parser.add_argument("--n-train", type=int, nargs="*", default=[500, 1000])
    parser.add_argument("--preserve", default="shipped", help="the text of our metric; none")
    parser.add_argument("--times", type=int, default=3, help="turns, at most")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new turn after so long")
    parser.add_argument("--out", default="gpu.json")
    args = parser.parse_args()
    if not args.device and not torch.cuda.is_available():
        print("gpu.py: no CUDA GPU here, nothing measured; --device cpu runs it all the same.")
        return
    until = time.perf_counter() + 60 * args.minutes
    name = args.config or "Llama-2-7B's shape"
    # The paper's step, with our metric: keys at the answer tokens, one sweep.
    hparams = HORSEHyperParams(model_name="random", rank=1920, edits_per_step=1000)
    hparams = replace(hparams, device=args.device, tokenizer_name=args.tokenizer, batch_tokens=4096)
    if args.device != "cpu":  # many of which multiply bf16 a hundred times slower than fp32
        hparams.half = True
    with tempfile.TemporaryDirectory() as folder:
        if not args.config:  # the defaults are that model's
            transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        model, tokenizer = random_model(args.config or folder, hparams)
    records = load_records(args.data)
    device = next(model.parameters()).device
    found = {
        "model": Path(name).name,
        "preserve": args.preserve,
        "model_mb": sum(p.nbytes for p in model.parameters()) / 2**20,
        "float32_products": torch.get_float32_matmul_precision(),
        "rates": rates(device),
        "about": {
            "device": device_name(device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": versions(),
        },
        "work": [],
    }

    def save():
        Path(args.out).write_text(json.dumps(found, indent=1))

    def pair_of(n: int) -> Pair:
        backbone = Backbone.of(model, tokenizer, hparams)
        return Pair(replace(hparams), enough(records, n), backbone, args.preserve)

    def measure(work: str, n: int, ours, reference) -> dict:
        found["work"].append({"work": work, "facts": n, "turns": []})
        turns = found["work"][-1]["turns"]
        while len(turns) < args.times and not (turns and time.perf_counter() > until):
            turns.append(turn(ours, reference))
            save()
        return found["work"][-1]

    save()
    few = pair_of(32)
    for run in (few.edit, few.edit_reference, few.train, few.train_reference):
        seconds(run)  # the libraries' own first-time work
    jobs = [("edit", n) for n in args.n_edits] + [("training step", n) for n in args.n_train]
    for work, n in sorted(jobs, key=lambda job: job[1]):
        if time.perf_counter() > until:
            break
        pair = pair_of(n)
        if work == "edit":
            done = measure(work, n, pair.edit, pair.edit_reference)
            done["bench"] = bench(pair.backbone, pair.hparams, pair.records, others=False)
        else:
            measure(work, n, pair.train, pair.train_reference)
        save()
    print(markdown(found))


if __name__ == "__main__":
    main()
