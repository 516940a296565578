"""Every form that facts come in, and what is said about a bad one."""

import json

import datasets
import pytest
import torch

from horse_plugin import EditRecord, Query, UsageError, load_records
from horse_plugin.evaluation import metrics
from horse_plugin.model.backbone import Backbone
from tests import tiny

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
        (without(REQUEST, "locality", "near", "ground_truth"), "near: field 'ground_truth' is"),
        (
            {**REQUEST, "locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["c"]}}},
            "near: needs as many ground_truth",
        ),
        ({**FLAT, "prompt": "{} speaks", "subject": ""}, "has {} for its subject, but no field"),
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


def one(item) -> EditRecord:
    (record,) = load_records([item])
    return record


@pytest.mark.parametrize("name", ["rephrase", "rephrase_prompts", "paraphrase_prompts", "question"])
@pytest.mark.parametrize("value", ["Ada speaks", ["Ada speaks"]])
def test_rephrasings_by_any_name(name, value):
    assert one({**without(FLAT, "rephrase_prompt"), name: value}) == RECORD


def test_rephrasings_by_several_names_all_count():
    record = one(
        {**FLAT, "rephrase": ["Ada speaks", "Ada says"], "paraphrase_prompts": ["Hers is"]}
    )
    assert record.rephrases == ("Ada speaks", "Ada says", "Hers is")


def test_wikibigedit():
    item = {"update": "What is Ada?", "ans": "a cook", "subject": "Ada", "rephrase": "Ada is what?"}
    item |= {"personas": "Tell me, what is Ada?", "mhop": "Where does she work?"}
    record = one(item | {"mhop_ans": "a kitchen", "loc": "What is Bob?", "loc_ans": "a guard"})
    assert record == EditRecord(
        "What is Ada?",
        "a cook",
        ("Ada is what?",),
        (Query("What is Bob?", "a guard"),),
        (
            Query("Where does she work?", "a kitchen"),
            Query("Tell me, what is Ada?", "a cook"),
        ),
        "Ada",
    )


@pytest.mark.parametrize("several", [False, True])
def test_locality_may_be_text_with_its_answers_beside_it(several):
    """The objects of EasyEdit's WikiBigEdit and AKEW, which has a list of the same answer."""
    item = {"subject": "Ada", "prompt": "What is Ada?", "target_new": "a cook"}
    item |= {"ground_truth": None, "rephrase": ["Ada is what?"], "portability_hop": None}
    prompts, answers = ["What is Bob?", "What is Eve?"], ["a guard", "a guard"]
    item |= {"locality": prompts if several else "What is Bob?"}
    item |= {"locality_ans": answers if several else "a guard"}
    asked = prompts if several else prompts[:1]
    assert one(item).unrelated == tuple(Query(prompt, "a guard") for prompt in asked)
    with pytest.raises(UsageError, match="record 0: field 'locality_ans' is missing"):
        one(without(item, "locality_ans"))


def test_portability_may_stand_flat():
    """As in EasyEdit's MQuAKE, whose questions all have one answer."""
    item = without(FLAT, "subject") | {"portability_prompt": ["Who then?", "And who?"]}
    item |= {"portability_ground_truth": ["Eve", "Eve"]}
    assert one(item).portability == (Query("Who then?", "Eve"), Query("And who?", "Eve"))
    flat = {**FLAT, "portability_prompt": "Who then?", "portability_ground_truth": "Eve"}
    assert one(flat).portability == (Query("Who then?", "Eve"),)
    none = {**FLAT, "portability_prompt": None, "portability_ground_truth": None}
    assert one(none) == RECORD


def test_akews_wikiupdate():
    rewrite = {"subject": "Ada", "prompt": "The mother tongue of {} is"}
    rewrite |= {"answer_new": "English", "answer_true": "French", "question": "Ada speaks"}
    item = {"case_id": 0, "requested_rewrite": rewrite, "loc": "Bob speaks", "loc_ans": "Welsh"}
    assert one(item) == RECORD


def test_zsre_portability():
    ports = {"Recalled Relation": "x", "New Question": "Who reads it?", "New Answer": "Eve"}
    assert one({**ZSRE, "portability": ports}).portability == (Query("Who reads it?", "Eve"),)


def test_lists_of_queries_with_their_answers():
    item = {**FLAT, "portability": [{"prompt": "a", "answer": "b"}], "locality": []}
    assert one(item).portability == (Query("a", "b"),)
    flat = {**FLAT, "locality_prompt": ["a", "b"], "locality_ground_truth": ["c", "d"]}
    assert one(flat).unrelated == (Query("a", "c"), Query("b", "d"))


def test_mquake_is_a_record_for_each_rewrite():
    first = NESTED["requested_rewrite"]
    second = {**first, "subject": "Bob", "question": "What does Bob speak?"}
    second["target_new"] = {"str": "Manx"}
    item = {"requested_rewrite": [first, second], "questions": ["Who then?", "And who?"]}
    item |= {"new_answer": "Eve", "new_answer_alias": ["Evelyn"]}
    item |= {"answer": "Al", "answer_alias": [], "single_hops": [{"question": "x"}]}
    with pytest.warns(UserWarning, match=r"nothing reads.*: answer \(1\)$"):
        ada, bob = load_records([item])
    assert ada.prompt == "The mother tongue of Ada is" and not ada.portability
    assert (bob.prompt, bob.target_new) == ("The mother tongue of Bob is", "Manx")
    assert bob.rephrases == ("What does Bob speak?",)
    both = (Query(prompt, "Eve", ("Evelyn",)) for prompt in item["questions"])
    assert bob.portability == tuple(both)


def ripple(prompt, *answers):
    named = [{"value": value, "aliases": list(aliases)} for value, *aliases in answers]
    queries = [{"prompt": prompt, "answers": named, "query_type": "regular", "phrase": None}]
    return {"test_queries": queries, "test_condition": "OR", "condition_queries": []}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the author of What is Life? is Ada Lovelace.",
        "subject_id": "Q1",
        "relation": "AUTHOR",
        "previous_fact": {"prompt": "The name of the author of What is Life? is Schrödinger."},
    },
    "Relation_Specificity": [ripple("The genre of What is Life? is", ["science"])],
    "Logical_Generalization": [ripple("a", ["b", "c", "d"], ["e"])],
    "Compositionality_I": [ripple("f", ["g"]), ripple("f", ["g"]), ripple("h")],
    "Forgetfulness": [],
}


