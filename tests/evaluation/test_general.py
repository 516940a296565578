"""General ability on local files, on a tiny model, against its own log-probabilities."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny

pytest.importorskip("lm_eval")
from horse_plugin import HorseEditor, UsageError
from horse_plugin.cli import main as cli
from horse_plugin.evaluation import general

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


def test_the_figure_is_the_share_of_questions_whose_right_answer_is_likeliest(data):
    backbone = editor().backbone
    found = general.measure(backbone, ["commonsenseqa", "qnli"], data)
    for name, docs in {"commonsenseqa": QUESTIONS, "qnli": PAIRS}.items():
        read = [general.TASKS[name][1](doc) for doc in docs]
        right = [likeliest(backbone, p, c) == a for p, c, a in read]
        assert found[name, "acc"] == pytest.approx(100 * sum(right) / len(right))
    assert len(found) == 2


def test_yes_is_what_the_label_says():
    pair = {"question": "a", "sentence": "b", "sentence1": "a", "sentence2": "b"}
    for name, yes, no in (
        ("qnli", "entailment", "not_entailment"),
        ("qnli", 0, 1),
        ("nli", "entailment", "not_entailment"),
        ("mrpc", 1, 0),
    ):
        answers = [general.TASKS[name][1](pair | {"label": label})[2] for label in (yes, no)]
        assert answers == [0, 1]


@pytest.mark.slow
def test_before_and_after_an_edit(data, tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.bpe_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"model_name": str(tmp_path / "model"), "rank": 4, "dtype": "fp32", "device": "cpu"}
    (tmp_path / "y.yaml").write_text(json.dumps({"alg_name": "HORSE", "lr": 3.0} | settings))
    ours = HorseEditor.from_hparams(cli._hparams(tmp_path / "y.yaml"))
    ours.edit(tiny.records()).save(tmp_path / "edit")
    ours.save_model(tmp_path / "edited")
    shared = ["general", "--hparams", tmp_path / "y.yaml", "--data", data, "--tasks"]
    shared += ["commonsenseqa,qnli"]
    tables = []
    for option, folder in (("--delta", "edit"), ("--model", "edited")):
        out = tmp_path / f"out{option}"
        line = [*shared, option, tmp_path / folder, "--out", out]
        done = CliRunner().invoke(cli.app, [str(word) for word in line], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        tables.append(json.loads((out / "results.json").read_text()))
        assert "| commonsenseqa | acc |" in (out / "table.md").read_text()
    assert tables[0] == tables[1]
    after = general.measure(ours.backbone, ["commonsenseqa", "qnli"], data)
    assert {(r["task"], r["metric"]): r["after"] for r in tables[0]} == after
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
