"""What an edit preserves: its text, the metric made of it, and their files."""

import json

import numpy as np
import pytest
import torch

from horse_plugin import HorseEditor, HorseError, HORSETrainer, UsageError
from horse_plugin.editing.archive import ARCHIVE, read_network
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.preserve import Preserve
from horse_plugin.model.sampling import LENGTH, written_texts
from horse_plugin.storage.tensors import load_tensors, save_tensors
from tests import oracle, tiny
from tests.numbers import close


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.words(i, 9) for i in range(12)))
    return str(path)


def backbone(**settings):
    return Backbone(tiny.model(), tiny.bpe_tokenizer(), **{"batch_tokens": 40} | settings)


def keys_of(b, name, prompts):
    """The keys of a module at the answer positions, one prompt at a time."""
    keys = []
    hook = b.modules[name].register_forward_pre_hook(lambda module, args: keys.append(args[0][0]))
    found = []
    for p in prompts:
        with torch.no_grad():
            b.model(torch.tensor([p.inputs]))
        found.append(keys.pop()[p.start - 1 :])
    hook.remove()
    return torch.cat(found).double().numpy()


def test_the_metric_is_that_of_text_mixed_with_unrelated_prompts(text, tmp_path):
    b = backbone()
    hp = tiny.hparams(preserve=text, preserve_mix=0.3, preserve_rho=0.02)
    unrelated = b.prepare(tiny.records(), ["unrelated"]).flat()
    preserve = Preserve.of(b, hp, unrelated)
    assert set(preserve.unrelated) == set(unrelated)
    roots = preserve.roots(b, tmp_path)
    for name, root in zip(b.modules, roots, strict=True):
        of_text, of_prompts = (
            k.T @ k / len(k)
            for k in (keys_of(b, name, preserve.text), keys_of(b, name, preserve.unrelated))
        )
        moment = 0.7 * of_text + 0.3 * of_prompts
        want = oracle.metric(np.linalg.cholesky(moment + 1e-12 * np.eye(len(moment))).T, 0.02)
        close(root @ root.T @ torch.tensor(want).float(), np.eye(len(want)), 1e-3)


