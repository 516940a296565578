"""How long editing and training take on this machine: medians over runs, as a table and JSON.

    python benchmarks/engine.py --data FACTS.json --n-edits 500 --out engine.json

An edit is timed from records to edited weights, the model being loaded; `first` has no trunk
states to fall back on, `again` has them all. A training step is timed in the same two ways.
"""

import argparse
import json
import platform
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from horse_plugin import HorseEditor, HORSEHyperParams, HORSETrainer, load_records
from horse_plugin.backbone import Backbone
from horse_plugin.demo import FACTS, default_hparams
from horse_plugin.results import peak_memory_mb


def timed(run, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(hparams: HORSEHyperParams, data: str, n_edits: int, times: int) -> dict:
    hparams.n_edits = n_edits
    records = load_records(data, n_edits)
    backbone = Backbone.load(hparams)
    editor = HorseEditor.from_backbone(backbone, hparams)
    trainer = HORSETrainer(hparams, records, records, "unused", backbone, progress=False)

    def edit():
        editor.edit(records)
        editor.undo()

    def step():
        trainer.train_step(records)

    edit()  # warm-up: the libraries' own first-time work
    first = {"edit, first": timed(edit, times), "training step, first": timed(step, times)}
    queries = [q for r in records for q in (r.edit, *r.equivalent, *r.unrelated)]
    backbone.keep(backbone.tokenize(queries), hparams.batch_tokens)
    return first | {"edit, again": timed(edit, times), "training step, again": timed(step, times)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hparams", help="YAML; the default model's by default")
    parser.add_argument("--data", default=str(FACTS / "train.json"))
    parser.add_argument("--n-edits", type=int, default=500)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", help="where to write JSON")
    args = parser.parse_args()
    hparams = HORSEHyperParams.from_hparams(args.hparams) if args.hparams else default_hparams()
    seconds = measure(hparams, args.data, args.n_edits, args.times)
    table = Table("what", "median s", "min", "max", title=f"{args.n_edits} facts")
    for what, values in seconds.items():
        figures = (statistics.median(values), min(values), max(values))
        table.add_row(what, *(f"{v:.2f}" for v in figures))
    Console().print(table)
    print(f"peak memory {peak_memory_mb():.0f} MB, {torch.get_num_threads()} threads")
    if args.out:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        with open(args.out, "w") as file:
            json.dump({"seconds": seconds, "peak_memory_mb": peak_memory_mb(), **about}, file)


if __name__ == "__main__":
    main()
