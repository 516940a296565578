"""What tells one model from another: names, sizes, and norms of a few embedding rows."""

from pathlib import Path

from horse_plugin.storage.schema import count, finite

FINGERPRINT = {  # its form in a description, see horse_plugin.storage.schema
    "name": str,
    "architecture": str,
    "n_blocks": count,
    "hidden_size": count,
    "vocab_size": count,
    "embedding_norms": [finite],
}


def fingerprint(model, n_blocks: int) -> dict:
    """Return the fingerprint of a model with that many transformer blocks.

    Edits leave it alone, and so does loading the same weights in another dtype.
    """
    rows = model.get_input_embeddings().weight
    step = max(1, len(rows) // 16)
    return {
        "name": Path(str(model.config.name_or_path)).name,
        "architecture": type(model).__name__,
        "n_blocks": n_blocks,
        "hidden_size": rows.shape[1],
        "vocab_size": len(rows),
        "embedding_norms": rows[::step][:16].detach().float().norm(dim=-1).tolist(),
    }


def is_same_model(a: dict, b: dict) -> bool:
    """Return whether architecture and sizes agree, and embeddings up to the rounding of a dtype."""
    names = ("architecture", "n_blocks", "hidden_size", "vocab_size")
    rows = a["embedding_norms"], b["embedding_norms"]
    if any(a[n] != b[n] for n in names) or len(rows[0]) != len(rows[1]):
        return False
    return all(abs(x - y) <= 2e-3 * max(abs(x), abs(y)) for x, y in zip(*rows, strict=True))


def describe(fingerprint: dict) -> str:
    """Return a fingerprint in words, for messages."""
    return "{name} ({architecture}, {n_blocks} blocks, width {hidden_size})".format(**fingerprint)