def test_moments_are_computed_once_and_belong_to_one_model(text, tmp_path, monkeypatch):
    b, hp = backbone(), tiny.hparams(preserve=text)
    roots = Preserve.of(b, hp).roots(b, tmp_path)
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == len(b.modules)
    other = Backbone(tiny.model(seed=1), tiny.bpe_tokenizer())
    Preserve.of(other, hp).roots(other, tmp_path)
    assert len(sorted(tmp_path.rglob("*.npz"))) == 2 * len(files)
    merged = Backbone(tiny.model(), tiny.bpe_tokenizer())  # as with a LoRA: the embeddings stay
    merged.blocks[0].self_attn.q_proj.weight.data.mul_(2)
    found = Preserve.of(merged, hp).roots(merged, tmp_path)
    assert not any(torch.equal(x, y) for x, y in zip(roots, found, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr("horse_plugin.model.preserve.second_moments", None)  # not called again
        again = Preserve.of(b, hp).roots(b, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(roots, again, strict=True))
    files[0].write_bytes(b"x")
    with pytest.raises(HorseError, match=r"damaged statistics.*delete the file"):
        Preserve.of(b, hp).roots(b, tmp_path)


def test_an_edit_spares_the_text_that_it_preserves(text, tmp_path):
    shifts = {}
    for preserve in ("none", text):
        hp = tiny.hparams(preserve=preserve, stats_dir=str(tmp_path), strength=0.5)
        e = HorseEditor.from_backbone(backbone(), hp)
        shifts[preserve] = e.edit(tiny.records()).shifts
    name = list(e.backbone.modules)[-1]
    e.undo()
    keys = keys_of(e.backbone, name, Preserve.of(e.backbone, e.hparams).text)
    felt = {p: np.linalg.norm(keys @ s[name].double().numpy()) for p, s in shifts.items()}
    size = {p: s[name].norm().item() for p, s in shifts.items()}
    assert felt[text] / size[text] < 0.7 * felt["none"] / size["none"]


def test_the_metric_is_that_of_the_unedited_model_whatever_edits_are_in_force(text, tmp_path):
    hp = tiny.hparams(preserve=text, stats_dir=str(tmp_path))
    first = HorseEditor.from_backbone(backbone(), hp)
    delta = first.edit(tiny.records()[:3])
    for file in tmp_path.rglob("*.npz"):
        file.unlink()
    second = HorseEditor.from_backbone(backbone(), hp)  # as another process, which applies it first
    second.apply(delta)
    edited = second.backbone.weights.digests()
    assert all(torch.equal(x, y) for x, y in zip(first.roots, second.roots, strict=True))
    assert second.backbone.weights.digests() == edited


def test_an_archive_knows_what_its_training_preserved(text, tmp_path):
    hp = tiny.hparams(
        preserve=text, keep_coef=1.0, stats_dir=str(tmp_path / "stats"), val_interval=1
    )
    out, b = tmp_path / "archive", backbone()
    HORSETrainer(hp, tiny.records(12), tiny.records(18)[12:], out, b, progress=False).run()
    _, preserve, about = read_network(out)
    assert preserve.text and len(preserve.unrelated) > 0
    assert about["preserve"]["digest"] == preserve.digest

    changed = tiny.hparams(archive=str(out), preserve="none", stats_dir=str(tmp_path / "other"))
    deltas = [
        HorseEditor.from_backbone(backbone(), h).edit(tiny.records(3))
        for h in (changed, tiny.hparams(archive=str(out), stats_dir=hp.stats_dir))
    ]
    a, b = (delta.tensors for delta in deltas)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert deltas[0].about["hparams"]["preserve"] == text

    tensors, about = load_tensors(out / ARCHIVE)
    tensors["preserve.ids"][0] += 1
    save_tensors(out / ARCHIVE, tensors, about)
    with pytest.raises(HorseError, match=r"preserved text is not what it says"):
        read_network(out)
    about["preserve"] = {"mix": 1.0}
    save_tensors(out / ARCHIVE, tensors, about)
    with pytest.raises(HorseError, match=r"damaged"):
        read_network(out)


def test_the_model_writes_the_same_text_for_the_same_seed():
    b = backbone()
    state = torch.random.get_rng_state()
    texts = written_texts(b, 3 * LENGTH, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts == written_texts(b, 3 * LENGTH, seed=1) != written_texts(b, 3 * LENGTH, seed=2)
    assert len(texts) >= 3 and len({t[0] for t in texts}) > 1


@pytest.mark.slow
def test_a_chat_model_writes_chats_too():
    b = backbone()
    b.tokenizer.chat_template = "{% for m in messages %}what {{ m.content }} who{% endfor %}"
    turn = tuple(b.tokenizer("what ", add_special_tokens=False).input_ids)
    texts = written_texts(b, 128 * LENGTH, seed=0)
    assert {t[: len(turn)] == turn for t in texts} == {True, False}


@pytest.mark.parametrize(("key", "value"), [("preserve_mix", 1.5), ("preserve_rho", 0)])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(UsageError, match=key):
        tiny.hparams(**{key: value})


def test_keeping_text_needs_a_text():
    assert tiny.hparams(preserve="none").keep_coef == 0
    hp = tiny.hparams(preserve="none", keep_coef=1.0)
    with pytest.raises(UsageError, match=r"keep_coef.*preserve: none"):
        HORSETrainer(hp, tiny.records(12), tiny.records(6), backbone=backbone())


def test_a_share_of_one_for_unused_directions_is_the_papers_ridge_term(text, tmp_path):
    b = backbone()
    for root in Preserve.of(b, tiny.hparams(preserve=text, preserve_rho=1)).roots(b, tmp_path):
        assert torch.equal(root, torch.eye(len(root)))


def test_a_corpus_may_be_records(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([r.to_dict() for r in tiny.records()]))
    preserve = Preserve.of(backbone(), tiny.hparams(preserve=str(path)))
    assert len(preserve.text) >= 6


def test_a_text_of_single_tokens_is_refused_by_name(tmp_path):
    (tmp_path / "text.txt").write_text("a\n")
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    with pytest.raises(UsageError, match=r"preserve: .*text.txt: no text in it has two tokens"):
        Preserve.of(backbone, tiny.hparams(preserve=str(tmp_path / "text.txt")))


def test_a_model_with_fewer_embeddings_than_tokens_writes_text(monkeypatch):
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    n = len(backbone.model.get_input_embeddings().weight)
    monkeypatch.setattr(type(backbone.tokenizer), "__len__", lambda self: n + 500)
    tokenizer = backbone.tokenizer
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    texts = written_texts(backbone, 200, 0)
    assert texts and max(map(max, texts)) < n
