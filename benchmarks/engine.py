"""Our engine beside benchmarks/reference.py, pair by pair in one run: seconds, ratios and memory.

    python -m benchmarks.engine --data FACTS.json --n-edits 500 --times 3 --out engine.json

The model is loaded, the network untrained, the dtype the same. Ours and the reference take turns;
a ratio is the median over the turns, of edits without their undoing. `first`: ours keeps no trunk
state yet, and a training step and an evaluation begin with keeping those of all its prompts;
`again`: they are kept, as from the second epoch. The reference has no such difference. Peak memory
is that of a process which does nothing else.

Both have the settings of the paper as printed, whatever the YAML says of keys, sweeps and losses.
With `--preserve shipped` ours solves Eq. 2 in the metric, whose moments are read before the clock.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reference import Reference
from horse_plugin import Evaluator, HorseEditor, HORSEHyperParams, HORSETrainer, load_records
from horse_plugin.assets import FACTS
from horse_plugin.comparison.methods import AS_PRINTED
from horse_plugin.editing.editor import versions
from horse_plugin.evaluation.results import peak_memory_mb, reset_peak_memory
from horse_plugin.hparams import default_hparams
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from horse_plugin.training.objective import TRAINED_ON


class Pair:
    """The same work, done by ours and by the reference, on one loaded model.

    Args:
        records: what is edited, trained on and evaluated, all at once.
        backbone: the model; loaded from the hparams by default.
        preserve: the text of our metric; ``none`` is C̄ = I, as the reference has it.
    """

    def __init__(
        self,
        hparams: HORSEHyperParams,
        records,
        backbone: Backbone | None = None,
        preserve: str = "none",
    ):
        changes = AS_PRINTED | {"archive": None, "preserve": preserve}
        hparams = replace(hparams, **changes)
        hparams.edits_per_step = len(records)
        self.hparams, self.records = hparams, records
        self.backbone = backbone or Backbone.load(hparams)
        few = self.backbone.prepare(records[:32], ["edit"]).flat()
        captured = capture(self.backbone, few)
        editor = HorseEditor.from_backbone(self.backbone, hparams)
        self.network, self.roots = editor.untrained_network(captured), editor.roots
        self.reference = Reference(self.backbone, self.network, hparams)
        self.weights = self.backbone.weights.clones()
        self.forget()

    def forget(self):
        """Have no trunk state kept."""
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        hp = self.hparams
        self.backbone = Backbone.of(model, tokenizer, hp)
        self.trainer = HORSETrainer(
            hp, self.records, self.records, "unused", self.backbone, progress=False
        )
        self.trainer.roots = self.roots  # else it would read the text again, inside the clock

    def keep(self):
        """Keep the trunk states of all prompts, as a training run does before its first step."""
        edits = self.backbone.prepare(self.records, TRAINED_ON)
        self.backbone.cache_trunk_states(edits.flat())

    def edit(self):
        editor = HorseEditor.from_backbone(
            self.backbone, self.hparams, self.network, roots=self.roots
        )
        editor.edit(self.records)
        return editor.undo

    def train(self):
        self.keep()
        self.trainer.train_step(self.trainer.batch(0))

    def evaluate(self):
        Evaluator(self.backbone, self.records).evaluate()

    def edit_reference(self):
        self.reference.edit(self.records)
        return lambda: self.backbone.weights.restore(self.weights)

    def train_reference(self):
        self.reference.train_step(self.records)

    def evaluate_reference(self):
        unrelated = [q for r in self.records for q in r.unrelated]
        edited = [q for r in self.records for q in (r.edit, *r.equivalent)]
        for queries in (edited, unrelated) * 2:  # before the edit and after it
            self.reference.predict(queries)

    def turns(self, times: int) -> dict[str, list[tuple[float, float]]]:
        """Per kind of work, (our seconds, the reference's) of each turn."""
        found = {}
        for _ in range(times):
            for name, ours, theirs in (
                ("edit", self.edit, self.edit_reference),
                ("training step", self.train, self.train_reference),
                ("evaluation", self.evaluate, self.evaluate_reference),
            ):
                self.forget()
                first, reference = seconds(ours), seconds(theirs)
                self.keep()
                again = seconds(ours)
                found.setdefault(f"{name}, first", []).append((first, reference))
                found.setdefault(f"{name}, again", []).append((again, reference))
        return found


def seconds(run) -> float:
    """Seconds of a function; the one that it returns to undo its work runs after the clock."""
    start = time.perf_counter()
    undo = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found = time.perf_counter() - start
    if undo:
        undo()
    return found


def _alone(which: str) -> float:
    """Peak memory in MB of an edit and a training step, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:], "--alone", which]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hparams", help="YAML; the default model's by default")
    parser.add_argument("--data", default=str(FACTS / "train.json"))
    parser.add_argument("--n-edits", type=int, default=500)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--preserve", default="none", help="the text of our metric; shipped")
    parser.add_argument("--out", help="where to write JSON")
    parser.add_argument("--alone", choices=("ours", "reference"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    hparams = HORSEHyperParams.from_hparams(args.hparams) if args.hparams else default_hparams()
    pair = Pair(hparams, load_records(args.data, args.n_edits), preserve=args.preserve)
    if args.alone:
        pairs = (pair.edit, pair.edit_reference), (pair.train, pair.train_reference)
        reset_peak_memory()  # loading, which is the same for both, takes more than the model
        for ours, theirs in pairs:
            seconds(ours if args.alone == "ours" else theirs)
        print(peak_memory_mb())
        return
    seconds(pair.edit)  # warm-up: the libraries' own first-time work
    seconds(pair.edit_reference)
    turns = pair.turns(args.times)
    memory = {which: _alone(which) for which in ("ours", "reference")}
    ratios = {what: statistics.median(b / a for a, b in t) for what, t in turns.items()}
    table = Table("what", "ours s", "reference s", "ratio", title=f"{len(pair.records)} facts")
    for what, taken in turns.items():
        medians = (statistics.median(s) for s in zip(*taken, strict=True))
        table.add_row(what, *(f"{m:.2f}" for m in medians), f"{ratios[what]:.1f}")
    Console().print(table)
    print("peak memory: " + ", ".join(f"{k} {v:.0f} MB" for k, v in memory.items()))
    if args.out:
        about = {"machine": platform.processor() or platform.machine(), "versions": versions()}
        about |= {"threads": torch.get_num_threads(), "dtype": str(pair.backbone.model.dtype)}
        with open(args.out, "w") as file:
            json.dump({"seconds": turns, "ratios": ratios, "peak_memory_mb": memory} | about, file)


if __name__ == "__main__":
    main()
