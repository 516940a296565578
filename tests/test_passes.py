"""One way through for the data: how often a text is tokenised and a prompt runs through."""

from collections import Counter

import pytest

from horse_plugin import Evaluator, HorseEditor, HORSETrainer, checked_edit
from horse_plugin.model.backbone import Backbone
from tests import tiny


class Counting:
    """A tokenizer that counts the texts that it is given."""

    def __init__(self, tokenizer, texts: Counter):
        self._tokenizer, self._texts = tokenizer, texts

    def __call__(self, text, *args, **kwargs):
        self._texts.update([text] if isinstance(text, str) else text)
        return self._tokenizer(text, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.fixture
def counted(monkeypatch):
    """A backbone, the texts tokenised, and the prompts through trunk and top, each with how often.

    The prompts through the top are counted apart by the weights that they met.
    """
    texts, trunk, top = Counter(), Counter(), Counter()
    tokenizer = Counting(tiny.bpe_tokenizer(), texts)
    backbone = Backbone.of(tiny.model(), tokenizer, tiny.hparams(trunk_cache_gb=0.1))
    run_trunk, run_top = backbone._run_trunk, backbone.top

    def counting_trunk(ids):
        rows = ids.tolist()  # but for the few tokens that tell whether the trunk is the same
        trunk.update(tuple(row) for row in rows if row != backbone.few_tokens())
        return run_trunk(ids)

    def counting_top(batch, states):
        weights = tuple(backbone.weights.digests().values())
        top.update((p, weights) for p in batch.prompts)
        return run_top(batch, states)

    monkeypatch.setattr(backbone, "_run_trunk", counting_trunk)
    monkeypatch.setattr(backbone, "top", counting_top)
    return backbone, texts, trunk, top


def test_an_edit_tokenises_each_query_once_and_runs_each_prompt_once_before_and_after(
    counted, tmp_path
):
    backbone, texts, trunk, top = counted
    (tmp_path / "text.txt").write_text(tiny.words(0, 20))
    editor = HorseEditor.from_backbone(backbone, tiny.hparams())
    checked_edit(editor, tiny.records(), "facts", heldout=tmp_path / "text.txt", max_rise=1e9)
    assert set(texts.values()) == {1}
    queries = [q for r in tiny.records() for q in (r.edit, *r.equivalent, *r.unrelated)]
    assert len(queries) == sum(texts[f"{q.prompt} {q.answer}"] for q in queries)
    assert set(trunk.values()) == {1}
    assert set(top.values()) == {1}
    prompts = set(backbone.prepare(tiny.records()).flat())
    of_prompts = [prompt for prompt, _ in top if prompt in prompts]
    assert len(of_prompts) == 2 * len(prompts)  # the unedited weights and the edited ones


def test_a_plain_edit_runs_the_edit_prompts_only(counted):
    backbone, texts, _, top = counted
    HorseEditor.from_backbone(backbone, tiny.hparams()).edit(tiny.records())
    assert sum(texts.values()) == sum(top.values()) == 6


def test_an_evaluator_runs_the_unedited_model_once(counted):
    backbone, texts, _, top = counted
    evaluator = Evaluator(backbone, tiny.records() * 2)  # a prompt given twice is one prompt
    assert evaluator.before.mean("locality") == 100
    assert set(top.values()) == {1}
    evaluator.evaluate()
    assert set(top.values()) == {2}
    assert set(texts.values()) == {1}  # and each distinct text is read once


def test_training_tokenises_each_query_once(counted, tmp_path):
    backbone, texts, trunk, _ = counted
    data = tiny.records(18)
    hparams = tiny.hparams(max_epochs=3, val_interval=1)
    HORSETrainer(hparams, data[:12], data[12:], tmp_path, backbone, progress=False).run()
    queries = [q for r in data for q in (r.edit, *r.equivalent, *r.unrelated)]
    assert len(queries) == sum(texts[f"{q.prompt} {q.answer}"] for q in queries)
    assert set(texts.values()) == {1}
    assert set(trunk.values()) == {1}
