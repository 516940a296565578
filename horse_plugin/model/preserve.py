"""What an edit must leave alone, and the metric C̄ of the ridge term that says so.

C is the second moment of an edit module's keys over ordinary text at all positions, mixed with that
over unrelated prompts of training records at their answer positions. An archive stores the token
ids; the moments are computed from them once for each model, and kept in files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from horse_plugin import distributed
from horse_plugin.data.corpus import texts_of
from horse_plugin.data.prompts import Prompt, text_prompts
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.hparams import HORSEHyperParams
from horse_plugin.method.metric import inverse_root, metric_of
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.moments import (
    Moments,
    load_moments,
    moments_file,
    save_moments,
    second_moments,
)
from horse_plugin.model.sampling import written_texts
from horse_plugin.model.sharding import local_part
from horse_plugin.storage.digest import json_digest, sum_of_bits

PIECE = 128  # tokens of ordinary text in one prompt
FORM = {"mix": float, "rho": float, "n_text": int, "digest": str}  # see horse_plugin.storage.schema


@dataclass(frozen=True)
class Preserve:
    """Ordinary text and unrelated prompts that the ridge term protects.

    Attributes:
        text: pieces of ordinary text, of which all positions count.
        unrelated: unrelated prompts of training records, of which the answer positions count.
        mix: the share of the unrelated prompts in C, from 0 to 1.
        rho: ρ of :func:`horse_plugin.method.metric.metric_of`.
    """

    text: tuple[Prompt, ...]
    unrelated: tuple[Prompt, ...] = ()
    mix: float = 0.5
    rho: float = 0.01

    @classmethod
    def of(
        cls, backbone: Backbone, hparams: HORSEHyperParams, unrelated: Sequence[Prompt] = ()
    ) -> "Preserve | None":
        """Return what the hparams ask to preserve, or None for ``preserve: none``.

        Args:
            hparams: ``preserve`` names the ordinary text and ``preserve_tokens`` limits it.
            unrelated: the unrelated prompts of training records; so many are taken as have
                ``preserve_tokens`` tokens.

        Raises:
            UsageError: the text cannot be read.
        """
        if hparams.preserve == "none":
            return None
        n = hparams.preserve_tokens
        text = ordinary_text(backbone, hparams.preserve, n, hparams.seed)
        if not text:
            raise UsageError(f"preserve: {hparams.preserve}: no text in it has two tokens.")
        order = torch.Generator().manual_seed(hparams.seed)
        if hparams.token == "subject":  # of other facts the subject counts, too
            unrelated = [Prompt(p.ids, 1) for p in unrelated]
        unrelated = list(dict.fromkeys(unrelated))
        shuffled = [unrelated[i] for i in torch.randperm(len(unrelated), generator=order)]
        mix, rho = hparams.preserve_mix, hparams.preserve_rho
        return cls(up_to(n, text), up_to(n, shuffled) if mix else (), mix, rho)

    @property
    def digest(self) -> str:
        """What tells these prompts, this mix and this ρ from others."""
        prompts = [[p.ids, p.start] for p in self.text + self.unrelated]
        return json_digest([prompts, len(self.text), self.mix, self.rho])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the prompts as tensors for a file; :meth:`about` describes them."""
        prompts = self.text + self.unrelated
        return {
            "preserve.ids": torch.tensor([i for p in prompts for i in p.ids], dtype=torch.int32),
            "preserve.lengths": torch.tensor([len(p.ids) for p in prompts], dtype=torch.int32),
            "preserve.starts": torch.tensor([p.start for p in prompts], dtype=torch.int32),
        }

    def about(self) -> dict:
        """Return what :meth:`from_tensors` needs beside the tensors."""
        n_text = len(self.text)
        return {"mix": self.mix, "rho": self.rho, "n_text": n_text, "digest": self.digest}

    @classmethod
    def from_tensors(cls, path, tensors: dict[str, torch.Tensor], about: dict) -> "Preserve":
        """Return what :meth:`tensors` and :meth:`about` describe.

        Raises:
            HorseError: they do not fit each other; the message names the file.
        """
        try:
            lengths = tensors["preserve.lengths"].tolist()
            ids = [tuple(t.tolist()) for t in tensors["preserve.ids"].split(lengths)]
            starts = tensors["preserve.starts"].tolist()
            prompts = tuple(Prompt(i, s) for i, s in zip(ids, starts, strict=True))
            n, mix, rho = about["n_text"], about["mix"], about["rho"]
            made = cls(prompts[:n], prompts[n:], mix, rho)
            if made.digest != about["digest"]:
                raise ValueError("digest")
        except (KeyError, RuntimeError, ValueError):
            raise HorseError(f"{path}: damaged: the preserved text is not what it says.") from None
        return made

    def unread(self, backbone: Backbone, folder) -> int:
        """Return the number of tokens whose moments :meth:`roots` would not find in the folder."""
        parts = (self.text, self.unrelated)
        return sum(
            sum(len(p.ids) for p in prompts)
            for prompts, files in zip(parts, _files(backbone, parts, folder), strict=True)
            if not all(file.is_file() for file in files.values())
        )

    def roots(self, backbone: Backbone, folder) -> list[torch.Tensor]:
        """Return W with W Wᵀ = C̄⁻¹ for each edit module, d×d, on the edit device.

        The backbone must hold the unedited model, unless the moments are in the folder already.

        Args:
            folder: of the moments; they are computed if they are not there, and written.
        """
        of_text, of_unrelated = _files(backbone, (self.text, self.unrelated), folder)
        text = moments_of(backbone, self.text, of_text)
        unrelated = moments_of(backbone, self.unrelated, of_unrelated) if self.unrelated else None
        roots = []
        for name, (total, count) in text.items():
            # One at a time: each takes several float64 d×d matrices.
            moment = (total / count).to(backbone.edit_device)
            if unrelated:
                total, count = unrelated[name]
                moment = (1 - self.mix) * moment + self.mix * (total / count).to(moment)
            try:
                root = inverse_root(metric_of(moment, self.rho))
            except HorseError as error:
                raise HorseError(f"{name}: {error}") from None
            roots.append(root.to(backbone.edit_dtype))
        return roots


