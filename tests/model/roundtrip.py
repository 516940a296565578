"""What holds of every model that is edited, whatever its architecture."""

import torch

from horse_plugin import HorseEditor
from horse_plugin.model.backbone import Backbone
from tests import tiny


def edited_and_undone(model) -> Backbone:
    """Check that the halves' logits are the model's own, and that its edit modules alone move."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    editor = HorseEditor(model, tiny.bpe_tokenizer(), tiny.hparams(strength=0.5))
    backbone = editor.backbone
    for batch in backbone.batches(backbone.prepare(tiny.records(), ["edit"]).flat(), "", False):
        with torch.no_grad():
            ours = backbone.logits(batch).split([len(p.answer) for p in batch.prompts])
            for p, logits in zip(batch.prompts, ours, strict=True):
                whole = model(torch.tensor([p.inputs]), use_cache=False).logits[0, p.start - 1 :]
                torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    editor.edit(tiny.records())
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [f"{n}.weight" for n in backbone.modules]
    editor.undo()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return backbone
