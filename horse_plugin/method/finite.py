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
