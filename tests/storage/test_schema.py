"""Files of others: what they must hold, and one line that names the file where they do not."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from horse_plugin import (
    Chain,
    EditDelta,
    EditRecord,
    HorseEditor,
    HorseError,
    HORSEHyperParams,
    HORSETrainer,
    UsageError,
    load_records,
)
from horse_plugin.comparison.runner import RESULTS, held_rows
from horse_plugin.data.corpus import read_corpus
from horse_plugin.editing.chain import CHAIN_FILE, read_edits
from horse_plugin.editing.delta import DELTA, EDIT
from horse_plugin.evaluation.drift import heldout_pieces
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.moments import load_moments
from horse_plugin.storage.digest import text_digest
from horse_plugin.storage.files import to_json
from horse_plugin.storage.schema import Maybe, check_form, count, finite
from horse_plugin.storage.tensors import load_tensors, save_tensors
from horse_plugin.training.checkpoint import CHECKPOINT
from tests import tiny


@pytest.mark.parametrize(
    ("value", "form", "says"),
    [
        ({"a": 1}, {"a": str}, "'a' is 1, which it must not be"),
        ({}, {"a": str}, "'a' is missing"),
        ({"a": None}, {"a": Maybe([int])}, None),
        ({"a": [1, True]}, {"a": Maybe([int])}, r"'a\[1\]' is True"),
        ({"a": {"x": 1, "y": "z"}}, {"a": {str: int}}, r"'a\.y' is str"),
        ({"a": float("inf")}, {"a": finite}, "'a' is inf"),
        ({"a": float("inf")}, {"a": (int, float)}, None),
        ({"a": -5}, {"a": count}, "'a' is -5"),
        ({"a": 2.0}, {"a": count}, "'a' is 2.0"),
        ([{"a": 1}, 7], [{"a": count}], r"'\[1\]' is 7"),
        ("x", {}, "'about' is str"),
    ],
)
def test_a_form_is_held_to(value, form, says):
    if says is None:
        check_form("f.json", value, form)
        return
    with pytest.raises(HorseError, match=f"f.json: damaged: field {says}"):
        check_form("f.json", value, form)


READERS = {
    "settings.yaml": HORSEHyperParams.from_hparams,
    "text": heldout_pieces,
    "facts.json": load_records,
    "corpus.txt": lambda path: read_corpus(path, 3),
    CHAIN_FILE: lambda path: Chain(path.parent),
    EDIT: lambda path: EditDelta.load(path.parent),
    DELTA: lambda path: EditDelta.load(path.parent),
    RESULTS: lambda path: held_rows(path.parent),
    "m.npz": load_moments,
}


@pytest.fixture(scope="module")
def delta():
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams()).edit(tiny.records(2))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "not text"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_named(tmp_path, delta, name, kind):
    """And not waited for, nor read for ever."""
    if name == EDIT:
        delta.save(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\x00[")
    if (name, kind) == ("corpus.txt", "not text"):
        return  # any bytes are a corpus
    with pytest.raises(HorseError) as raised:
        READERS[name](path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


BOMBS = {
    "wide": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{n}: &{n} [{', '.join(9 * [f'*{m}'])}]\n"
        for m, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "inner_params: *i\n",
    "endless": "inner_params: &a [*a, *a]\n",
    "in itself": "inner_params: &a {x: *a}\n",
    "deep": "inner_params: " + 100 * "[" + 100 * "]" + "\n",
    "long": "inner_params: [" + 20_000 * "x, " + "]\n",
    "digits": "rank: " + 10_000 * "9" + "\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_that_unfolds_without_end_is_refused_in_a_short_line(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text("model_name: m\n" + BOMBS[name])
    with pytest.raises(UsageError) as raised:
        HORSEHyperParams.from_hparams(path)
    said = str(raised.value)
    assert said.startswith(str(path)) and len(said) < 400 + len(str(path)) and "\n" not in said


def test_parts_of_a_yaml_may_have_names(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model_name: &m some/model\ntokenizer_name: *m\n")
    assert HORSEHyperParams.from_hparams(path).tokenizer_name == "some/model"


REQUEST = {"prompt": "the capital of Norway is", "target_new": "Lima"}


@pytest.mark.parametrize(
    ("case_id", "read_as"),
    [(np.int64(3), 3), (np.uint8(7), 7), (3, 3), ("a", "a"), (None, None), ([1], "[1]")],
)
def test_what_records_hold_can_be_saved(tmp_path, delta, case_id, read_as):
    (record,) = load_records([REQUEST | {"case_id": case_id}])
    assert record.case_id == read_as and type(record.case_id) is type(read_as)
    made = EditDelta(delta.tensors, [record], delta.about)
    made.save(tmp_path)
    assert EditDelta.load(tmp_path).records == [record]


@pytest.mark.parametrize(
    "record",
    [
        REQUEST | {"case_id": "\ud800"},
        REQUEST | {"ground_truth": ["\ud800"]},
        REQUEST | {"subject": "\udfff"},
        EditRecord("a is", "b", case_id=np.int64(3)),
        EditRecord("a is", "b", ground_truth="\ud800"),
        EditRecord("a is", np.array(["b"])),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_work(record):
    with pytest.raises(UsageError, match=r"record 1: .*(half a Unicode|cannot be saved)"):
        load_records([REQUEST, record])


def test_facts_with_a_name_that_is_not_utf_8_are_read_and_folders_refused(tmp_path, delta):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps([REQUEST]))
    assert len(load_records(folder / "facts.json")) == 1
    delta.save(tmp_path / "e")
    shutil.copytree(tmp_path / "e", folder / "e")
    for refused in (
        lambda: delta.save(folder / "other"),
        lambda: EditDelta.load(folder / "e"),
        lambda: trainer_in(folder, 1).run(),
    ):
        with pytest.raises(UsageError, match=r"caf.*its name is not UTF-8; rename it"):
            refused()
    delta.about["hparams"]["archive"] = str(folder)
    delta.save(tmp_path / "e2")
    assert EditDelta.load(tmp_path / "e2").about["hparams"]["archive"] == str(folder)
    assert json.loads(to_json({"a": str(folder)})) == {"a": str(folder)}
    assert to_json({"a": "é"}) == '{\n "a": "é"\n}'


def forge(folder, in_about=None, in_records=None):
    """Change an edit, and give it the right checksums."""
    tensors, about = load_tensors(folder / DELTA)
    described = json.loads((folder / EDIT).read_text())
    if in_about:
        in_about(about)
    if in_records:
        in_records(described["records"])
    text = json.dumps(described)
    (folder / EDIT).write_text(text)
    save_tensors(folder / DELTA, tensors, about | {"edit_json": text_digest(text, 64)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 7),
        ("made", ["x"]),
        ("figures", [1]),
        ("figures", {"before": {"efficacy": "x"}, "after": {}}),
        ("figures", {"before": {}, "after": {}, "examples": [{"kind": "edit"}]}),
        ("moved", "x"),
        ("moved", {"m": None}),
        ("budget", {"max_drift": float("nan")}),
        ("versions", {"torch": 2}),
        ("weights", {"m": 1}),
        ("model", {"name": 1}),
    ],
)
def test_a_forged_description_of_an_edit_is_named(tmp_path, delta, field, value):
    delta.save(tmp_path / "e1")
    forge(tmp_path / "e1", lambda about: about.update({field: value}))
    with pytest.raises(HorseError, match=rf"e1/{DELTA}: damaged: field '{field}"):
        EditDelta.load(tmp_path / "e1")


@pytest.mark.parametrize("norm", [float("inf"), float("nan"), "1", True])
def test_a_fingerprint_has_finite_norms(tmp_path, delta, norm):
    delta.save(tmp_path / "e1")
    forge(tmp_path / "e1", lambda about: about["model"].update(embedding_norms=[norm]))
    with pytest.raises(HorseError, match=r"e1/.*'model.embedding_norms\[0\]' is"):
        EditDelta.load(tmp_path / "e1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("target_new", None),
        ("rephrases", "x"),
        ("unrelated", [{"prompt": "x"}]),
        ("case_id", 1.5),
        ("unknown", 1),
    ],
)
def test_a_forged_fact_of_an_edit_is_named(tmp_path, delta, field, value):
    delta.save(tmp_path / "e1")
    forge(tmp_path / "e1", None, lambda records: records[0].update({field: value}))
    with pytest.raises(HorseError, match=rf"e1/{EDIT}: damaged.*{field}"):
        EditDelta.load(tmp_path / "e1")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_edits": -1}, r"edits\[0\]\.n_edits' is -1"),
        ({"made": 1}, r"edits\[0\]\.made' is 1"),
        ({"undone": 3}, r"edits\[0\]\.undone' is 3"),
        (None, "an edit is in it twice"),
    ],
)
def test_a_forged_list_of_a_chain_is_named(tmp_path, delta, change, says):
    chain = Chain(tmp_path / "chain")
    chain.add(delta)
    chain._write([chain.entries[0] | (change or {})] * (1 if change else 2))
    with pytest.raises(HorseError, match=f"chain/{CHAIN_FILE}: damaged.*{says}"):
        read_edits(tmp_path / "chain")


ROW = {"method": "HORSE", "dataset": "d", "model": "m", "n_edits": 3, "seed": 0, "efficacy": 1.0}


@pytest.mark.parametrize(
    "rows",
    [
        {},
        [1],
        [ROW | {"dataset": 3}],
        [ROW | {"efficacy": "x"}],
        [ROW | {"n_edits": -3}],
        [{}],
        [ROW | {"reason": 3}],
    ],
)
def test_a_forged_results_json_is_named(tmp_path, rows):
    (tmp_path / RESULTS).write_text(json.dumps([ROW]))
    assert held_rows(tmp_path) == [ROW]
    (tmp_path / RESULTS).write_text(json.dumps(rows))
    with pytest.raises(HorseError, match=f"{RESULTS}: damaged: field"):
        held_rows(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer's settings, and the folder of its run."""
    folder = tmp_path_factory.mktemp("trained")
    trainer_in(folder, 1).run()
    return folder


