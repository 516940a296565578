"""What EasyEdit's way into an edit costs, next to HorseEditor.edit with the same requests.

    python -m benchmarks.easyedit_overhead --n-edits 200

Both run in one process, in turns, on the same model; each pair gives one ratio. EasyEdit's own
evaluation is not counted. Needs EasyEdit (see docs/easyedit.md).
"""

import argparse
import statistics
import time

from horse_plugin import HorseEditor, load_records
from horse_plugin.assets import FACTS
from horse_plugin.easyedit.patches import BaseEditor, HORSEHyperParams
from horse_plugin.hparams import default_hparams
from horse_plugin.model.backbone import Backbone


def requests(records) -> list[dict]:
    """What ``batch_edit`` makes of records and hands over."""
    return [
        {"prompt": r.prompt, "target_new": r.target_new, "ground_truth": r.ground_truth}
        for r in records
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hparams", help="a YAML; the default model's if left out")
    parser.add_argument("--archive", default="untrained", help="folder of a trained archive")
    parser.add_argument("--data", default=FACTS / "edit.json", help="facts in any form we read")
    parser.add_argument("--n-edits", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()

    hparams = HORSEHyperParams.from_hparams(args.hparams) if args.hparams else default_hparams()
    hparams.archive = args.archive
    records = load_records(args.data, args.n_edits)
    asked = requests(records)
    base = BaseEditor.from_hparams(hparams)
    backbone = Backbone(base.model, base.tok, hparams.inner_params)

    def through_easyedit() -> float:
        start = time.perf_counter()
        _, replaced = base.apply_algo(
            base.model, base.tok, asked, hparams, copy=False, return_orig_weights=True
        )
        seconds = time.perf_counter() - start
        for name, weight in replaced.items():
            base.model.get_parameter(name).data.copy_(weight)
        return seconds

    def directly() -> float:
        editor = HorseEditor.from_backbone(backbone, hparams)
        start = time.perf_counter()
        editor.edit(records)
        seconds = time.perf_counter() - start
        editor.undo()
        return seconds

    ratios = []
    for i in range(args.pairs + 1):
        seconds = {}
        for run in (through_easyedit, directly)[:: 1 if i % 2 else -1]:
            seconds[run] = run()
        if i:  # the first pair warms up
            ratios.append(seconds[through_easyedit] / seconds[directly])
            print(
                f"BaseEditor {seconds[through_easyedit]:.3f} s, HorseEditor "
                f"{seconds[directly]:.3f} s, ratio {ratios[-1]:.3f}"
            )
    print(f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} pairs")


if __name__ == "__main__":
    main()
