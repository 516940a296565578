"""Train a HORSE archive, in the manner of EasyEdit's EditTrainer.

    python examples/train_horse.py                      # the default model, the package's facts
    python examples/train_horse.py --hparams_dir hparams/HORSE/llama2-7b \\
        --train_dir counterfact-train.json --val_dir counterfact-val.json

Set ``archive:`` in the YAML to the folder that this prints; the same file then edits.
"""

import argparse
from pathlib import Path

from horse_plugin import FACTS, HORSEHyperParams, HORSETrainer

HPARAMS = Path(__file__).parents[1] / "hparams/HORSE"

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hparams_dir", default=str(HPARAMS / "llama-smollm2-135m"))
    parser.add_argument("--train_dir", default=str(FACTS / "train.json"), help="a JSON file")
    parser.add_argument("--val_dir", default=str(FACTS / "val.json"), help="a JSON file")
    parser.add_argument(
        "--edits_per_step", "--n_edits", default=None, type=int, help="facts in each training step"
    )
    parser.add_argument("--max_iters", default=None, type=int, help="stop after so many steps")
    args = parser.parse_args()

    hparams = HORSEHyperParams.from_hparams(args.hparams_dir)
    if args.edits_per_step:
        hparams = hparams.in_steps_of(args.edits_per_step)
    hparams.max_iters = args.max_iters or hparams.max_iters

    # EasyEdit's CounterFactDataset(path) and ZsreDataset(path) do as well as a path, and
    # EditTrainer(config, train_set, val_set) as well as HORSETrainer.
    trainer = HORSETrainer(config=hparams, train_set=args.train_dir, val_set=args.val_dir)
    print(f"archive: {trainer.run()}")
