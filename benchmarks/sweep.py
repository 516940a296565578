"""Choose a baseline's settings: edit validation records with each of them, and compare.

    python -m benchmarks.sweep --method FT --data val.json --n-edits 50 --out sweep \
        --set "lr=5e-4, num_steps=25" --set "lr=1e-3, layers=[26]"

Each --set changes keys of the method's YAML. The mean of efficacy, generalization and specificity
decides. Rows already in the output folder are not measured again; one that failed says why.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from horse_plugin.assets import DEFAULT_MODEL, hparams_folder
from horse_plugin.comparison import methods
from horse_plugin.comparison.methods import METHODS
from horse_plugin.comparison.plan import DataSet, Plan
from horse_plugin.comparison.runner import run
from horse_plugin.comparison.tables import score
from horse_plugin.evaluation.metrics import SCORED
from horse_plugin.evaluation.tables import number
from horse_plugin.storage.digest import text_digest
from horse_plugin.storage.files import write


@dataclass(frozen=True)
class Variant(methods.EasyEdit):
    """One of EasyEdit's methods with some keys of its YAML changed."""

    changes: dict = field(default_factory=dict)

    def settings(self, task) -> dict:
        return super().settings(task) | {"changes": self.changes}

    def __call__(self, task):
        from horse_plugin.comparison.baselines import methods as baselines

        keys = task.keys(self.name)
        if unknown := set(self.changes) - set(keys):
            raise SystemExit(f"{self.name}'s YAML has no {', '.join(sorted(unknown))}.")
        text = yaml.safe_dump(keys | self.changes)
        path = task.folder / "variants" / f"{text_digest(text)}.yaml"
        write(path, text)
        yield from baselines.run(self.name, path, task)


def changes(text: str) -> dict:
    """``key=value, key=[1, 2]`` with YAML values; the text itself is the row's name."""
    return yaml.safe_load("{" + text.replace("=", ": ") + "}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", required=True, help="such as FT or MEMIT")
    parser.add_argument("--data", required=True, help="validation records")
    parser.add_argument("--train", help="records for MEND to train on")
    parser.add_argument("--val", help="records for MEND to validate on")
    parser.add_argument("--n-edits", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], help="keys of the YAML to change")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="stem of the YAMLs")
    parser.add_argument("--hparams-dir", type=Path, default=hparams_folder(), help="their folder")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    variants = {text: Variant(args.method, changes=changes(text)) for text in args.set}
    folder = args.hparams_dir
    plan = Plan(
        {"unedited": METHODS["unedited"], f"{args.method}, as it is": METHODS[args.method]}
        | variants,
        {args.model: folder / "HORSE" / f"{args.model}.yaml"},
        [DataSet.load(args.data, args.train, args.val)],
        (args.n_edits,),
        folder,
        args.out,
    )
    rows = run(plan)
    table = Table("settings", title=f"{args.n_edits} records of {args.data}", box=box.SIMPLE)
    for name in (*SCORED, "locality", "mean", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row[f] for f in (*SCORED, "locality")] + [score(row), row["edit_seconds"]]
        table.add_row(row["method"], *map(number, cells))
    console = Console()
    console.print(table)
    for row in rows:
        if row.get("reason"):
            console.print(f"{row['method']}: {row['reason']}", soft_wrap=True)


if __name__ == "__main__":
    main()
