"""A digest of a weight's bits, computed where the weight is: no weight leaves its device.

The bits are words of 32; in blocks, they are multiplied by 64-bit factors and summed modulo 2⁶⁴
(multilinear hashing), twice; the sums of all blocks then go through SHA-256. One word that changes
always changes the digest. Whatever else changes by accident, which knows nothing of the factors,
goes unnoticed with a probability of 2⁻⁶⁶. Integers have no rounding, so that a GPU and a CPU agree.
The factors are no secret: who wants two weights of one digest can make them. It is no signature.
"""

import functools
import hashlib

import torch

BLOCK = 2**14  # words with one sum, and a factor each
AT_ONCE = {"cpu": 4 * BLOCK}  # words that are multiplied at once: what its caches hold
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32)}


@torch.no_grad()
def digest(weight: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """The weight's dtype and a digest of its bits and shape, as ``bfloat16:0123…``.

    Args:
        dtype: round the weight to it first.
    """
    dtype = dtype or weight.dtype
    factors, sums = _factors(weight.device), []
    at_once = AT_ONCE.get(weight.device.type, 256 * BLOCK)
    for part in weight.detach().flatten().split(at_once * 4 // dtype.itemsize):
        data = part.to(dtype).view(torch.uint8)
        missing = -len(data) % (4 * BLOCK)
        if missing or data.storage_offset() % 4:  # torch reads words at multiples of their size
            data = torch.nn.functional.pad(data, (0, missing))
        sums.append((data.view(torch.int32).view(-1, 1, BLOCK) * factors).sum(-1))
    found = hashlib.sha256(f"{tuple(weight.shape)}".encode())
    found.update(torch.cat(sums).cpu().numpy())
    return f"{str(dtype).removeprefix('torch.')}:{found.hexdigest()[:32]}"


def matches(weight: torch.Tensor, wanted) -> bool:
    """Whether the weight, rounded to the dtype that a digest names, has that digest."""
    dtype = DTYPES.get(str(wanted).partition(":")[0])
    return dtype is not None and digest(weight, dtype) == wanted


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """Two odd 64-bit numbers for each word of a block, the same everywhere, 2×BLOCK."""
    data = bytearray(hashlib.shake_256(b"HORSE").digest(2 * BLOCK * 8))
    return (torch.frombuffer(data, dtype=torch.int64).view(2, BLOCK) | 1).to(device)