def ordinary_text(backbone: Backbone, source: str, n_tokens: int, seed: int) -> list[Prompt]:
    """Return ordinary text in pieces of at most 128 tokens.

    Args:
        source: ``model`` for text that the model writes itself, ``shipped`` for the package's, or
            anything that :func:`horse_plugin.data.corpus.read_corpus` takes.
        n_tokens: of text that the model writes.
    """
    if source == "model":
        # Written by one process and given to all: devices may differ in what they sample.
        # All take part where they share the trunk.
        writes = distributed.is_main_process()
        has_part = writes or backbone.lockstep.is_sharded
        texts = written_texts(backbone, n_tokens, seed) if has_part else []
        texts = texts if writes else []
        lengths = torch.tensor([len(t) for t in texts], dtype=torch.long)
        ids = torch.tensor([i for t in texts for i in t], dtype=torch.long)
        lengths, ids = distributed.gather_rows(lengths), distributed.gather_rows(ids)
        size = min(PIECE, backbone.max_length or PIECE)
        return [p for t in ids.split(lengths.tolist()) for p in text_prompts(t.tolist(), size)]
    return [p for text in texts_of(source, n_tokens) for p in backbone.read_text(text, PIECE)]


def up_to(n_tokens: int, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return the first prompts, at least one, that have at most that many tokens together."""
    taken, total = [], 0
    for prompt in prompts:
        if taken and total + len(prompt.ids) > n_tokens:
            break
        taken.append(prompt)
        total += len(prompt.ids)
    return tuple(taken)


def moments_of(backbone: Backbone, prompts: Sequence[Prompt], files: dict[str, Path]) -> Moments:
    """Return the moments over these prompts, from a file a module or computed and written."""
    missing = torch.tensor(float(not all(file.is_file() for file in files.values())))
    if not distributed.sum_over_ranks(missing):  # the same for all processes, who sum together
        return {name: load_moments(file) for name, file in files.items()}
    moments = second_moments(backbone, prompts)
    with distributed.raise_on_all_ranks():
        if distributed.is_main_process():
            for name, (total, count) in moments.items():
                save_moments(files[name], total, count, len(prompts))
    return moments


def _files(backbone: Backbone, parts: Sequence[Sequence[Prompt]], folder) -> list[dict[str, Path]]:
    """Return, for each part of the prompts, module → the file of its moment over that part.

    A file's name holds a digest of the model with all of its weights, and of the prompts.
    """
    model, found = [backbone.fingerprint(), _bits(backbone)], []
    for prompts in parts:
        data = f"horse-{json_digest([*model, [[p.ids, p.start] for p in prompts]])}"
        n = len(prompts)
        found.append({m: moments_file(folder, backbone, m, data, n) for m in backbone.modules})
    return found


def _bits(backbone: Backbone) -> list[int]:
    """Return sums of the bits of all weights, an adapter's among them."""
    weights = (local_part(w) for w in (*backbone.model.parameters(), *backbone.model.buffers()))
    sums = torch.tensor([sum_of_bits(w) for w in weights if not w.is_meta])
    if backbone.lockstep.is_sharded:
        sums = distributed.sum_over_ranks(sums)
    return sums.tolist()
