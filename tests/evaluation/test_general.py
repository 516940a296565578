"""General ability on local files, on a tiny model, against its own log-probabilities."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests import tiny

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.utils import apply_template as render

from horse_plugin import HorseEditor, HorseError, UsageError
from horse_plugin.cli import main as cli
from horse_plugin.cli.options import hparams_of
from horse_plugin.evaluation import general
from horse_plugin.evaluation.drift import Cost, OrdinaryText

TEXT = tiny.words(0, 60)
QUESTIONS = [
    {
        "question": f"where is {tiny.words(i)} ?",
        "choices": ["Oslo", "Lima", "Rome"],
        "answer": i % 3,
    }
    for i in range(5)
]
PAIRS = [
    {"question": tiny.words(i, 3), "sentence": tiny.words(2 * i, 4), "label": label}
    for i, label in enumerate(["entailment", "not_entailment", "entailment"])
]


@pytest.fixture
def data(tmp_path):
    for name, docs in {"commonsenseqa": QUESTIONS, "qnli": PAIRS}.items():
        lines = [json.dumps(doc, ensure_ascii=False) for doc in docs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def editor():
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())


def likeliest(backbone, prompt, choices):
    """The index of the choice with the largest log-probability after the prompt."""

    @torch.no_grad()
    def score(choice):
        start = len(backbone.tokenizer(prompt)["input_ids"])
        ids = backbone.tokenizer(f"{prompt} {choice}", return_tensors="pt")["input_ids"]
        logits = backbone.model(ids).logits[0].log_softmax(-1)
        return sum(logits[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))

    scores = [score(c) for c in choices]
    return scores.index(max(scores))


def test_the_figure_is_the_share_of_questions_whose_right_answer_is_likeliest(data, capsys):
    backbone = editor().backbone
    found = general.measure(backbone, ["commonsenseqa", "qnli"], data)
    assert capsys.readouterr() == ("", "")  # no bars in a log
    for name, docs in {"commonsenseqa": QUESTIONS, "qnli": PAIRS}.items():
        read = [general.TASKS[name][2](doc) for doc in docs]
        right = [likeliest(backbone, p, c) == a for p, c, a in read]
        n, share = len(right), sum(right) / len(right)
        assert found.figures[name, "acc"] == pytest.approx(100 * share)
        error = (share * (1 - share) / (n - 1)) ** 0.5
        assert found.stderr[name, "acc"] == pytest.approx(100 * error)
    assert len(found.figures) == 2
    assert found.chance == {"commonsenseqa": pytest.approx(100 / 3), "qnli": 50.0}


PAIR = {"question1": "a", "question2": "b", "sentence1": "c", "sentence2": "d"}
PAIR |= {"question": "e f", "sentence": "g"}


@pytest.mark.parametrize(
    ("name", "doc", "of_harness"),
    [
        ("nli", PAIR | {"label": 1}, {}),
        ("mrpc", PAIR | {"label": 1}, {}),
        ("qnli", PAIR | {"label": 1}, {}),
        ("qqp", PAIR | {"label": 0}, {}),
        (
            "mmlu",
            {"question": " e? ", "choices": list("wxyz"), "answer": 2, "subject": "high_school"},
            {},
        ),
        (
            "commonsenseqa",
            {"question": "e? ", "choices": list("vwxyz"), "answer": 3},
            {"choices": {"text": list("vwxyz")}, "answerKey": "D"},
        ),
    ],
)
def test_prompts_answers_and_metrics_are_those_of_the_harness(name, doc, of_harness):
    """Its own YAML, filled in with its own template engine."""
    task, metrics, read = general.TASKS[name]
    file = {"commonsense_qa": "commonsense_qa/default.yaml"}.get(task, f"glue/{task}/default.yaml")
    file = "mmlu/default/_default_template_yaml" if task == "mmlu" else file
    theirs = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / file).read_text())
    filled = doc | of_harness
    prompt, choices, right = read(doc)
    about = "The following are multiple choice questions (with answers) about high school.\n\n"
    before = about if "subject" in doc else ""
    assert prompt == before + render(theirs["doc_to_text"], filled)
    assert choices == list(map(str, theirs["doc_to_choice"]))
    target = filled[theirs["doc_to_target"]]
    assert right == (choices.index(target) if target in choices else target)
    assert list(metrics) == [m["metric"] for m in theirs["metric_list"]]


def test_labels_are_numbers_or_words():
    for label, right in (("entailment", 0), (0, 0), ("not_entailment", 1), ("1", 1)):
        assert general.TASKS["qnli"][2](PAIR | {"label": label})[2] == right


@pytest.mark.slow
def test_before_and_after_an_edit(data, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"model_name": str(tmp_path / "model"), "rank": 4, "dtype": "fp32", "device": "cpu"}
    (tmp_path / "y.yaml").write_text(json.dumps({"alg_name": "HORSE", "lr": 3.0} | settings))
    ours = HorseEditor.from_hparams(hparams_of(tmp_path / "y.yaml"))
    ours.edit(tiny.records()).save(tmp_path / "edit")
    ours.save_model(tmp_path / "edited")
    shared = ["general", "--hparams", tmp_path / "y.yaml", "--data", data, "--tasks"]
    shared += ["commonsenseqa,qnli", "--text", tmp_path / "text.txt"]
    tables = []
    for option, folder in (("--delta", "edit"), ("--model", "edited")):
        out = tmp_path / f"out{option}"
        line = [*shared, option, tmp_path / folder, "--out", out]
        done = CliRunner().invoke(cli.app, [str(word) for word in line], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        tables.append(json.loads((out / "results.json").read_text()))
        assert "| commonsenseqa | acc |" in (out / "table.md").read_text()
        samples = (out / "after-samples.jsonl").read_text().splitlines()
        assert len(samples) == 8 and {json.loads(s)["task"] for s in samples} == {
            "local_commonsenseqa",
            "local_qnli",
        }
        assert json.loads((out / "before.json").read_text())["n-samples"]
    assert tables[0] == tables[1]
    after = general.measure(ours.backbone, ["commonsenseqa", "qnli"], data).figures
    assert {(r["task"], r["metric"]): r["after"] for r in tables[0][:2]} == after
    text = OrdinaryText(HorseEditor.from_hparams(str(tmp_path / "y.yaml")).backbone, [("", TEXT)])
    assert [(r["task"], r["metric"]) for r in tables[0][2:]] == [
        ("text", "drift"),
        ("text", "perplexity"),
    ]
    assert tables[0][3]["before"] == pytest.approx(text.before.perplexity)
    assert tables[0][2]["after"] == pytest.approx(text.measure(ours.backbone).drift)
    assert all(r["difference"] == r["after"] - r["before"] for r in tables[0])


def test_what_does_not_fit_is_named(data):
    backbone = editor().backbone
    with pytest.raises(UsageError, match=r"mmlu\.jsonl: no such file"):
        general.measure(backbone, ["mmlu"], data)
    with pytest.raises(UsageError, match="'piqa' is not one of mmlu, nli"):
        general.measure(backbone, ["piqa"], data)
    (data / "mmlu.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(UsageError, match=r"mmlu\.jsonl, item 1: not a question"):
        general.measure(backbone, ["mmlu"], data)


def write_task(folder, data, name: str, **own):
    """A task of one's own, on the questions of the local NLI file."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "qnli.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | own))


