"""Eq. 7: the losses of the edited model, and their gradient in the hypernetwork's parameters."""

import torch
import torch.nn.functional as F

from horse_plugin import distributed as parallel
from horse_plugin.data.prompts import Prompt, batches
from horse_plugin.errors import HALF_HINT, HorseError, UsageError
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Trace

KINDS = ("edit", "rephrase", "unrelated")


class Objective:
    """The first term of Eq. 7 on one step's prompts, and its gradient at the edited weights.

    Args:
        backbone: the model, unedited while this object is made.
        prompts: for each of ``KINDS``, its prompts; a kind may be empty.
        hparams: ``edit_coef``, ``gen_coef``, ``loc_coef``, ``loc_loss``, ``batch_tokens``.
    """

    def __init__(self, backbone: Backbone, prompts: dict[str, list[Prompt]], hparams):
        self.backbone = backbone
        self.coefs = dict(
            zip(KINDS, (hparams.edit_coef, hparams.gen_coef, hparams.loc_coef), strict=True)
        )
        used = {k: prompts[k] if self.coefs[k] else [] for k in KINDS}
        if not (used["edit"] or used["rephrase"]):
            raise UsageError(
                "nothing would teach the edit: edit_coef is 0 (as in MALMEN), and so is gen_coef, "
                "or these records have no rephrased prompts."
            )
        self.n_tokens = {k: sum(len(p.answer) for p in used[k]) for k in KINDS}
        own = [(k, i) for k in KINDS for i in parallel.own(used[k])]
        self.kind_of = torch.tensor([KINDS.index(k) for k, _ in own], dtype=torch.long)
        self.record_of = [i for _, i in own]
        mine = [used[k][i] for k, i in own]
        self.batches = list(batches(mine, hparams.batch_tokens, backbone.device))
        self.reference = self._reference() if hparams.loc_loss == "kl" else None

    def _kinds(self, batch) -> torch.Tensor:
        """The kind of prompt that each answer token of the batch belongs to."""
        return self.kind_of[list(batch.index)].to(batch.rows.device)[batch.rows]

    @torch.no_grad()
    def _reference(self) -> list[torch.Tensor]:
        """Log-probabilities of the unedited model at the unrelated prompts, batch by batch."""
        unrelated = KINDS.index("unrelated")
        return [
            self.backbone.logits(b)
            .to(self.backbone.edit_dtype)
            .log_softmax(-1)[self._kinds(b) == unrelated]
            for b in self.batches
        ]

    def gradients(self) -> tuple[dict[str, float | None], list[torch.Tensor]]:
        """Mean loss per answer token of each kind, None without prompts, and g_l = ∂L/∂W_l, d×d'.

        L is the sum of the three means, weighted by the coefficients.
        """
        totals = torch.zeros(len(KINDS), dtype=self.backbone.edit_dtype)
        found = []  # looked at after the loop, so that the device never waits for us
        scale = [self.coefs[k] / max(1, self.n_tokens[k]) for k in KINDS]
        scale = torch.tensor(scale, dtype=totals.dtype)
        weight_gradients = self.backbone.weight_gradients()
        with parallel.together(), weight_gradients as (grads, collect), torch.enable_grad():
            for i, batch in enumerate(self.batches):
                losses, kinds = self._token_losses(i, batch), self._kinds(batch)
                (losses * scale.to(losses.device)[kinds]).sum().backward()
                collect()
                found.append((losses.detach(), kinds))
            for (losses, kinds), batch in zip(found, self.batches, strict=True):
                self._check(losses, batch)
                totals.index_add_(0, kinds.cpu(), losses.cpu())
        totals = parallel.total(totals)
        grads = {name: parallel.total(grad) for name, grad in grads.items()}
        for name, grad in grads.items():
            if not grad.isfinite().all():
                raise HorseError(f"{name}: the gradient of the loss is not finite. {HALF_HINT}")
        means = {
            k: totals[i].item() / self.n_tokens[k] if self.n_tokens[k] else None
            for i, k in enumerate(KINDS)
        }
        return means, list(grads.values())

    def _check(self, losses: torch.Tensor, batch):
        """Name the first prompt of the batch whose loss is not finite."""
        bad = ~losses.isfinite().cpu()
        if bad.any():
            place = batch.index[batch.rows.cpu()[bad][0]]
            record, kind = self.record_of[place], KINDS[self.kind_of[place]]
            raise HorseError(
                f"record {record}: the loss on its {kind} prompt is not finite. {HALF_HINT}"
            )

    def _token_losses(self, i: int, batch) -> torch.Tensor:
        logits, dtype = self.backbone.logits(batch), self.backbone.edit_dtype
        losses = CrossEntropy.apply(logits, batch.labels.to(logits.device), dtype)
        if self.reference is None:
            return losses
        unrelated = (self._kinds(batch) == KINDS.index("unrelated")).to(logits.device)
        log_p = logits[unrelated].to(dtype).log_softmax(-1)
        kl = F.kl_div(log_p, self.reference[i], log_target=True, reduction="none").sum(-1)
        return losses.masked_scatter(unrelated, kl)


class CrossEntropy(torch.autograd.Function):
    """−log p of each label, from logits of any precision and computed in ``dtype``.

    torch's own keeps several n×vocabulary tensors for the backward pass, which is most of the
    memory of a training step; this one turns the only one it keeps into the gradient.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype):
        log_p = logits.log_softmax(-1, dtype=dtype)
        ctx.save_for_backward(log_p, labels)
        ctx.dtype = logits.dtype
        return -log_p.gather(1, labels[:, None])[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        gradient, labels = ctx.saved_tensors
        gradient.exp_()
        gradient.scatter_add_(1, labels[:, None], -torch.ones_like(grad)[:, None])
        return gradient.mul_(grad[:, None]).to(ctx.dtype), None, None


def backward(network: HyperNetwork, traced: Trace, shifts_to_gradients) -> dict[str, float]:
    """Leave in the network's parameters the gradient of the loss through the whole edit.

    The edit is differentiated by hand where it is linear: with g = ∂L/∂W at the edited weights,
    ∂L/∂R = H(HᵀH + e^λI)⁻¹g and ∂L/∂λ = −e^λ⟨(HᵀH + e^λI)⁻¹g, ΔW⟩ (Eq. 7); autograd takes them
    from R to η, the spread and the network.

    Args:
        shifts_to_gradients: maps ΔW_1 … ΔW_T to (losses, g_1 … g_T) of the model edited so.
    """
    ridges = [
        Ridge(h, lamda.exp()) for h, lamda in zip(traced.keys, network.lamda.detach(), strict=True)
    ]
    with torch.no_grad():
        residuals = network.residuals(traced.keys, traced.grads)
        shifts = [ridge.shift(r) for ridge, r in zip(ridges, residuals, strict=True)]
    del residuals
    losses, weight_grads = shifts_to_gradients(shifts)
    # Made only now, so that their graph does not take memory while the model's own does.
    residuals = network.residuals(traced.keys, traced.grads, in_loss=True)
    surrogate = sum(
        (ridge.residual_grad(g) * r).sum() + ridge.lamda_grad(g, shift) * lamda / parallel.size()
        for ridge, g, r, shift, lamda in zip(
            ridges, weight_grads, residuals, shifts, network.lamda, strict=True
        )
    )
    surrogate.backward()
    for p in network.parameters():
        if p.grad is not None:
            p.grad = parallel.total(p.grad)
    return losses
