"""CounterFact's success and magnitude, against probabilities that are computed one by one."""

from dataclasses import replace

import pytest
import torch

from horse_plugin import EditRecord, HorseEditor, UsageError
from horse_plugin.evaluation.probability import success_and_magnitude, table
from tests import tiny


@torch.no_grad()
def probability(backbone, prompt, answer):
    """exp of the mean log-probability of the answer's tokens, by the model's own forward pass."""
    start = len(backbone.tokenizer(prompt)["input_ids"])
    ids = backbone.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    logs = backbone.model(ids).logits[0].log_softmax(-1)
    return (
        sum(logs[i - 1, ids[0, i]] for i in range(start, ids.shape[1]))
        .div(ids.shape[1] - start)
        .exp()
        .item()
    )


def test_they_are_means_over_records_of_the_new_answer_against_the_true_one():
    backbone = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()).backbone
    records = [replace(r, ground_truth=tiny.words(i + 3)) for i, r in enumerate(tiny.records(4))]
    records[1] = replace(records[1], rephrases=(tiny.words(3, 4), tiny.words(9, 2)))
    found = success_and_magnitude(backbone, records)

    def differences(texts, right, other):
        return [probability(backbone, t, right) - probability(backbone, t, other) for t in texts]

    of = {
        "efficacy": [differences([r.prompt], r.target_new, r.ground_truth) for r in records],
        "generalization": [differences(r.rephrases, r.target_new, r.ground_truth) for r in records],
        "specificity": [
            differences([r.unrelated[0].prompt], r.unrelated[0].answer, r.target_new)
            for r in records
        ],
    }
    for kind, of_records in of.items():
        shares = [sum(d > 0 for d in ds) / len(ds) for ds in of_records]
        means = [sum(ds) / len(ds) for ds in of_records]
        assert found[f"{kind}_success"] == pytest.approx(100 * sum(shares) / 4)
        assert found[f"{kind}_magnitude"] == pytest.approx(100 * sum(means) / 4, abs=1e-4)
    assert len(table(found).lines) == 3


def test_an_edit_makes_the_new_answer_likelier():
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(strength=3.0, ridge=0.01))
    records = [replace(r, ground_truth=tiny.words(i + 3)) for i, r in enumerate(tiny.records(4))]
    before = success_and_magnitude(editor.backbone, records)
    editor.edit(records)
    after = success_and_magnitude(editor.backbone, records)
    assert after["efficacy_success"] == 100 > before["efficacy_success"]
    assert after["efficacy_magnitude"] > before["efficacy_magnitude"]


def test_without_a_true_answer_there_is_nothing_to_compare():
    backbone = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()).backbone
    found = success_and_magnitude(backbone, tiny.records(2))
    assert set(found) == {"specificity_success", "specificity_magnitude"}
    with pytest.raises(UsageError, match="no record has its true answer"):
        success_and_magnitude(backbone, [EditRecord("the capital is", "Oslo")])


def test_a_true_answer_without_tokens_is_named_by_its_record():
    backbone = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()).backbone
    records = [
        replace(r, ground_truth=true)
        for r, true in zip(tiny.records(2), ("Oslo", " "), strict=True)
    ]
    with pytest.raises(UsageError, match="record 1: answer ' '"):
        success_and_magnitude(backbone, records)
