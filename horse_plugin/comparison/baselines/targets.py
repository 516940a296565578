"""The target vectors z of the MEMIT family, kept from one edit to the next.

MEMIT, PMET, EMMET and AlphaEdit optimise a vector for each record on the unedited model. That is
nearly all of their work, and no other record has a part in it: EasyEdit can keep the vectors in
files, so that one that was found serves every number of edits and every setting of the solve, and
an edit that stopped goes on. EasyEdit finds the vectors of MEMIT, EMMET and AlphaEdit with the same
code, so that these share them.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from horse_plugin.storage.digest import json_digest, text_digest

# What a YAML says of the solve alone. The last of the layers is in the files' names.
SOLVE = frozenset(
    """alg_name mom2_update_weight mom2_dataset mom2_n_samples mom2_dtype mom2_adjustment stats_dir
    P_loc nullspace_threshold L2 emmet_lambda update_norm_lambda layers batch_size""".split()
)


class Targets:
    """Files of one method's vectors, for one model and seed.

    Args:
        folder: for the files of all methods.
        method: its name.
        hparams: EasyEdit's, a dataclass.
        model: the unedited model's name and dtype.
    """

    def __init__(self, folder: Path, method: str, hparams, model: str, seed: int):
        kind = "PMET" if method == "PMET" else "MEMIT"
        keys = {k: v for k, v in dataclasses.asdict(hparams).items() if k not in SOLVE}
        about = json_digest([kind, keys, hparams.layers[-1], model, seed])
        self.folder = folder / f"{kind}-{about}"
        # Filled in by EasyEdit with the layer, with PMET's block, the clamp, and the case's id.
        fields = 4 if kind == "PMET" else 3
        self.template = str(self.folder / f"{'-'.join(['{}'] * fields)}.npz")

    def named(self, requests: Sequence[dict]) -> list[dict]:
        """Return the requests with a digest of what they ask for as their ``case_id``."""
        names = [
            text_digest(json.dumps({k: r[k] for k in ("prompt", "subject", "target_new")}))
            for r in requests
        ]
        return [r | {"case_id": name} for r, name in zip(requests, names, strict=True)]

    def kept(self, requests: Sequence[dict]) -> int:
        """Return of how many of the named requests the vector is kept."""
        there = {file.stem.rpartition("-")[2] for file in self.folder.glob("*.npz")}
        return sum(r["case_id"] in there for r in requests)

    def seconds(self, n: int) -> float | None:
        """Return how long n vectors take, by the times between two files, or None if unknown."""
        times = sorted(file.stat().st_mtime for file in self.folder.glob("*.npz"))
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return n * statistics.median(gaps) if gaps else None
