"""Train and edit with several settings and seeds, on one loaded model; means over the seeds.

    python -m benchmarks.quality --train T.json --val V.json --edit E.json --n-edits 500 \
        --variant "Eq. 6: " --variant "no spread: spread=uniform" --seeds 0 1 2 --out quality

Settings belong to the validation set: look at the `val` columns to choose, at `edit` to report.
Rows already in the output folder are not measured again.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from horse_plugin import Evaluator, HorseEditor, HORSEHyperParams, HORSETrainer, load_records
from horse_plugin.evaluation import results
from horse_plugin.hparams import canonical, default_hparams
from horse_plugin.model.backbone import Backbone

FIGURES = ("efficacy", "generalization", "specificity", "locality")


def variant(text: str) -> tuple[str, dict]:
    """``name: key=value, key=value`` with YAML values."""
    name, _, settings = text.partition(":")
    pairs = (pair.split("=", 1) for pair in settings.split(",") if pair.strip())
    return name.strip(), {key.strip(): yaml.safe_load(value) for key, value in pairs}


def measure(backbone, hparams, name, args, evaluator) -> dict:
    """Train one archive, edit with it, and return a row of figures."""
    out = Path(args.out, f"{name}-{hparams.seed}".replace(" ", "-"))
    val = load_records(args.val)
    start = time.perf_counter()
    trainer = HORSETrainer(hparams, args.train, val[: args.n_val], out, backbone)
    trainer.run()
    seconds = time.perf_counter() - start
    editor = HorseEditor.from_backbone(backbone, replace(hparams, archive=str(out)))
    delta = editor.edit(evaluator.records)
    row = results.row(
        name, Path(args.edit).stem, hparams, evaluator.evaluate(), delta.about["seconds"]
    )
    editor.undo()
    best = {f"val_{k}": trainer.best[k] for k in (*FIGURES, "step")}
    return row | best | {"train_seconds": seconds, "steps": trainer.step}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hparams", help="YAML; the default model's by default")
    for name in ("train", "val", "edit", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--n-edits", type=int, default=500, help="records of EDIT to edit at once")
    parser.add_argument("--n-val", type=int, default=500, help="records of VAL to validate on")
    parser.add_argument("--variant", action="append", type=variant, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    base = HORSEHyperParams.from_hparams(args.hparams) if args.hparams else default_hparams()
    backbone = Backbone.load(base)
    records = load_records(args.edit, args.n_edits)
    evaluator = Evaluator(backbone, records)
    path = Path(args.out, "results.json")
    rows = json.loads(path.read_text()) if path.exists() else []
    if not rows:
        rows.append(results.row("unedited", Path(args.edit).stem, base, evaluator.before))
        editor = HorseEditor.from_backbone(backbone, base)
        seconds = editor.edit(records).about["seconds"]
        rows.append(
            results.row("untrained", Path(args.edit).stem, base, evaluator.evaluate(), seconds)
        )
        editor.undo()
        results.save(path, rows)
    for seed in args.seeds:
        for name, settings in args.variant:
            if any((r["method"], r["seed"]) == (name, seed) for r in rows):
                continue
            hparams = replace(base, seed=seed, **canonical(settings))
            rows.append(measure(backbone, hparams, name, args, evaluator))
            results.save(path, rows)
    show(rows)


def show(rows):
    table = Table("variant", "seeds", *(f"{s} {f[:3]}" for s in ("val", "edit") for f in FIGURES))
    for name in dict.fromkeys(r["method"] for r in rows):
        of = [r for r in rows if r["method"] == name]
        cells = [_spread([r.get(f"val_{f}") for r in of]) for f in FIGURES]
        cells += [_spread([r[f] for r in of]) for f in FIGURES]
        table.add_row(name, str(len(of)), *cells)
    Console(width=120).print(table)


def _spread(values) -> str:
    if None in values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f}±{statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