def test_rippleedits_queries_follow_from_the_fact_or_survive_it():
    record = one(RIPPLE)
    assert record.prompt == "The name of the author of What is Life? is"
    assert (record.target_new, record.ground_truth) == ("Ada Lovelace", "Schrödinger")
    assert record.portability == (Query("a", "b", ("c", "d", "e")), Query("f", "g"))
    assert record.unrelated == (Query("The genre of What is Life? is", "science"),)


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("Foo is followed by Bar.", ("Foo is followed by", "Bar")),
        ("Foo follows Bar.", ("Foo follows", "Bar")),
        ("The names of the cast members of Foo are J. R. Bar Jr.", None),
    ],
)
def test_a_sentence_of_rippleedits_is_split_before_its_answer(prompt, fact):
    record = one({"example_type": "recent", "edit": {"prompt": prompt}})
    expected = fact or ("The names of the cast members of Foo are", "J. R. Bar Jr")
    assert (record.prompt, record.target_new) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"edit": {"prompt": "Foo"}}, "record 0, edit: field 'prompt' is no sentence"),
        ({"Forgetfulness": {"a": 1}}, "field 'Forgetfulness' must be a list"),
        ({"Forgetfulness": ["a"]}, "Forgetfulness 0: expected an object"),
        ({"Forgetfulness": [{"test_queries": [{"answers": [{"value": "a"}]}]}]}, "'prompt' is"),
    ],
)
def test_what_is_odd_in_rippleedits_is_named(change, says):
    with pytest.raises(UsageError, match=says):
        one(RIPPLE | change)


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("{} speaks", "Ada speaks"),
        ("The mother tongue of {} is", "The mother tongue of Ada is"),
        ("{}'s mother tongue is", "Ada's mother tongue is"),
        ("In {}, one speaks", "In Ada, one speaks"),
        ('Who wrote "{}"?', 'Who wrote "Ada"?'),
        ("{subject} or { }", "Ada or Ada"),
    ],
)
def test_a_subject_takes_the_place_of_its_braces(prompt, filled):
    assert one({"prompt": prompt, "subject": "Ada", "target_new": "x"}).prompt == filled
    asked = {"rephrase": [prompt], "loc": prompt, "loc_ans": "{}"}
    asked["portability"] = {"hop": {"prompt": prompt, "ground_truth": "y"}}
    record = one({"prompt": "q", **asked, "subject": "Ada", "target_new": "{}"})
    assert record.rephrases == (filled,) and record.target_new == "{}"
    assert (record.unrelated, record.portability) == ((Query(filled, "{}"),), (Query(filled, "y"),))


