"""What an edit does to ordinary text: drift and perplexity.

Drift is KL(unedited ‖ edited) in nats a token, the mean over all positions of the text. It is 0 for
an edit that text does not feel, and the logarithm of the perplexity's rise is near it for an edit
that makes the model worse. Of the unedited model only what goes into its head is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from horse_plugin.data.corpus import shipped_pieces
from horse_plugin.distributed import local_indices, sum_over_ranks
from horse_plugin.errors import UsageError
from horse_plugin.method.losses import some_rows
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded
from horse_plugin.storage.schema import read_text

PIECE = 256  # tokens of text in one pass
Pieces = Sequence[tuple[str, str]]  # (kind, text)


@dataclass(frozen=True)
class Cost:
    """What a model is like on ordinary text.

    Attributes:
        drift: KL(unedited ‖ this model), in nats a token.
        perplexity: exp of the mean cross-entropy per token.
        kinds: kind of text → its own ``drift`` and ``perplexity``.
    """

    drift: float
    perplexity: float
    kinds: dict[str, dict[str, float]]

    def summary(self) -> dict[str, float]:
        """Return the two figures over all kinds of text."""
        return {"drift": self.drift, "perplexity": self.perplexity}


class OrdinaryText:
    """Ordinary text, read by a model before it is edited and after.

    Make it before the edit: what the model says then is what ``drift`` compares with.

    Args:
        backbone: the unedited model.
        pieces: (kind, text) of each piece; long ones are read 256 tokens at a time.

    Attributes:
        before: the cost of the unedited model; its drift is 0.

    Raises:
        UsageError: the pieces have less than two tokens.
    """

    def __init__(self, backbone: Backbone, pieces: Pieces):
        self.backbone = backbone
        self.kinds = list(dict.fromkeys(kind for kind, _ in pieces))
        prompts, kind_of = [], []
        for kind, text in pieces:
            found = backbone.read_text(text, PIECE)
            prompts += found
            kind_of += [self.kinds.index(kind)] * len(found)
        if not prompts:
            raise UsageError("held-out text: less than two tokens; give a longer one.")
        local = local_indices(prompts)
        self._kind_of, prompts = [kind_of[i] for i in local], [prompts[i] for i in local]
        backbone.cache_trunk_states(prompts)
        self._batches = list(backbone.batches(prompts, "ordinary text", progress=False))
        with backbone.lockstep.loop():
            self._head_inputs = [backbone.head_inputs(batch) for batch in self._batches]
        self.before = self._cost_of(None)

    def measure(self, backbone: Backbone | None = None) -> Cost:
        """Return the cost of the model as it is now, or of an edited copy of it."""
        return self._cost_of(backbone or self.backbone)

    @guarded
    @torch.no_grad()
    def _cost_of(self, edited: Backbone | None) -> Cost:
        """Return the cost of an edited model, or of the unedited one."""
        dtype = self.backbone.edit_dtype
        totals = torch.zeros(len(self.kinds), 3, dtype=torch.float64)  # drift, nats, tokens
        kinds, found = [], []
        with self.backbone.lockstep.loop():
            pairs = zip(self._batches, self._head_inputs, strict=True)
            items = [(pair, pair[0].ids.numel()) for pair in pairs]
            for batch, inputs in self.backbone.step("ordinary text", items):
                before = self.backbone.read_out(batch, inputs)
                now = [edited.logits(batch).to(before.device)] if edited else []
                rows = some_rows(before, batch.labels.to(before.device), *now)
                found += [_drift_and_nats(dtype, *of_rows) for of_rows in rows]
                kinds += batch.per_label([self._kind_of[i] for i in batch.index])
            if found:
                totals.index_add_(0, torch.tensor(kinds), torch.cat(found).cpu().double())
        totals = sum_over_ranks(totals)
        kinds = {k: _cost(row) for k, row in zip(self.kinds, totals, strict=True)}
        return Cost(*_cost(totals.sum(0)).values(), kinds)


def _drift_and_nats(dtype: torch.dtype, before, labels, now=None) -> torch.Tensor:
    """Return KL(before ‖ now), −log p of the label, and 1 for each of n positions, n×3.

    Args:
        dtype: the precision to compute in.
        before, now: n×vocabulary logits; without those of an edited model the KL is 0.
    """
    log_p = before.log_softmax(-1, dtype=dtype)
    drift = log_p.new_zeros(len(log_p))
    if now is not None:
        reference, log_p = log_p, now.log_softmax(-1, dtype=dtype)
        drift = F.kl_div(log_p, reference, log_target=True, reduction="none").sum(-1)
    nats = -log_p.gather(1, labels[:, None])[:, 0]
    return torch.stack([drift, nats, torch.ones_like(nats)], -1)


def _cost(totals: torch.Tensor) -> dict[str, float]:
    drift, nats, count = totals
    # A mean of many roundings may come out below 0, where the smallest true value is 0.
    return {
        "drift": (drift / count).clamp(min=0).item(),  # which leaves what is no number
        "perplexity": (nats / count).exp().item(),
    }


def heldout_pieces(path=None) -> Pieces:
    """Return the shipped text for figures, of several kinds, or the text of a file.

    Raises:
        UsageError: the file cannot be read.
    """
    if path is None:
        return shipped_pieces("heldout")
    try:
        return [("text", read_text(path))]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as UTF-8 text ({error}).") from None
