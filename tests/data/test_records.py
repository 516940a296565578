"""Every form that facts come in, and what is said about a bad one."""

import json

import datasets
import pytest

from horse_plugin import EditRecord, Query, UsageError, load_records

FLAT = {
    "case_id": 0,
    "prompt": "The mother tongue of Ada is",
    "target_new": "English",
    "subject": "Ada",
    "ground_truth": "French",
    "rephrase_prompt": "Ada speaks",
    "locality_prompt": "Bob speaks",
    "locality_ground_truth": "Welsh",
}
RECORD = EditRecord(
    prompt="The mother tongue of Ada is",
    target_new="English",
    rephrases=("Ada speaks",),
    unrelated=(Query("Bob speaks", "Welsh"),),
    subject="Ada",
    ground_truth="French",
    case_id=0,
)
NESTED = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Ada",
        "target_new": {"str": "English", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q2"},
    },
    "paraphrase_prompts": ["Ada speaks", "Ada says it in"],
    "neighborhood_prompts": ["Bob speaks", "Eve speaks"],
}
ZSRE = {
    "subject": "Ada",
    "src": "What does Ada speak?",
    "pred": "Latin",
    "rephrase": "Ada speaks what?",
    "alt": "English",
    "answers": ["French"],
    "loc": "nq question: who",
    "loc_ans": "Bob",
}
REQUEST = {  # what EasyEdit's BaseEditor hands to an algorithm
    "prompt": "The mother tongue of Ada is",
    "target_new": "English",
    "ground_truth": "French",
    "portability": {"hop": {"prompt": "Ada writes in", "ground_truth": "English"}},
    "locality": {
        "near": {"prompt": ["Bob speaks", "Eve speaks"], "ground_truth": ["Welsh", "Manx"]}
    },
    "rephrase_prompt": "Ada speaks",
    "subject": "Ada",
}


def test_flat_counterfact():
    assert load_records([FLAT]) == [RECORD]


def test_nested_counterfact():
    (r,) = load_records([NESTED])
    assert (r.prompt, r.target_new, r.ground_truth) == (RECORD.prompt, "English", "French")
    assert r.rephrases == ("Ada speaks", "Ada says it in")
    assert r.unrelated == (Query("Bob speaks", "French"), Query("Eve speaks", "French"))


def test_zsre():
    (r,) = load_records([ZSRE])
    assert r == EditRecord(
        prompt="What does Ada speak?",
        target_new="English",
        rephrases=("Ada speaks what?",),
        unrelated=(Query("nq question: who", "Bob"),),
        subject="Ada",
        ground_truth="French",
    )


def test_zsre_records_without_an_answer_are_left_out_as_easyedit_does():
    with pytest.warns(UserWarning, match="1 zsRE record"):
        assert len(load_records([ZSRE, {**ZSRE, "alt": ""}])) == 1


def test_easyedit_requests():
    (r,) = load_records([REQUEST])
    assert r.portability == (Query("Ada writes in", "English"),)
    assert r.unrelated == (Query("Bob speaks", "Welsh"), Query("Eve speaks", "Manx"))


def test_an_easyedit_dataset_is_read_by_index():
    class ZsreDataset:
        def __init__(self, data):
            self._data = data

        def __getitem__(self, i):
            return self._data[i]

        def __len__(self):
            return len(self._data)

    assert load_records(ZsreDataset([FLAT, FLAT])) == [RECORD, RECORD]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_files(tmp_path, kind):
    path = tmp_path / f"facts.{kind}"
    if kind == "json":
        path.write_text(json.dumps([FLAT, FLAT]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(FLAT) for _ in range(2)))
    else:
        datasets.Dataset.from_list([FLAT, FLAT]).to_parquet(path)
    assert load_records(path) == [RECORD, RECORD]
    assert load_records(str(path), 1) == [RECORD]


def test_records_survive_json():
    for item in (FLAT, NESTED, ZSRE, REQUEST):
        (r,) = load_records([item])
        assert EditRecord.from_dict(json.loads(json.dumps(r.to_dict()))) == r


def without(item, *path):
    item = json.loads(json.dumps(item))
    inner = item
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return item


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (without(FLAT, "prompt"), "record 1: field 'prompt' is missing"),
        (without(FLAT, "target_new"), "record 1: field 'target_new' is missing"),
        (without(FLAT, "locality_ground_truth"), "record 1: field 'locality_ground_truth'"),
        ({**FLAT, "target_new": ["x"]}, "record 1: field 'target_new' must be text, found list"),
        ({**FLAT, "prompt": "  "}, "record 1: field 'prompt' is blank"),
        ({**FLAT, "rephrase_prompt": [1]}, "record 1: field 'rephrase_prompt' holds something"),
        ("a text", "record 1: expected an object, found str"),
        (None, "record 1: expected an object, found NoneType"),
        (without(NESTED, "requested_rewrite", "subject"), "requested_rewrite: field 'subject'"),
        (without(NESTED, "requested_rewrite", "target_true"), "field 'target_true'"),
        ({**NESTED, "requested_rewrite": 3}, "requested_rewrite: expected an object"),
        (without(ZSRE, "loc_ans"), "record 1: field 'loc_ans' is missing"),
        (without(REQUEST, "locality", "near", "ground_truth"), "as many ground_truth"),
    ],
)
def test_a_bad_record_is_named_by_index_and_field(item, says):
    with pytest.raises(UsageError, match=says):
        load_records([FLAT, item])


def test_a_missing_empty_or_broken_source_is_named(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("[{")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    text = tmp_path / "facts.txt"
    text.write_text("x")
    thing = tmp_path / "thing.json"
    thing.write_text("{}")
    lines = tmp_path / "bad.jsonl"
    lines.write_text("{nope")
    for source, says in [
        (tmp_path / "none.json", "no such file"),
        (bad, "not valid JSON"),
        (empty, "no records"),
        (text, "expected a .json"),
        (thing, "expected a list"),
        (lines, "line 1: not valid JSON"),
        ({"prompt": "x"}, "expected a list of requests"),
        (7, "expected a list of requests"),
        ([], "no records"),
    ]:
        with pytest.raises(UsageError, match=says):
            load_records(source)


def test_more_than_there_are_is_refused():
    with pytest.raises(UsageError, match="3 records asked for, but it holds 2"):
        load_records([FLAT, FLAT], 3)
