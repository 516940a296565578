"""Whether the edit modules can hold so many facts, said before any weight moves."""

import math
import warnings

from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.ridge import Ridge

# What a row moves over what it would move alone. Below the first, nearly all facts hold with more
# sweeps; below the second, answers undo each other from sweep to sweep.
CROWDED, TOO_CROWDED = 0.7, 0.35
SWEEPS = 5.0  # that nearly all facts took where keys do not crowd


def warn_if_crowded(ridge: Ridge, hparams: HORSEHyperParams):
    """Warn where the sweeps of an edit will not write all of its facts.

    A row of keys that crowd moves less of its residual than it would alone
    (:meth:`Ridge.crowding`), and takes as many more sweeps.

    Args:
        ridge: Eq. 2 for the keys of all facts in one edit module.
    """
    share, alone = ridge.crowding()
    if share <= 0 or share >= CROWDED * alone:  # 0: the ridge term leaves nothing to compare
        return
    n, needed = hparams.edit_sweeps, math.ceil(SWEEPS * alone / share)
    if share < TOO_CROWDED * alone:
        more = ""
    elif n >= needed:
        return
    else:
        more = f"edit_sweeps: {needed}, " if n > 1 else "sweeps (token: subject, edit_sweeps), "
    warnings.warn(
        f"{ridge.n:,} answer tokens crowd the edit modules: each moves {share:.0%} of what it asks "
        f"for, and {alone:.0%} alone. With edit_sweeps: {n} some facts will not hold. Try {more}"
        "more modules in inner_params, or fewer facts at once",
        stacklevel=2,
    )
