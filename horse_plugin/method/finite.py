"""Whether numbers are finite: every key, gradient, residual, shift and weight must be."""

import torch


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Return whether all entries are finite, as a boolean on the tensor's device.

    Where an entry is NaN, the smallest and the largest are NaN, too; where one is infinite, it is
    one of the two. They are found many times as fast as ``isfinite().all()`` looks at each entry.
    """
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.stack(torch.aminmax(x)).isfinite().all()


def first_not_finite(rows: torch.Tensor) -> int | None:
    """Return the index of the first of n rows with an entry that is not finite, or None."""
    if all_finite(rows):
        return None
    return (~rows.isfinite().all(-1)).nonzero()[0].item()
