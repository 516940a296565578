"""Ordinary text that a model writes itself, so that it needs no corpus in any language."""

import torch
from tqdm import tqdm

from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded
from horse_plugin.model.loading import own_random_numbers, quiet_transformers

LENGTH = 64  # tokens of a text
ROWS = 64  # texts written side by side
TOP_K = 200  # tokens to choose from; the tail of a small model's vocabulary is noise


@guarded
@torch.no_grad()
def written_texts(
    backbone: Backbone, n_tokens: int, seed: int, progress: bool | None = None
) -> list[tuple[int, ...]]:
    """Return texts of 64 tokens that the model writes, as token ids, the same for the same seed.

    Every text starts with a token drawn from the whole vocabulary, which leads to prose, code and
    other languages in the shares that the model knows them. If the tokenizer has a chat template,
    every other text starts where a user's turn does, so that the model writes the question and the
    answer to it.

    Args:
        n_tokens: the number of tokens wanted in all; the last batch of texts may exceed it.
        progress: whether to show a bar; None is the backbone's own setting.
    """
    tokenizer, generator = backbone.tokenizer, torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    n_known = min(len(tokenizer), len(backbone.model.get_input_embeddings().weight))
    plain = torch.tensor([i for i in range(n_known) if i not in special])
    bos, turn = tokenizer.bos_token_id, _users_turn(tokenizer)
    n_rows = min(ROWS, -(-n_tokens // LENGTH))
    show = backbone.progress if progress is None else progress
    hidden = None if show else True  # None: where nobody watches
    texts, bar = [], tqdm(total=n_tokens, desc="writing text", unit="token", disable=hidden)
    with bar, quiet_transformers(), own_random_numbers():
        while len(texts) * LENGTH < n_tokens:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            if turn and len(texts) // n_rows % 2:
                start = torch.tensor([turn] * n_rows)
            else:
                start = plain[torch.randint(len(plain), (n_rows, 1), generator=generator)]
                if bos is not None and bos_first(tokenizer):
                    start = torch.cat([torch.full_like(start, bos), start], 1)
            start = start.to(backbone.device)
            written = backbone.model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                top_k=TOP_K,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                pad_token_id=0,
                synced_gpus=backbone.lockstep.is_sharded,
            )
            texts += [tuple(row) for row in written.tolist()]
            bar.update(n_rows * LENGTH)
    return texts


def bos_first(tokenizer) -> bool:
    """Return whether the tokenizer puts its BOS token before a text."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _users_turn(tokenizer) -> list[int]:
    """Return the tokens of a chat up to where the user speaks; none without a template for one."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    mark = "¤"
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    except Exception:  # whatever a template raises at what it does not like
        return []
    if mark not in chat:
        return []
    return tokenizer(chat.partition(mark)[0], add_special_tokens=False)["input_ids"]
