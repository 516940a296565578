"""Where the answer lies, whatever the tokenizer."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from horse_plugin.data.batches import PASS_ON_CPU, PASS_ON_GPU, batches
from horse_plugin.data.prompts import KINDS, Prompt, prepare, tokenize
from horse_plugin.data.records import EditRecord, Query
from horse_plugin.errors import UsageError
from horse_plugin.evaluation.metrics import predict
from horse_plugin.model.backbone import Backbone
from tests import tiny

TOKENIZERS = {
    "bpe": tiny.bpe_tokenizer,
    "bpe with bos": lambda: tiny.bpe_tokenizer(bos=True),
    "sentencepiece": tiny.sentencepiece_tokenizer,
    "sentencepiece without bos": lambda: tiny.sentencepiece_tokenizer(bos=False),
}
QUERY = Query("the capital of Norway is", "Lima France")


class Slow:
    """A tokenizer without offsets, such as remote ones are."""

    def __init__(self, fast):
        self.fast, self.is_fast = fast, False
        self.bos_token_id, self.eos_token_id = fast.bos_token_id, fast.eos_token_id
        self.eos_token = fast.eos_token

    def __call__(self, text):
        return self.fast(text)


def end_texts_with_eos(tokenizer):
    """Have a tokenizer put its EOS token after every text."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_an_accepted_answer_that_is_too_long_is_left_out_with_a_count():
    said = Query("the capital of Norway is", "Lima", ("Oslo", "Lima " * 40))
    record = EditRecord("the city is", "Rome", portability=(said,))
    with pytest.warns(match="1 accepted answer left out: too long"):
        edits = prepare(tiny.bpe_tokenizer(), [record], max_length=20)
    assert not edits.errors
    (prompt,) = edits.of("portability", 0)
    assert [len(p.accepted) for p in (prompt, *prompt.accepted)] == [1, 0]


@pytest.mark.parametrize("slow", [False, True])
def test_the_answer_is_the_answer(tokenizer, slow):
    (p,) = tokenize(Slow(tokenizer) if slow else tokenizer, [QUERY])
    assert tokenizer.decode(p.answer).strip() == "Lima France"
    assert tokenizer.decode(p.ids[: p.start], skip_special_tokens=True).strip() == QUERY.prompt
    assert tuple(tokenizer("the capital of Norway is Lima France")["input_ids"]) == p.ids


@pytest.mark.filterwarnings("ignore:.*accepted answers? left out")
@pytest.mark.parametrize("slow", [False, True])
def test_many_texts_read_at_once_have_the_tokens_of_each_alone(tokenizer, slow):
    tokenizer = Slow(tokenizer) if slow else tokenizer
    answers = ["Lima", " Oslo", "(", "\n- piano", "'s", "Kyoto  Rome", "東京", "Lima " * 9, " "]
    queries = [
        Query(f"{tiny.words(i, 1 + i % 5)}{' (' * (i % 7 == 0)}", a, (answers[i % 3], ""))
        for i in range(16)
        for a in answers
    ]
    records = [EditRecord(q.prompt, q.answer, (f"{q.prompt} (",), (q,)) for q in queries]
    prepared = prepare(tokenizer, records)
    for i, record in enumerate(records):
        if i in prepared.errors:
            with pytest.raises(UsageError, match=re.escape(str(prepared.errors[i]))):
                tokenize(tokenizer, [record.edit, *record.equivalent])
        for kind, groups in prepared.prompts.items():
            alone = [] if i in prepared.errors else tokenize(tokenizer, KINDS[kind](record))
            assert groups[i] == tuple(alone)
    assert 16 <= len(prepared.errors) < len(records)


def test_bos_comes_once(tokenizer):
    bos = tokenizer.bos_token_id
    expected = list(tokenizer("Oslo")["input_ids"]).count(bos)
    for prompt in (QUERY.prompt, f"<s>{QUERY.prompt}" if expected else QUERY.prompt):
        (p,) = tokenize(tokenizer, [Query(prompt, "Lima")])
        assert list(p.ids).count(bos) == expected


def test_an_eos_that_the_tokenizer_appends_is_left_out():
    tok = tiny.bpe_tokenizer()
    plain = tokenize(tok, [QUERY])
    end_texts_with_eos(tok)
    assert tok("Oslo")["input_ids"][-1] == tok.eos_token_id
    for t in (tok, Slow(tok)):
        assert tokenize(t, [QUERY]) == plain


