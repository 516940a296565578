"""Digests: of text, JSON values, files and named tensors, and of a weight's bits where it lies.

No weight leaves its device for its digest. The bits are words of 32; in blocks, they are multiplied
by 64-bit factors and summed modulo 2⁶⁴ (multilinear hashing), twice; the sums of all blocks then go
through SHA-256. One changed word always changes the digest. Any other accidental change, which
knows nothing of the factors, goes unnoticed with a probability of 2⁻⁶⁶. Integers have no rounding,
so that a GPU and a CPU agree. The factors are public, so that two weights of one digest can be made
on purpose: the digest is no signature.
"""

import functools
import hashlib
import json
from pathlib import Path

import torch

from horse_plugin.errors import UsageError, first_line

BLOCK = 2**14  # words with one sum, and a factor each
AT_ONCE = {"cpu": 4 * BLOCK}  # words that are multiplied at once: what its caches hold
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32)}


def text_digest(text: str | bytes, length: int = 12) -> str:
    """Return the first hex digits of the text's SHA-256."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:length]


def json_digest(value, length: int = 12) -> str:
    """Return the digest of a plain JSON value, whatever the order of its keys."""
    return text_digest(json.dumps(value, sort_keys=True), length)


def source_digest(source) -> str:
    """Return the digest of a file's content, or a source as it is if it names no file.

    Raises:
        UsageError: the file cannot be read.
    """
    if not Path(source).is_file():
        return str(source)
    found = hashlib.sha256()
    try:
        with Path(source).open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read ({first_line(error)}).") from None
    return found.hexdigest()


def tensors_digest(tensors: dict[str, torch.Tensor], about: dict) -> str:
    """Return the SHA-256 of named tensors and of their JSON description."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].cpu()
        found.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def weight_digest(weight: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Return the weight's dtype and a digest of its bits and shape, as ``bfloat16:0123…``.

    Args:
        dtype: the dtype to round the weight to first; None is its own.
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


def sum_of_bits(weight: torch.Tensor) -> int:
    """Return a sum that tells every changed entry of a weight, and rows that changed places.

    It costs a fraction of :func:`weight_digest`, and notices less.
    """
    rows = weight.detach().contiguous()
    if not rows.numel():
        return 0
    rows = rows.view(len(rows) if rows.dim() else 1, -1)
    size = rows.element_size()
    # Torch reads words at multiples of their size, and sums wide ones many times as fast.
    is_even = (rows.shape[1] * size) % 8 == 0 == (rows.storage_offset() * size) % 8
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    rows = rows.view(torch.int64 if is_even else words[size]).sum(-1, dtype=torch.int64)
    factors = torch.arange(1, 2 * len(rows), 2, device=rows.device)
    return (rows * factors).sum().item()


def matches(weight: torch.Tensor, wanted) -> bool:
    """Return whether the weight, rounded to the dtype that a digest names, has that digest."""
    dtype = DTYPES.get(str(wanted).partition(":")[0])
    return dtype is not None and weight_digest(weight, dtype) == wanted


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """Return two odd 64-bit numbers for each word of a block, 2×BLOCK, the same everywhere."""
    data = bytearray(hashlib.shake_256(b"HORSE").digest(2 * BLOCK * 8))
    return (torch.frombuffer(data, dtype=torch.int64).view(2, BLOCK) | 1).to(device)
