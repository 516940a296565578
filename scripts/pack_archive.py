"""Write a trained archive as one to ship: its matrices in bf16, and no path of this machine.

    python scripts/pack_archive.py archive horse_plugin/assets/archive

The files are half as large. Everything but the matrices keeps its precision.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from horse_plugin.editing.archive import ARCHIVE, read_network
from horse_plugin.hparams import PATHS, HORSEHyperParams
from horse_plugin.storage.tensors import load_tensors, save_tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path, help="the folder that horse train --out wrote")
    parser.add_argument("out", type=Path, help="the folder to write to")
    args = parser.parse_args()
    tensors, about = load_tensors(args.archive / ARCHIVE)
    tensors = {name: packed(name, tensor) for name, tensor in tensors.items()}
    default = {f.name: f.default for f in fields(HORSEHyperParams)}
    about["hparams"] |= {key: default[key] for key in set(PATHS) - {"model_name", "preserve"}}
    args.out.mkdir(exist_ok=True)
    save_tensors(args.out / ARCHIVE, tensors, about)
    read_network(args.out)  # which refuses what is not finite


def packed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the matrices A and B of the network's blocks in bf16, and all else as it is."""
    return tensor.bfloat16() if name.endswith((".A", ".B")) else tensor


if __name__ == "__main__":
    main()