def test_braces_beside_the_subject_are_kept_and_counted():
    item = {"prompt": "In Ada {} is", "subject": "Ada", "target_new": "x"}
    with pytest.warns(UserWarning, match="1 prompt with {} beside the name of the subject"):
        assert one(item).prompt == item["prompt"]


def test_what_nothing_reads_is_named_once():
    items = [{**FLAT, "hint": "x", "odd": 1}, {**FLAT, "hint": "y"}]
    with pytest.warns(UserWarning, match=r"how many records: hint \(2\), odd \(1\)$") as said:
        load_records(items)
    assert len(said) == 1


def test_prompts_without_an_answer_are_left_out_and_counted():
    item = {**REQUEST, "portability": {"hop": [{"prompt": "Ada writes in", "ground_truth": []}]}}
    with pytest.warns(UserWarning, match="1 prompt without an answer left out"):
        assert one(item).portability == ()


def test_any_accepted_answer_counts(monkeypatch):
    """The model that says Lima is right wherever Lima stands among the accepted answers."""
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    lima = tuple(backbone.tokenizer(" Lima")["input_ids"])

    def says_lima(backbone, prompts):
        return {p: torch.tensor(p.answer) * (p.answer == lima) for p in prompts}

    monkeypatch.setattr(metrics, "predict", says_lima)
    for answers, right in ((["Oslo"], 0), (["Oslo", "Lima"], 100), (["Lima", "Oslo"], 100)):
        hop = {"prompt": "the capital of Norway is", "ground_truth": [[a] for a in answers]}
        evaluator = metrics.Evaluator(backbone, [{**FLAT, "portability": {"hop": hop}}])
        assert evaluator.before.mean("portability") == right


def test_json_lines_under_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = {**FLAT, "prompt": "The mother tongue\u2028of Ada is"}
    lines = [json.dumps(item, ensure_ascii=False) for item in (FLAT, odd)]
    for name in ("facts.json", "facts.jsonl"):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        for path in (tmp_path / name, f"~/{name}"):
            first, second = load_records(path)
            assert first == RECORD and second.prompt == odd["prompt"]


def test_a_token_that_the_model_lacks_is_named():
    tok = tiny.bpe_tokenizer()
    tok.add_tokens(["Quint"])
    backbone = Backbone(tiny.model(), tok)
    if len(tok) <= 400:
        tok.add_tokens([f"<{i}>" for i in range(401 - len(tok))] + ["Marla"])
    word = "Marla" if "Marla" in tok.get_vocab() else "Quint"
    with pytest.raises(UsageError, match=f"record 1, edit prompt: '{word}' is token"):
        backbone.prepare([FLAT, {**FLAT, "prompt": f"where is {word}"}])
    with pytest.raises(UsageError, match=f"ordinary text: '{word}' is token"):
        backbone.read_text(f"where is {word}", 64)


def test_accepted_answers_survive_json_and_others_are_written_as_in_0_1():
    hop = {"prompt": "q", "ground_truth": [["a"], ["b"]]}
    record = one({**FLAT, "portability": {"hop": hop}})
    assert record.portability == (Query("q", "a", ("b",)),)
    assert EditRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.to_dict()["unrelated"] == ({"prompt": "Bob speaks", "answer": "Welsh"},)


def test_a_nested_record_may_have_easyedits_fields_beside_it():
    beside = {"locality_prompt": "p", "locality_ground_truth": 1990}
    beside |= {"locality": [{"prompt": "a", "answer": "b"}]}
    beside |= {"portability": {"hop": {"prompt": "c", "ground_truth": ["d"]}}}
    record = one(NESTED | beside)
    assert record.unrelated[-2:] == (Query("p", "1990"), Query("a", "b"))
    assert len(record.unrelated) == 4 and record.portability == (Query("c", "d"),)


def test_one_prompt_takes_all_the_answers_of_a_list():
    item = {**FLAT, "locality_ground_truth": ["Welsh", "Manx"]}
    assert one(item).unrelated == (Query("Bob speaks", "Welsh", ("Manx",)),)
    spelled = {"prompt": "p", "answer": "q", "accepted": ["r"]}
    assert one({**FLAT, "portability": [spelled]}).portability == (Query("p", "q", ("r",)),)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("rephrases", "one text", "its rephrases"), ("case_id", 1.5, "its case_id")],
)
def test_a_record_that_could_not_be_read_again_is_refused(field, value, says):
    with pytest.raises(UsageError, match=f"record 0: cannot be saved: {says}"):
        load_records([EditRecord("a", "b", **{field: value})])
