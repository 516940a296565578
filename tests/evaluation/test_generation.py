"""What the model writes: continuations side by side, fluency, examples."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

from horse_plugin import Evaluator, HorseEditor
from horse_plugin.evaluation.generation import continuations, fluency
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import hooked
from tests import tiny
from tests.fast import fast
from tests.model.test_families import small


def one_that_feels_padding():
    """A decoder that gives the first token of a row the first position, padded or not."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(small("bart")).eval()


@pytest.mark.parametrize("batch_tokens", [4096, 50])
@pytest.mark.parametrize(
    "architecture", fast([*tiny.CONFIGS, None], ["llama", "gpt2", "gemma3", None])
)
def test_continuations_side_by_side_are_those_of_each_prompt_alone(architecture, batch_tokens):
    model = tiny.model(architecture) if architecture else one_that_feels_padding()
    backbone = Backbone(model, tiny.bpe_tokenizer(), batch_tokens=batch_tokens)
    assert backbone.pads_left == bool(architecture)
    texts = [tiny.words(i, 2 + i % 3) for i in range(9)] * 2
    prompts = [tuple(backbone.tokenizer(t)["input_ids"]) for t in texts]
    passes = []
    with hooked(model.register_forward_pre_hook, lambda *_: passes.append(1)):
        found = continuations(backbone, prompts, 6)
    if architecture and batch_tokens == 4096:
        assert len(passes) <= 6  # of all prompts together
    for ids, tokens in zip(prompts, found, strict=True):
        for token in tokens:
            with torch.no_grad():
                logits = backbone.model(torch.tensor([ids])).logits[0, -1]
            assert token == logits.argmax() or token == backbone.tokenizer.eos_token_id
            if token == backbone.tokenizer.eos_token_id:
                break
            ids = [*ids, token]


def test_a_prompt_that_fills_the_model_is_gone_on_from_its_end():
    backbone = Backbone(tiny.model("gpt2"), tiny.bpe_tokenizer())
    limit = backbone.max_length
    ids = tuple(backbone.tokenizer(tiny.words(0, limit))["input_ids"])[: limit - 3]
    (short,) = continuations(backbone, [(ids[0], *ids[9 - limit :])], 8)
    assert continuations(backbone, [ids], 8) == [short]
    assert continuations(backbone, [ids], 3) != [short]


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
