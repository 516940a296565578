"""Keys at the subject, at the answer where a subject is missing or shared, and contrasts."""

from dataclasses import replace

import pytest
import torch

from horse_plugin.editing.editor import HorseEditor
from horse_plugin.editing.solve import residuals_of
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from tests import tiny

MIDDLE = [f"model.layers.{i}.mlp.down_proj" for i in (3, 4)]


@pytest.fixture
def backbone():
    return Backbone(tiny.model(), tiny.bpe_tokenizer(), MIDDLE, token="subject")


def answer_positions(prompts):
    return [tuple(range(p.start - 1, len(p.inputs))) for p in prompts]


def test_without_a_subject_keys_are_read_at_the_answer_tokens(backbone):
    first, second = (replace(r, subject=None) for r in tiny.records(2))
    with pytest.warns(UserWarning, match=r"2 of 2 prompts hold no subject \(record 0, 1\)"):
        edits = backbone.prepare([first, replace(second, subject="Atlantis")], ["edit"])
    assert [p.keys_at for p in edits.flat()] == answer_positions(edits.flat())
    assert edits.to_capture() == edits.flat("edit")
    with pytest.warns(UserWarning, match=r"1 of 2 prompts hold no subject \(record 1\)"):
        prompts = backbone.prepare([replace(first, subject="capital"), second], ["edit"]).flat()
    assert prompts[0].keys_at[0] == prompts[0].subject < prompts[0].start - 1
    captured = capture(backbone, prompts)
    assert len(captured.keys[0]) == sum(len(p.answer) for p in prompts)


@pytest.mark.parametrize(
    ("text", "subject", "before"),
    [
        ("Many seats: Ma sits", "Ma", "Many seats: Ma"),  # a whole word, not the beginning of one
        ("北京的人口是", "北京", "北京"),  # scripts without spaces
        ("is THE thing", "the thing", "is THE thing"),
    ],
)
def test_a_subject_is_found_as_people_would_find_it(backbone, text, subject, before):
    record = {"prompt": text, "subject": subject, "target_new": "x"}
    (prompt,) = backbone.prepare([record], ["edit"]).flat()
    assert prompt.subject == len(backbone.tokenizer(before)["input_ids"]) - 1


def shared():
    first, second, third = tiny.records(3)
    same = [
        replace(r, prompt=f"the {w} of Norway is", subject="norway")
        for r, w in ((first, "capital"), (second, "language"))
    ]
    return [*same, third]


def test_facts_that_share_a_subject_have_keys_and_contrasts_of_their_own(backbone):
    edits = backbone.prepare(shared(), ["edit"])
    assert [p.subject is None for p in edits.flat("edit")] == [True, True, False]
    assert [len(group) for group in edits.contrasts] == [6, 6, 0]
    texts = [backbone.tokenizer.decode(p.ids[: p.start]) for p in edits.contrasts[1]]
    assert texts[0].replace(" ", "").endswith("thelanguageofFranceis")
    assert edits[[1, 2]].to_capture() == [
        *edits.flat("edit")[1:],
        *edits.contrasts[1],
    ]
    alone = backbone.place_keys(edits[[1, 2]])  # another edit, where it is not shared
    assert alone == backbone.prepare(shared()[1:], ["edit"])
    assert all(p.subject is not None for p in alone.to_capture())
    # A contrast must not forbid what the edit writes.
    france = replace(tiny.records(1)[0], prompt="the language of France is", subject="France")
    assert [len(g) for g in backbone.prepare([*shared(), france], ["edit"]).contrasts] == [
        5,
        5,
        0,
        0,
    ]


def test_a_fact_about_the_subject_of_one_in_force_is_edited_on_top_of_it(backbone):
    settings = {"token": "subject", "normalizer": "scale", "edit_sweeps": 4, "ridge": 0.01}
    editor = HorseEditor.from_backbone(backbone, tiny.hparams(residual_cap=0.5, **settings))
    first, second, _ = shared()
    editor.edit([first])
    captured = editor.capture([second])
    assert captured.still.any()  # with contrasts
    assert [p.subject for p in captured.predicted] == [None, None]
    editor.edit([second], captured=captured)
    with pytest.raises(UsageError, match="other records"):
        editor.edit([first], captured=captured)
    editor.undo()
    editor.undo()


def test_a_number_that_goes_wrong_at_a_contrast_names_its_record(backbone):
    first, second, third = shared()
    prompts = backbone.prepare([third, first, second], ["edit"]).to_capture()
    told, contrasts = ({t for p in ps for t in p.ids} for ps in (prompts[:3], prompts[3:]))
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[list(contrasts - told)] = torch.nan
    with pytest.raises(HorseError, match=r"record 1: the keys at .* not finite"):
        capture(backbone, prompts)


def test_an_edit_does_nothing_at_contrasts(backbone):
    """Their rows have no gradient and no residual, and take part in Eq. 2."""
    settings = {"token": "subject", "normalizer": "scale", "edit_sweeps": 4, "ridge": 0.01}
    hparams = tiny.hparams(residual_cap=0.5, **settings)
    editor = HorseEditor.from_backbone(backbone, hparams)
    edits = backbone.prepare(shared(), ["edit"])
    captured = editor.capture(edits)
    n = sum(len(p.answer) for p in edits.flat("edit"))
    assert captured.still.tolist() == [False] * n + [True] * 12
    assert list(captured.predicted) == edits.flat("edit")
    assert all((g[n:] == 0).all() and (g[:n] != 0).any() for g in captured.grads)
    alone = capture(backbone, edits.flat("edit"))
    for a, b in zip(captured.grads, alone.grads, strict=True):
        torch.testing.assert_close(a[:n], b)
    network = editor.untrained_network(captured)
    for p in network.groups.parameters():  # a trained one, which makes something of no gradient
        p.data.add_(torch.randn_like(p), alpha=0.3)
    assert all((r[n:] == 0).all() for r in residuals_of(network, captured, hparams))
    assert all((r[n:] != 0).any() for r in network.residuals(captured.keys, captured.grads))
    free = HorseEditor.from_backbone(backbone, hparams)
    shifts = editor.edit(edits).shifts
    editor.undo()
    edits.contrasts = []
    for name, shift in free.edit(edits).shifts.items():
        still = captured.keys[list(shifts).index(name)][n:]
        assert (still @ shifts[name]).norm() < 0.5 * (still @ shift).norm()


def test_a_subject_that_was_cut_off_is_not_read_at_the_token_that_is_kept_first():
    """A tokenizer with BOS keeps it in front of what is left of a long prompt."""
    tokenizer = tiny.sentencepiece_tokenizer()
    record = replace(tiny.records(1)[0], prompt="the Oslo capital of the city", subject="Oslo")
    prompts = []
    for length in range(30, 5, -1):
        backbone = Backbone(tiny.model(), tokenizer, MIDDLE, max_length=length, token="subject")
        prompts += backbone.prepare([record], ["edit"], warn=False).flat()
    lost = [p for p in prompts if p.subject is None]
    assert 0 < len(lost) < len(prompts) and any(p.n_cut for p in prompts)
    assert all(p.ids[p.subject] != tokenizer.bos_token_id for p in prompts if p not in lost)
