"""Edit CounterFact with HORSE through EasyEdit: all facts in one massive edit.

    python examples/run_horse_counterfact.py            # the default model, the package's facts
    python examples/run_horse_counterfact.py --hparams_dir hparams/HORSE/llama2-7b \\
        --data_dir counterfact-edit.json --ds_size 1000 --archive results/models/HORSE/llama-2-7b

Without an archive the network is untrained: it edits, but harms more (see train_horse.py).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from horse_plugin import FACTS, HORSEHyperParams

from easyeditor import BaseEditor, CounterFactDataset

HPARAMS = Path(__file__).parents[1] / "hparams/HORSE"

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hparams_dir", default=str(HPARAMS / "llama-smollm2-135m"))
    parser.add_argument("--data_dir", default=str(FACTS / "edit.json"), help="a JSON file")
    parser.add_argument("--ds_size", default=50, type=int)
    parser.add_argument("--archive", default=None, help="folder of a trained archive")
    parser.add_argument("--metrics_save_dir", default="./output", type=str)
    args = parser.parse_args()

    hparams = HORSEHyperParams.from_hparams(args.hparams_dir)
    hparams.archive = args.archive or hparams.archive or "untrained"
    hparams.batch_size = args.ds_size  # requests that go into one edit
    test_data = CounterFactDataset(args.data_dir, size=args.ds_size)

    editor = BaseEditor.from_hparams(hparams)
    metrics, edited_model, _ = editor.batch_edit(
        prompts=[data["prompt"] for data in test_data],
        target_new=[data["target_new"] for data in test_data],
        subject=[data["subject"] for data in test_data],
        ground_truth=[data["ground_truth"] for data in test_data],
        rephrase_prompts=[data["rephrase_prompt"] for data in test_data],
        locality_inputs={
            "neighborhood": {
                "prompt": [data["locality_prompt"] for data in test_data],
                "ground_truth": [data["locality_ground_truth"] for data in test_data],
            }
        },
        sequential_edit=True,  # else EasyEdit takes the edit back, and edited_model is unedited
        verbose=False,
    )

    for when in ("pre", "post"):
        for key in ("rewrite_acc", "rephrase_acc"):
            print(f"{when} {key}: {np.mean([np.mean(m[when][key]) for m in metrics]):.3f}")
    out = Path(args.metrics_save_dir, "HORSE_counterfact.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(metrics, indent=4, default=float))
    print(f"See results at: {out}")
