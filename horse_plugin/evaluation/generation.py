"""What the model itself writes: greedy continuations before and after an edit, and fluency."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from horse_plugin.data.corpus import shipped_pieces
from horse_plugin.data.prompts import ask
from horse_plugin.data.records import EditRecord
from horse_plugin.errors import UsageError
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded

ROWS = 32  # continuations written side by side
SHOWN = 12  # tokens of a continuation that is shown
LENGTH = 50  # tokens of a continuation whose fluency is measured
# How many prompts of each kind; an ordinary opening is the beginning of a held-out text.
N_OF_KIND = {"edit": 4, "rephrase": 2, "unrelated": 2, "opening": 2}
OPENING = 8  # words of it


@guarded
@torch.no_grad()
def continuations(
    backbone: Backbone, prompts: Sequence[tuple[int, ...]], n_tokens: int = SHOWN, streamer=None
) -> list[tuple[int, ...]]:
    """Return the tokens that the model writes after each prompt, greedily, at most so many.

    Many run side by side, so that a pass of the model writes a token of each. Shorter ones are
    padded on the left, and only those of one length run together where a model feels that. The
    continuation is the one that the model writes to a prompt alone, but for rounding, which may
    decide between two tokens that are as likely. A prompt that leaves no room for so many tokens
    loses what follows its first one.

    Args:
        prompts: their token ids.
        streamer: of transformers, which gets the tokens as they are written; for a single prompt.
    """
    prompts = [_with_room(p, n_tokens, backbone.max_length) for p in prompts]
    left, parts = sorted(dict.fromkeys(prompts), key=len, reverse=True), []
    is_mixed = len(set(map(len, left))) > 1 and backbone.pads_left
    while left:
        room = backbone.batch_tokens // (len(left[0]) + n_tokens)
        part = left[: max(1, min(ROWS, room))]
        parts.append([p for p in part if is_mixed or len(p) == len(part[0])])
        left = left[len(parts[-1]) :]
    written = {}
    for rows in backbone.step("writing", [(rows, n_tokens) for rows in parts]):
        made = backbone.generate(rows, n_tokens, streamer=streamer)
        for row, new in zip(rows, made[:, len(rows[0]) :], strict=True):
            written[row] = tuple(new.tolist())
    return [written[prompt] for prompt in prompts]


def _with_room(prompt: tuple[int, ...], n_tokens: int, limit: int | None) -> tuple[int, ...]:
    """Return the prompt, so short that n more tokens fit; its first token may be BOS, and stays."""
    room = max(2, limit - n_tokens) if limit else len(prompt)
    return prompt if len(prompt) <= room else (*prompt[:1], *prompt[1 - room :])


@guarded
def answers(
    backbone: Backbone, prompts: Sequence[str], n_tokens: int = LENGTH, streamer=None
) -> list[str]:
    """Return what the model writes after each prompt, greedily, as it is asked elsewhere.

    Args:
        prompts: texts; with ``chat_template`` each is a user's turn.
        n_tokens: the most tokens of each answer.
        streamer: as in :func:`continuations`.

    Raises:
        UsageError: a prompt is empty, or leaves no room for an answer.
    """
    rows = [tuple(backbone.ask(prompt)) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise UsageError("ask: the prompt is empty.")
        if backbone.max_length and len(row) + n_tokens > backbone.max_length:
            raise UsageError(
                f"ask: {prompt[:40]!r}: {len(row)} tokens and an answer of {n_tokens} are more "
                f"than the model reads, {backbone.max_length}."
            )
    written = continuations(backbone, rows, n_tokens, streamer)
    return [t.strip() for t in backbone.tokenizer.batch_decode(written, skip_special_tokens=True)]


def fluency(text: str) -> float:
    """Return the mean of 2/3 of the entropy of a text's bigrams and 4/3 of that of its trigrams.

    It is in bits, and EasyEdit's ``ngram_entropy`` on words and punctuation marks (Meng et al.
    2022). Repetition lowers it; it grows with the length of the text.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    entropies = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        total = sum(counts.values())
        entropies.append(-weight * sum(c / total * math.log2(c / total) for c in counts.values()))
    return sum(entropies) / len(entropies)


@dataclass(frozen=True)
class Example:
    """One prompt, what the model wrote after it before and after the edit, and the answer wanted.

    Attributes:
        kind: ``edit``, ``rephrase``, ``unrelated`` or ``opening``, which has no answer.
    """

    kind: str
    prompt: str
    before: str
    after: str
    answer: str = ""


class Writing:
    """Greedy continuations of a few prompts of each kind, before and after an edit.

    Make it before the edit.

    Args:
        backbone: the unedited model.
        records: the records to edit; prompts are taken evenly over them.

    Attributes:
        before: the fluency of the unedited model, the mean over the prompts.
    """

    def __init__(self, backbone: Backbone, records: Sequence[EditRecord]):
        self.backbone = backbone
        openings = [" ".join(t.split()[:OPENING]) for _, t in shipped_pieces("heldout")]
        asked = {
            "edit": [(r.prompt, r.target_new) for r in records],
            "rephrase": [(p, r.target_new) for r in records for p in r.rephrases[:1]],
            "unrelated": [(q.prompt, q.answer) for r in records for q in r.unrelated[:1]],
            "opening": [(opening, "") for opening in openings],
        }
        self._asked = [
            (kind, *pair)
            for kind, n in N_OF_KIND.items()
            for pair in asked[kind][:: max(1, len(asked[kind]) // n)][:n]
        ]
        self._ids = [
            tuple(backbone.ask(p) if kind != "opening" else ask(backbone.tokenizer, p))
            for kind, p, _ in self._asked
        ]
        self._before = continuations(backbone, self._ids, LENGTH)
        self.before = self.fluency(self._before)

    def fluency(self, written: Sequence[tuple[int, ...]]) -> float:
        """Return the mean fluency of continuations, given as tokens."""
        texts = self.backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
        return sum(map(fluency, texts)) / len(texts)

    def measure(self, backbone: Backbone | None = None) -> tuple[float, list[Example]]:
        """Return the fluency of the model as it is now, or of an edited copy, and the examples."""
        after = continuations(backbone or self.backbone, self._ids, LENGTH)
        lines = zip(self._asked, self._before, after, strict=True)
        examples = [
            Example(kind, prompt, self._shown(b), self._shown(a), answer)
            for (kind, prompt, answer), b, a in lines
        ]
        return self.fluency(after), examples

    def _shown(self, tokens: tuple[int, ...]) -> str:
        text = self.backbone.tokenizer.decode(tokens[:SHOWN], skip_special_tokens=True)
        return " ".join(text.split())