def test_spaces_at_the_seam_do_not_matter(tokenizer):
    variants = [("{} ", "{}"), ("{}", " {}"), ("{}  ", "  {} "), ("{}", "{}")]
    made = {
        tokenize(tokenizer, [Query(a.format(QUERY.prompt), b.format(QUERY.answer))])[0]
        for a, b in variants
    }
    assert len(made) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_batching_do_not_change_predictions(side, tokenizer):
    """One by one and batched, with the tokenizer set to either side, the predictions agree with
    the plain forward pass."""
    tokenizer.padding_side, tokenizer.pad_token = side, "</s>"
    model = tiny.model("llama")
    queries = [
        Query(" ".join(tiny.WORDS[: n + 1]), " ".join(tiny.WORDS[n : n + 2])) for n in range(9)
    ]
    want = []
    for p in tokenize(tokenizer, queries):
        with torch.no_grad():
            logits = model(torch.tensor([p.ids])).logits[0]
        want.append(logits[p.start - 1 : -1].argmax(-1).tolist())
    for budget in (1, 30, 1000):
        backbone = Backbone(model, tokenizer, batch_tokens=budget)
        predicted = predict(backbone, tokenize(tokenizer, queries))
        assert [tokens.tolist() for tokens in predicted.values()] == want


@given(
    lengths=st.lists(st.tuples(st.integers(2, 30), st.integers(1, 9)), min_size=1, max_size=30),
    budget=st.integers(1, 200),
)
@settings(deadline=None)
def test_batches_hold_every_prompt_once_within_the_budget_and_little_padding(lengths, budget):
    made = [Prompt(tuple(range(n)), max(1, n - k)) for n, k in lengths]
    seen = []
    for batch in batches(made, budget):
        assert batch.ids.numel() <= budget or len(batch.prompts) == 1
        assert padding(batch) <= PASS_ON_CPU
        seen += batch.index
        at = batch.ids[batch.rows, batch.cols]
        assert torch.equal(at + 1, batch.labels)  # ids count up, so the label is the next one
    assert sorted(seen) == list(range(len(made)))


def padding(batch) -> int:
    return batch.ids.numel() - sum(len(p.inputs) for p in batch.prompts)


@pytest.mark.parametrize(("n_short", "n_batches"), [(16, 1), (17, 2)])
def test_prompts_of_a_length_join_a_longer_one_while_padding_costs_less_than_a_pass(
    n_short, n_batches
):
    made = [Prompt(tuple(range(11)), 9)] + [Prompt(tuple(range(7)), 5)] * n_short
    found = list(batches(made, 4096))
    assert len(found) == n_batches
    assert PASS_ON_CPU == 64 and sum(map(padding, found)) in (0, 64)


def test_on_a_gpu_few_prompts_of_any_lengths_are_one_batch():
    made = [Prompt(tuple(range(n)), n - 1) for n in range(2, 22)]
    (few,) = batches(made, 4096, "meta")
    assert len(few.index) == len(made) and len(list(batches(made, 4096))) > 1
    assert all(padding(batch) <= PASS_ON_GPU for batch in batches(made * 100, 4096, "meta"))
    assert all(batch.ids.numel() <= 100 for batch in batches(made, 100, "meta"))


def test_a_long_prompt_loses_its_beginning_but_not_bos_or_answer():
    tok = tiny.bpe_tokenizer(bos=True)
    (whole,) = tokenize(tok, [QUERY])
    (cut,) = tokenize(tok, [QUERY], max_length=len(whole.ids) - 2)
    assert len(cut.ids) == len(whole.ids) - 2
    assert cut.ids[0] == tok.bos_token_id and cut.answer == whole.answer
    assert cut.ids[1:] == whole.ids[3:]
    with pytest.raises(UsageError, match="max_length=2"):
        tokenize(tok, [QUERY], max_length=2)


def test_what_the_tokenizer_cannot_say_is_named():
    tok = tiny.bpe_tokenizer()
    with pytest.raises(UsageError, match="answer"):
        tokenize(tok, [Query("the capital", " ")])
    with pytest.raises(UsageError, match="prompt"):
        tokenize(tok, [Query("", "Oslo")])
