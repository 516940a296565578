"""What the model writes: continuations side by side, fluency, examples."""

import math
from dataclasses import replace

import pytest
import torch

from horse_plugin import Evaluator, HorseEditor
from horse_plugin.evaluation.generation import continuations, fluency
from horse_plugin.model.backbone import Backbone
from tests import tiny


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_continuations_side_by_side_are_those_of_each_prompt_alone(architecture):
    backbone = Backbone(tiny.model(architecture), tiny.bpe_tokenizer())
    texts = [tiny.words(i, 2 + i % 3) for i in range(9)] * 2
    prompts = [tuple(backbone.tokenizer(t)["input_ids"]) for t in texts]
    found = continuations(backbone, prompts, 6)
    for ids, tokens in zip(prompts, found, strict=True):
        for token in tokens:
            with torch.no_grad():
                logits = backbone.model(torch.tensor([ids])).logits[0, -1]
            assert token == logits.argmax() or token == backbone.tokenizer.eos_token_id
            if token == backbone.tokenizer.eos_token_id:
                break
            ids = [*ids, token]


def test_fluency_is_the_entropy_of_n_grams():
    """Four different bigrams, three trigrams: (2/3 · log₂ 4 + 4/3 · log₂ 3) / 2."""
    assert fluency("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert fluency("a a a a a") == 0 == fluency("")


def test_written_is_what_greedy_decoding_writes():
    """Half of the records ask for what the model says anyway."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    records = tiny.records()
    ids = [tuple(backbone.tokenizer(r.prompt)["input_ids"]) for r in records]
    said = backbone.tokenizer.batch_decode(continuations(backbone, ids, 2))
    records = [
        replace(r, target_new=text) if i % 2 and text.strip() else r
        for i, (r, text) in enumerate(zip(records, said, strict=True))
    ]
    before = Evaluator(backbone, records, writing=True).before
    prompts = backbone.prepare(records, ["edit"]).flat()
    said = continuations(backbone, [p.ids[: p.start] for p in prompts], 6)
    wrote = [s[: len(p.answer)] == p.answer for s, p in zip(said, prompts, strict=True)]
    assert [r["written"] for r in before.records] == [float(w) for w in wrote]
    assert before.mean("written") <= before.mean("efficacy")


def test_examples_show_every_kind_before_and_after():
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    evaluator = Evaluator(backbone, tiny.records(), writing=True)
    HorseEditor.from_backbone(backbone, tiny.hparams(strength=20.0)).edit(tiny.records())
    after = evaluator.evaluate()
    assert after.fluency is not None and evaluator.before.fluency is not None
    assert len(after.examples) == 10
    assert any(e.before != e.after for e in after.examples)
    assert after.examples[-1].kind == "opening" and not after.examples[-1].answer