def test_a_task_of_ones_own_runs_beside_local_files(data):
    own = {"output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    own |= {"doc_to_choice": ["a", "b", "c", "d"], "doc_to_target": 0}
    own |= {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    (data / "tasks").mkdir()
    write_task(data / "tasks", data, "mine", **own)
    backbone = editor().backbone
    found = general.measure(backbone, ["qnli", "mine"], data, include=data / "tasks")
    assert set(found.figures) == {("qnli", "acc"), ("mine", "acc"), ("mine", "acc_norm")}
    assert found.chance["mine"] == 25.0
    with pytest.raises(HorseError, match="the harness failed"):
        general.measure(backbone, ["nowhere"], data, include=data / "tasks")


def test_a_figure_of_which_less_is_better_is_no_percentage(data):
    own = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]}
    write_task(data, data, "rolled", doc_to_text="", doc_to_target="{{question}}", **own)
    found = general.measure(editor().backbone, ["rolled"], data, include=data)
    theirs = found.output["results"]["rolled"]["word_perplexity,none"]
    assert found.figures == {("rolled", "word_perplexity"): theirs}
    assert general.rows(found, found)[0]["less_is_better"] is True


@pytest.mark.slow
def test_f1_is_of_those_that_mean_the_same(data):
    docs = [PAIR | {"sentence1": tiny.words(i, 3), "label": i % 2} for i in range(6)]
    (data / "mrpc.jsonl").write_text("\n".join(map(json.dumps, docs)))
    backbone = editor().backbone
    found = general.measure(backbone, ["mrpc"], data)
    said = [likeliest(backbone, *general.TASKS["mrpc"][2](doc)[:2]) for doc in docs]
    both = sum(s and d["label"] for s, d in zip(said, docs, strict=True))
    either = sum(said) + sum(d["label"] for d in docs)
    assert found.figures["mrpc", "f1"] == pytest.approx(100 * 2 * both / either)


