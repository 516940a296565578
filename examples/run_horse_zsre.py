"""Edit zsRE with HORSE through EasyEdit: a stream of massive edits, each on top of the last.

    python examples/run_horse_zsre.py                   # the default model, the package's facts
    python examples/run_horse_zsre.py --hparams_dir hparams/HORSE/llama2-7b \\
        --data_dir zsre_mend_eval.json --ds_size 1000 --batch_size 200

Measured once more at the end, on all facts and in batches: what later edits left of early ones.
Without an archive the network is untrained: it edits, but harms more (see train_horse.py).
"""

import argparse
from pathlib import Path

from horse_plugin import FACTS, Backbone, Evaluator, HORSEHyperParams, load_records

from easyeditor import BaseEditor

HPARAMS = Path(__file__).parents[1] / "hparams/HORSE"

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hparams_dir", default=str(HPARAMS / "llama-smollm2-135m"))
    parser.add_argument("--data_dir", default=str(FACTS / "edit.json"), help="a JSON file")
    parser.add_argument("--ds_size", default=60, type=int)
    parser.add_argument("--batch_size", default=20, type=int, help="requests in one edit")
    parser.add_argument("--archive", default=None, help="folder of a trained archive")
    args = parser.parse_args()

    hparams = HORSEHyperParams.from_hparams(args.hparams_dir)
    hparams.archive = args.archive or hparams.archive or "untrained"
    hparams.batch_size = args.batch_size
    records = load_records(args.data_dir, args.ds_size)  # zsRE, CounterFact, EasyEdit's requests

    editor = BaseEditor.from_hparams(hparams)
    evaluator = Evaluator(Backbone(editor.model, editor.tok), records)  # locality: as it is now
    editor.batch_edit(
        prompts=[r.prompt for r in records],
        target_new=[r.target_new for r in records],
        subject=[r.subject for r in records],
        rephrase_prompts=[r.rephrases[0] for r in records],
        sequential_edit=True,
        verbose=False,
    )
    for figure, percent in evaluator.evaluate().summary().items():
        if percent is not None:
            print(f"{figure}: {percent:.1f}")
