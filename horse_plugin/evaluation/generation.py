"""What the model itself writes."""

from collections.abc import Sequence

import torch

from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import quiet_transformers


@torch.no_grad()
def continuations(backbone: Backbone, prompts: Sequence[str], n_tokens: int = 8) -> list[str]:
    """Return what the model writes after each prompt, greedily, without line breaks.

    Args:
        prompts: texts.
        n_tokens: the most tokens to write.
    """
    texts, tokenizer = [], backbone.tokenizer
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(backbone.device)
        with quiet_transformers():
            ids = backbone.model.generate(
                **inputs,
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(" ".join(tokenizer.decode(new, skip_special_tokens=True).split()))
    return texts