def test_a_task_at_chance_is_named():
    row = {"metric": "acc", "after": 1.0, "difference": 1.0, "stderr_before": 2.0, "chance": 25.0}
    rows = [row | {"task": "a", "before": 28.9}, row | {"task": "b", "before": 29.1}]
    (note,) = general.table(rows).notes
    assert note.endswith("no harm could show: a.")
    assert not general.table(rows[1:]).notes
    assert not general.table([{k: v for k, v in rows[0].items() if k != "chance"}]).notes


def of_task(task, before, after, stderr=2.0, **other):
    figures = {"before": before, "after": after, "difference": after - before}
    return {"task": task, "metric": "acc", "stderr_before": stderr} | figures | other


def test_a_verdict_says_which_tasks_lost_more_than_their_error():
    guessed = of_task("qqp", 51.0, 40.0, chance=50.0)
    rows = [of_task("nli", 60.0, 58.5), of_task("mrpc", 70.0, 67.0), guessed]
    found = general.verdict(rows)
    assert found.sentence == (
        "1 of 2 tasks lost more than a standard error (mrpc 70.0 → 67.0); no harm could show where "
        "guessing is as good: qqp. The model is somewhat changed."
    )
    assert (found.level, len(found.advice)) == ("fair", 1)
    found = general.verdict([of_task("nli", 60.0, 55.9, stderr_after=2.1), *rows[1:]])
    assert found.level == "fair"
    assert general.verdict([of_task("nli", 60.0, 55.9), *rows[1:]]).level == "bad"
    assert general.verdict([of_task("nli", 60.0, 62.0)]).level == "good"
    assert "These tasks say nothing of harm." in general.verdict([guessed]).sentence


def test_a_figure_of_which_less_is_better_is_lost_when_it_grows():
    row = of_task("lambada", 20.0, 25.0, metric="perplexity", less_is_better=True)
    assert general.verdict([row]).level == "bad"
    assert general.verdict([row | {"before": 30.0, "difference": -5.0}]).level == "good"
    assert general.verdict([of_task("wiki", 5.0, 4.0, stderr=0.0)]).level == "bad"


def test_a_verdict_has_the_text_too_and_without_errors_there_is_none():
    found = general.verdict(general.rows_of_text("news", Cost(0.0, 20.0, {}), Cost(0.2, 21.0, {})))
    said = "On news, perplexity 20.0 → 21.0 and drift 0.200. The model is somewhat changed."
    assert found.sentence == said
    assert general.verdict([of_task("nli", 60.0, 50.0, stderr=None)]) is None
