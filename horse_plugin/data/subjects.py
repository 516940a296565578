"""Keys where the subject ends, as MEMIT reads them, and contrasts for facts that share one."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from horse_plugin.data.prompts import PreparedEdits, Prompt, ask, tokenize
from horse_plugin.data.records import EditRecord, Query
from horse_plugin.data.seam import PLAIN, Seam
from horse_plugin.errors import UsageError

# Who stands in a contrast for the subject of an edit.
OTHERS = ("France", "Japan", "the United States", "London", "Microsoft", "Albert Einstein")


def at_subjects(
    tokenizer,
    edits: PreparedEdits,
    max_length: int | None = None,
    warn: bool = True,
    seam: Seam = PLAIN,
) -> PreparedEdits:
    """Return the records with the keys of their edit prompts at the last token of the subject.

    A subject has one key there, whatever is asked about it. So facts that share their subject have
    their keys at the answer tokens, where each of them has its own. Those are nearly the keys of
    the same question about somebody else; contrasts ask it, and an edit must do nothing there.

    A record whose prompt holds no subject has its keys at the answer tokens, too. A warning counts
    such records.

    Args:
        edits: all records of one edit.
        max_length: the most tokens of a contrast.
        warn: whether to warn of prompts without a subject.
        seam: how the model is asked.
    """
    if "edit" not in edits.prompts:
        return edits
    found = [_find_words(r.subject or "", r.prompt.rstrip()) for r in edits.records]
    names = [match.group().casefold() if match else None for match in found]
    count = Counter(names)
    others = [other for other in OTHERS if other.casefold() not in count]
    prompts, contrasts = [], []
    for i, (record, match) in enumerate(zip(edits.records, found, strict=True)):
        group, still = tuple(replace(p, subject=None) for p in edits.of("edit", i)), []
        if match and count[names[i]] == 1:
            before = seam.upto(tokenizer, record.prompt, match.end())
            end = len(ask(tokenizer, before))
            group = tuple(_read_at(p, end - 1) for p in group)
        elif match and group:
            before, after = record.prompt[: match.start()], record.prompt[match.end() :]
            texts = [before + other + after for other in others]
            still = _still(tokenizer, texts, record, max_length, seam)
        prompts.append(group)
        contrasts.append(tuple(still))
    if warn:
        _warn_of([i for i, name in enumerate(names) if name is None], len(edits))
    return replace(edits, prompts=edits.prompts | {"edit": prompts}, contrasts=contrasts)


def _read_at(prompt: Prompt, index: int) -> Prompt:
    """Return the prompt with its subject at a token, unless it lost that one with its beginning."""
    index -= prompt.n_cut
    if index < bool(prompt.n_cut):  # a prompt that was shortened may begin with the BOS that it had
        return prompt
    return replace(prompt, subject=min(index, prompt.start - 1))


def _still(
    tokenizer, texts: Sequence[str], record: EditRecord, max_length: int | None, seam: Seam
) -> list[Prompt]:
    """Return these texts as prompts where an edit must do nothing."""
    try:
        queries = [Query(t, record.target_new) for t in texts]
        made = tokenize(tokenizer, queries, max_length, seam)
    except UsageError:  # too long with one of these subjects
        return []
    return [Prompt(p.ids[: p.start + 1], p.start, still=True) for p in made]


def _find_words(words: str, text: str) -> re.Match | None:
    """Find words in a text: as whole words if possible, then inside others, then in any case."""
    words = re.escape(words.strip())
    whole = rf"(?<!\w){words}(?!\w)"
    tries = (whole, 0), (words, 0), (whole, re.IGNORECASE)
    found = (re.search(pattern, text, flags) for pattern, flags in tries if words)
    return next((match for match in found if match), None)


def _warn_of(without: Sequence[int], n: int):
    if without:
        warnings.warn(
            f"token: subject: {len(without)} of {n} prompts hold no subject (record "
            f"{', '.join(map(str, without[:5]))}{', …' if len(without) > 5 else ''}), and have "
            "their keys at the answer tokens. Name a subject: such edits generalise better.",
            stacklevel=4,
        )
