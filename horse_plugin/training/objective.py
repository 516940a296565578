"""Eq. 7: the losses of the edited model, and their gradient in the hypernetwork's parameters.

One step reads from top to bottom in :meth:`Objective.backward`: residuals, Eq. 2, the edited
model's losses and their gradient g at the edited weights, and the surrogate
Σ_l ⟨H_l (HᵀH + e^λ C̄)⁻¹ g_l, R'_l⟩ whose gradient is that of the losses.
"""

import math
from collections.abc import Sequence

import torch

from horse_plugin import distributed
from horse_plugin.data.batches import Batch, batches
from horse_plugin.data.prompts import PreparedEdits, Prompt
from horse_plugin.editing.solve import moving_rows, residuals_of
from horse_plugin.errors import HALF_PRECISION_HINT, HorseError, UsageError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.finite import all_finite
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.method.losses import LOSSES
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import Capture
from horse_plugin.model.guard import guarded

TRAINED_ON = ("edit", "rephrase", "unrelated")  # a record's prompts with a loss of their own
ORDINARY = "ordinary"  # the kind of the pieces of ordinary text
LOSS_ON = (*TRAINED_ON, ORDINARY)


class Objective:
    """Eq. 7 on the prompts of one training step, with a term for ordinary text.

    Args:
        backbone: the model, unedited.
        edits: the step's records, with prompts of the kinds in ``TRAINED_ON``; a record may lack
            rephrased or unrelated ones.
        hparams: ``edit_coef``, ``gen_coef``, ``loc_coef`` and ``keep_coef`` are the weights of the
            losses on the kinds in ``LOSS_ON``; ``loc_loss`` is the loss on unrelated prompts, and
            KL(unedited ‖ edited) that on ordinary text.
        ordinary: pieces of ordinary text, of which all positions count.
        roots: W with W Wᵀ = C̄⁻¹ for each edit module, or None for C̄ = I.

    Raises:
        UsageError: no prompt would teach the edit.
    """

    def __init__(
        self,
        backbone: Backbone,
        edits: PreparedEdits,
        hparams: HORSEHyperParams,
        ordinary: Sequence[Prompt] = (),
        roots: Sequence[torch.Tensor | None] | None = None,
    ):
        self.backbone, self.hparams = backbone, hparams
        self.roots = roots or [None] * len(backbone.modules)
        weights = hparams.edit_coef, hparams.gen_coef, hparams.loc_coef, hparams.keep_coef
        self.coefs = dict(zip(LOSS_ON, weights, strict=True))
        prompts = {k: edits.flat(k) for k in TRAINED_ON} | {ORDINARY: list(ordinary)}
        prompts = {k: prompts[k] if self.coefs[k] else [] for k in LOSS_ON}
        record_of = {k: [i for i, g in enumerate(edits.prompts[k]) for _ in g] for k in TRAINED_ON}
        record_of[ORDINARY] = range(len(ordinary))
        if not (prompts["edit"] or prompts["rephrase"]):
            raise UsageError(
                "nothing would teach the edit: edit_coef is 0 (as in MALMEN), and so is gen_coef, "
                "or these records have no rephrased prompts."
            )
        self.n_tokens = {k: sum(len(p.answer) for p in prompts[k]) for k in LOSS_ON}
        local = [(k, i) for k in LOSS_ON for i in distributed.local_indices(prompts[k])]
        self.kind_of = [LOSS_ON.index(k) for k, _ in local]
        self.record_of = [record_of[k][i] for k, i in local]  # or which piece of ordinary text
        local_prompts = [prompts[k][i] for k, i in local]
        self.batches = list(batches(local_prompts, backbone.batch_tokens, backbone.device))
        names = ("ce", "ce", hparams.loc_loss, "kl")  # of the losses on the kinds in LOSS_ON
        self.kinds_with = {
            name: [i for i, other in enumerate(names) if other == name] for name in names
        }
        # Known to the host, which would have to wait for the device if it asked there.
        self.kinds = [
            torch.tensor(b.per_label([self.kind_of[i] for i in b.index])) for b in self.batches
        ]
        self.rows = [self._rows_with(kinds) for kinds in self.kinds]
        with backbone.lockstep.loop():
            self.references = [
                self._reference(*pair) for pair in zip(self.batches, self.rows, strict=True)
            ]

    @guarded
    def backward(
        self,
        network: HyperNetwork,
        captures: Sequence[Capture],
        residuals: Sequence[torch.Tensor],
    ) -> dict[str, float | None]:
        """Leave the gradient of the losses, through the whole edit, in the network's parameters.

        The edit is differentiated by hand where it is linear: with g = ∂L/∂W at the edited
        weights, ∂L/∂R = H(HᵀH + e^λC̄)⁻¹g and ∂L/∂λ = −e^λ⟨C̄(HᵀH + e^λC̄)⁻¹g, ΔW⟩ (Eq. 7). Autograd
        carries them from R to η, the spread and the network.

        Of several sweeps each adds its residuals to R. The keys and gradients of a later one depend
        on the residuals of those before it; that dependence is not differentiated.

        Args:
            captures: keys and gradients of the step's edit prompts, first on the unedited model,
                then in each further sweep.
            residuals: Σ R'_1 … Σ R'_T over the captures, as the edit has them (Eq. 4 and 6).

        Returns:
            The mean loss per answer token of each kind in nats, None for a kind without prompts.
        """
        keys, lamdas = captures[-1].keys, network.lamda.detach()
        terms = zip(keys, lamdas, self.roots, strict=True)
        ridges = [Ridge(h, lamda.exp(), root) for h, lamda, root in terms]
        with torch.no_grad():
            shifts = [ridge.shift(r) for ridge, r in zip(ridges, residuals, strict=True)]  # Eq. 2
        with self.backbone.weights.shifted(dict(zip(self.backbone.modules, shifts, strict=True))):
            losses, weight_grads = self.weight_gradients()
        # From the losses to the residuals, and on through the network chunk by chunk: its graph of
        # all rows of all modules would be larger than everything else.
        rows = self.hparams.editor_batch_size
        parts = [(*moving_rows(c), rows, True) for c in captures]
        with torch.no_grad():
            raw = [[r.requires_grad_() for r in network.raw_residuals(*part)] for part in parts]
        pairs = zip(captures, raw, strict=True)
        swept = [residuals_of(network, c, self.hparams, r) for c, r in pairs]
        residuals = [sum(of_module) for of_module in zip(*swept, strict=True)]
        lamdas = network.lamda / distributed.world_size()  # of which each rank adds its part
        terms = zip(ridges, weight_grads, residuals, shifts, lamdas, strict=True)
        surrogate = 0
        for ridge, g, r, shift, lamda in terms:
            residual_grad, lamda_grad = ridge.gradients(g, shift)
            surrogate = surrogate + ((residual_grad * r).sum() + lamda_grad * lamda)
        surrogate.backward()
        for part, of_modules in zip(parts[::-1], raw[::-1], strict=True):
            network.backward([r.grad for r in of_modules], *part)
        for p in network.parameters():
            if p.grad is not None:
                p.grad = distributed.sum_over_ranks(p.grad)
        return losses

    @guarded
    def weight_gradients(self) -> tuple[dict[str, float | None], list[torch.Tensor]]:
        """Return the losses of the model as it is now, and g_1 … g_T = ∂L/∂W_l, d×d' each.

        L is the sum of the mean losses, weighted by the coefficients.

        Raises:
            HorseError: a loss or a gradient is not finite; the message names the record or the
                module.
        """
        totals = torch.zeros(len(LOSS_ON), dtype=self.backbone.edit_dtype)
        found = []  # read after the loop, so that the device never waits for the host
        scale = [self.coefs[k] / n if (n := self.n_tokens[k]) else 0.0 for k in LOSS_ON]
        # A power of two, taken out for the passes, changes no bit; small ones are 0 in fp16.
        unit = 2.0 ** math.floor(math.log2(max(scale)))
        scale = torch.tensor(scale, dtype=totals.dtype) / unit
        gradients = self.backbone.weights.gradients(self.backbone.edit_device)
        with self.backbone.lockstep.loop(), gradients as (grads, collect), torch.enable_grad():
            for i, batch in enumerate(self.batches):
                losses = self._token_losses(i, batch)
                scales = scale[self.kinds[i]].to(losses.device, non_blocking=True)
                (losses * scales).sum().backward()
                collect()
                found.append(losses.detach())
            if found:
                losses = torch.cat(found).cpu()
                self._check(losses)
                totals.index_add_(0, torch.cat(self.kinds), losses)
        totals = distributed.sum_over_ranks(totals)
        grads = {name: distributed.sum_over_ranks(grad) * unit for name, grad in grads.items()}
        for name, grad in grads.items():
            if not all_finite(grad):
                raise HorseError(
                    f"{name}: the gradient of the loss is not finite. {HALF_PRECISION_HINT}"
                )
        means = {
            k: totals[i].item() / self.n_tokens[k] if self.n_tokens[k] else None
            for i, k in enumerate(LOSS_ON)
        }
        return means, list(grads.values())

    def _rows_with(self, kinds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return loss → the indices of those of a batch's n answer tokens that have it.

        Args:
            kinds: n, the kind of prompt of each token.
        """
        rows = {
            name: torch.isin(kinds, torch.tensor(with_it)).nonzero()[:, 0]
            for name, with_it in self.kinds_with.items()
        }
        to = {"device": self.backbone.device, "non_blocking": True}
        return {name: found.to(**to) for name, found in rows.items() if len(found)}

    @torch.no_grad()
    def _reference(self, batch: Batch, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return loss → the unedited model's log-probabilities where it compares with them."""
        rows = {name: found for name, found in rows.items() if LOSSES[name].needs_reference}
        if not rows:
            return {}
        logits, dtype = self.backbone.logits(batch), self.backbone.edit_dtype
        return {
            name: _take(logits, found).to(dtype).log_softmax(-1) for name, found in rows.items()
        }

    def _token_losses(self, i: int, batch: Batch) -> torch.Tensor:
        """Return the loss of each of the n answer tokens of the i-th batch."""
        logits, dtype = self.backbone.logits(batch), self.backbone.edit_dtype
        labels = batch.labels.to(logits.device)
        losses = torch.zeros(len(labels), dtype=dtype, device=logits.device)
        for name, rows in self.rows[i].items():
            reference = self.references[i].get(name)
            found = LOSSES[name].compute(_take(logits, rows), _take(labels, rows), reference, dtype)
            losses = losses.index_copy(0, rows.to(logits.device), found)
        return losses

    def _check(self, losses: torch.Tensor):
        """Name the first prompt of the batches whose loss is not finite."""
        bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            index = [i for b in self.batches for i in b.per_label(b.index)][bad[0]]
            i, kind = self.record_of[index], LOSS_ON[self.kind_of[index]]
            where = f"record {i}: the loss on its {kind} prompt"
            if kind == ORDINARY:
                where = f"piece {i} of ordinary text: the loss on it"
            raise HorseError(f"{where} is not finite. {HALF_PRECISION_HINT}")


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return these rows of x; all of them without a copy."""
    return x if len(rows) == len(x) else x[rows.to(x.device)]