def trainer_in(folder, epochs, resume=False):
    hparams = tiny.hparams(max_epochs=epochs, val_interval=1, rank=1)
    backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), hparams)
    data = tiny.records(18)
    return HORSETrainer(hparams, data[:12], data[12:], folder, backbone, resume, progress=False)


def nan_in_network(tensors, about):
    name = next(n for n in tensors if n.endswith(".A"))
    tensors[name] *= torch.nan


FORGED = {
    "negative step": (lambda t, a: a.update(step=-5), "'step' is -5"),
    "another step": (lambda t, a: a.update(step=10**9), "its steps"),
    "no history": (lambda t, a: a.update(history=[{}] * a["step"]), r"'history\[0\]\.step'"),
    "best {}": (lambda t, a: a.update(best={}), r"'best\.step' is missing"),
    "score": (lambda t, a: a["best"].update(score="x"), r"'best\.score' is str"),
    "later best": (lambda t, a: a["best"].update(step=99), "its steps"),
    "NaN": (nan_in_network, "is not finite"),
    "shape": (lambda t, a: t.update({"optimizer.0.exp_avg": torch.zeros(2, 2)}), r"optimizer\.0"),
    "too many": (lambda t, a: t.update({"optimizer.99.step": torch.zeros(())}), "range"),
    "missing": (lambda t, a: t.pop("optimizer.0.exp_avg"), r"optimizer\.0"),
    "infinite": (lambda t, a: t["optimizer.0.exp_avg_sq"].fill_(torch.inf), r"optimizer\.0"),
    "name": (lambda t, a: t.update({"optimizer.x.step": torch.zeros(())}), "invalid literal"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_named(tmp_path, trained, name):
    change, says = FORGED[name]
    tensors, about = load_tensors(trained / CHECKPOINT)
    change(tensors, about)
    save_tensors(tmp_path / CHECKPOINT, tensors, about)
    with pytest.raises(HorseError, match=f"{CHECKPOINT}: damaged.*{says}"):
        trainer_in(tmp_path, 2, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"mom2.mom2": np.eye(3)},
        {"mom2.mom2": np.ones(3), "mom2.count": 1},
        {"mom2.mom2": np.eye(3), "mom2.count": 0},
        {"mom2.mom2": np.full((2, 2), np.nan), "mom2.count": 1},
        None,
    ],
)
def test_forged_statistics_are_named(tmp_path, content):
    path = tmp_path / "m.npz"
    path.write_bytes(b"PK\x03\x04junk") if content is None else np.savez(path, **content)
    with pytest.raises(HorseError, match=r"m\.npz: damaged statistics"):
        load_moments(path)
