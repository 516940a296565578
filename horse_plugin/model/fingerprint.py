"""What tells one model from another: names, sizes, and norms of a few embedding rows."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from horse_plugin.storage.schema import Maybe, count, finite

FINGERPRINT = {  # its form in a description, see horse_plugin.storage.schema
    "name": str,
    "architecture": str,
    "n_blocks": count,
    "hidden_size": count,
    "vocab_size": count,
    "embedding_norms": [finite],
    "quantised": Maybe(str),
}


def fingerprint(model, blocks: Sequence[nn.Module]) -> dict:
    """Return the fingerprint of a model with these transformer blocks.

    Edits leave it alone, and so does loading the same weights in another dtype. It says which
    blocks hold codes in the place of numbers, if any do.
    """
    rows = model.get_input_embeddings().weight
    step = max(1, len(rows) // 16)
    made = {
        "name": Path(str(model.config.name_or_path)).name,
        "architecture": type(model).__name__,
        "n_blocks": len(blocks),
        "hidden_size": rows.shape[1],
        "vocab_size": len(rows),
        "embedding_norms": rows[::step][:16].detach().float().norm(dim=-1).tolist(),
    }
    codes = [[p for p in b.parameters() if not p.is_floating_point()] for b in blocks]
    if n := sum(map(bool, codes)):
        kinds = {type(p).__name__ for of_block in codes for p in of_block}
        made["quantised"] = f"{n} blocks in {', '.join(sorted(kinds))}"
    return made


def is_same_model(a: dict, b: dict) -> bool:
    """Return whether architecture and sizes agree, and embeddings up to the rounding of a dtype."""
    names = ("architecture", "n_blocks", "hidden_size", "vocab_size")
    rows = a["embedding_norms"], b["embedding_norms"]
    if any(a[n] != b[n] for n in names) or len(rows[0]) != len(rows[1]):
        return False
    return all(abs(x - y) <= 2e-3 * max(abs(x), abs(y)) for x, y in zip(*rows, strict=True))


def describe(fingerprint: dict) -> str:
    """Return a fingerprint in words, for messages."""
    words = "{name} ({architecture}, {n_blocks} blocks, width {hidden_size}".format(**fingerprint)
    quantised = fingerprint.get("quantised")
    return words + (f", {quantised})" if quantised else ")")
