"""What an edit does to ordinary text: perplexity."""

import torch
import torch.nn.functional as F

from horse_plugin.data.prompts import Prompt
from horse_plugin.errors import UsageError
from horse_plugin.model.backbone import Backbone

PIECE = 256  # tokens


@torch.no_grad()
def perplexity(backbone: Backbone, text: str) -> float:
    """Return exp of the mean cross-entropy per token of a text, read in pieces of 256 tokens.

    Raises:
        UsageError: the text has less than two tokens.
    """
    ids = backbone.tokenizer(text)["input_ids"]
    size = min(PIECE, backbone.max_length or PIECE)
    pieces = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    prompts = [Prompt(piece, 1) for piece in pieces if len(piece) > 1]
    if not prompts:
        raise UsageError("held-out text: less than two tokens; give a longer one.")
    losses = [
        F.cross_entropy(
            backbone.logits(b).to(backbone.edit_dtype).cpu(), b.labels.cpu(), reduction="none"
        )
        for b in backbone.batches(prompts, "perplexity")
    ]
    return torch.cat(losses).mean().exp().item()
