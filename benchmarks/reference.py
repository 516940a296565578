"""HORSE on one page, written straight from the paper; our engine is measured against it.

Read it from top to bottom: an edit, a training step (Eq. 7), then keys and gradients (Sec. 2.1),
residuals (Eq. 4) and their spread (Eq. 6), the closed form (Eq. 2). Every pass is the model's whole
forward with logits at every position, over batches of 32 in the order of the facts; the keys and
gradients of each batch go through a file; ΔW is a d×d LU solve, added and subtracted in place.
Tokens and the hypernetwork are ours, so that both do the same work. Edit modules must be
``nn.Linear``. The metric of Eq. 2 is the paper's, C̄ = I, as with ``preserve: none``.
"""

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from horse_plugin import EditRecord
from horse_plugin.data.prompts import tokenize
from horse_plugin.method.hypernetwork import HyperNetwork
from horse_plugin.model.backbone import Backbone

BATCH = 32
IGNORED = -100  # the label that cross-entropy leaves out


class Reference:
    """Edits, trains and evaluates a model the plain way.

    Args:
        backbone: where model, tokenizer and edit modules come from; its split forward is not used.
        network: the hypernetwork; needs η, and rows in its normaliser unless it is trained.
    """

    def __init__(self, backbone: Backbone, network: HyperNetwork, hparams):
        self.backbone, self.network, self.hparams = backbone, network, hparams
        self.model, self.modules = backbone.model, list(backbone.modules.values())
        self.optimizer = torch.optim.Adam(network.parameters(), lr=hparams.meta_lr)

    def edit(self, records: list[EditRecord]) -> list[torch.Tensor]:
        """Add ΔW_1 … ΔW_T of the records to the model; returns them, d×d' each."""
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            n_batches = self._capture([r.edit for r in records], Path(folder))
            shifts = self._shifts(Path(folder), n_batches)
        self._add(shifts)
        return shifts

    def undo(self, shifts: list[torch.Tensor]):
        """Subtract them again; half-precision weights drift by it."""
        self._add(shifts, sign=-1)

    def train_step(self, records: list[EditRecord]):
        """One step of Eq. 7 on the edit prompts, a rephrasing and an unrelated prompt of each."""
        queries = [
            [r.edit for r in records],
            [r.equivalent[0] for r in records if r.equivalent],
            [r.unrelated[0] for r in records if r.unrelated],
        ]
        with tempfile.TemporaryDirectory() as folder:
            n_batches = self._capture(queries[0], Path(folder))
            captured = [self._load(Path(folder), l, n_batches) for l in range(len(self.modules))]
            self.network.update_normalizers(*zip(*captured, strict=True))
            with torch.no_grad():
                shifts = self._shifts(Path(folder), n_batches)
            self._add(shifts)
            weight_grads = self._gradients(queries)
            self._add(shifts, sign=-1)
            residuals = self._residuals(captured)
            loss = 0
            for l, ((keys, _), r, g) in enumerate(
                zip(captured, residuals, weight_grads, strict=True)
            ):
                solved = torch.linalg.solve(self._regularised(keys, l), g)  # (HᵀH + e^λI)⁻¹g, d×d'
                loss = loss + (keys @ solved * r).sum()  # the trace in Eq. 7
                lamda = self.network.lamda[l]
                loss = loss - lamda * lamda.detach().exp() * (solved * shifts[l]).sum()
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.hparams.max_grad_norm)
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, queries) -> list[torch.Tensor]:
        """The tokens predicted at each query's answer, teacher-forced."""
        found = []
        for ids, mask, labels in self._batches(queries):
            predicted = self.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            found += [p[row != IGNORED] for p, row in zip(predicted, labels, strict=True)]
        return found

    def _batches(self, queries):
        """(ids, attention mask, labels at the answer positions), B×L each, 32 queries at a time."""
        prompts = tokenize(self.backbone.tokenizer, queries, self.backbone.max_length)
        for i in range(0, len(prompts), BATCH):
            some = prompts[i : i + BATCH]
            labels = [[IGNORED] * (p.start - 1) + list(p.answer) for p in some]
            rows = [torch.tensor(p.inputs) for p in some], [torch.tensor(x) for x in labels]
            ids = pad_sequence(rows[0], batch_first=True)
            mask = pad_sequence([torch.ones_like(r) for r in rows[0]], batch_first=True)
            labels = pad_sequence(rows[1], batch_first=True, padding_value=IGNORED)
            yield tuple(t.to(self.backbone.device) for t in (ids, mask, labels))

    def _capture(self, queries, folder: Path) -> int:
        """Write H and ∇G of every module, a file a batch; returns how many batches (Sec. 2.1)."""
        seen = {}

        def forward_hook(module, args, output):
            seen[module] = [args[0].detach()]
            output.register_hook(seen[module].append)

        hooks = [m.register_forward_hook(forward_hook) for m in self.modules]
        try:
            for i, (ids, mask, labels) in enumerate(self._batches(queries)):
                self._loss(ids, mask, labels, "sum").backward()
                at = labels != IGNORED
                for l, module in enumerate(self.modules):
                    keys, grads = (t[at].to(self.backbone.edit_dtype) for t in seen[module])
                    save_file({"keys": keys, "grads": grads}, folder / f"{l}_{i}.safetensors")
                    module.weight.grad = None
        finally:
            for hook in hooks:
                hook.remove()
            self.model.requires_grad_(False)
        return i + 1

    def _loss(self, ids, mask, labels, reduction: str) -> torch.Tensor:
        """Cross-entropy of the answers; the weights of the edit modules have gradients."""
        with torch.enable_grad():
            for module in self.modules:
                module.weight.requires_grad_()
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            return F.cross_entropy(
                logits.to(self.backbone.edit_dtype).flatten(0, 1),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction=reduction,
            )

    def _load(self, folder: Path, l: int, n_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """H_l and ∇G_l, n×d and n×d'."""
        device = str(self.backbone.edit_device)
        parts = [load_file(folder / f"{l}_{i}.safetensors", device) for i in range(n_batches)]
        return tuple(torch.cat([p[name] for p in parts]) for name in ("keys", "grads"))

    def _residuals(self, captured) -> list[torch.Tensor]:
        """R'_1 … R'_T, n×d' each: Eq. 4, then Eq. 6."""
        raw = []
        for l, (keys, grads) in enumerate(captured):
            pseudo_keys, pseudo_grads = self.network(l, keys, grads)
            eta = self.network.log_eta[l].exp()
            raw.append(-eta * (keys * pseudo_keys).sum(-1, keepdim=True) * pseudo_grads)
        spread = raw[:1]
        for below, r in pairwise(raw):
            spread.append(r - (r * below).sum() / (below * below).sum() * below)
        return spread

    def _regularised(self, keys: torch.Tensor, l: int) -> torch.Tensor:
        """HᵀH + e^λI, d×d."""
        return keys.T @ keys + self.network.lamda[l].detach().exp() * torch.eye(
            keys.shape[1], dtype=keys.dtype, device=keys.device
        )

    def _shifts(self, folder: Path, n_batches: int) -> list[torch.Tensor]:
        """ΔW_l = (HᵀH + e^λI)⁻¹HᵀR'_l (Eq. 2)."""
        captured = [self._load(folder, l, n_batches) for l in range(len(self.modules))]
        return [
            torch.linalg.solve(self._regularised(keys, l), keys.T @ r)
            for l, ((keys, _), r) in enumerate(
                zip(captured, self._residuals(captured), strict=True)
            )
        ]

    @torch.no_grad()
    def _add(self, shifts, sign: int = 1):
        for module, shift in zip(self.modules, shifts, strict=True):
            module.weight += sign * shift.T.to(module.weight.dtype)

    def _gradients(self, groups) -> list[torch.Tensor]:
        """g_l, d×d': of the sum over the groups of their mean loss per answer token."""
        total = [0] * len(self.modules)
        for queries in groups:
            batches = list(self._batches(queries))
            n_tokens = sum(int((labels != IGNORED).sum()) for _, _, labels in batches)
            for batch in batches:
                (self._loss(*batch, "sum") / n_tokens).backward()
                for l, module in enumerate(self.modules):
                    total[l] = total[l] + module.weight.grad.T.to(self.backbone.edit_dtype)
                    module.weight.grad = None
        self.model.requires_grad_(False)
        return total
