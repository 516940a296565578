"""The command line on a tiny model: what it writes, and one line for everything that goes wrong."""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from typing import get_type_hints

import pytest

from horse_plugin import HorseEditor, HORSEHyperParams, HORSETrainer
from horse_plugin.cli.asking import prompts_of
from horse_plugin.cli.main import app
from horse_plugin.cli.options import expanded
from horse_plugin.editing.archive import ARCHIVE
from horse_plugin.evaluation.facts import read_facts
from horse_plugin.storage.tensors import load_tensors
from tests import ROOT, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, its YAML and its facts on disk."""
    path = tmp_path_factory.mktemp("cli")
    tiny.files(path)
    return path


@pytest.fixture
def horse(folder, run):
    return functools.partial(run, folder)


def test_ctrl_c_says_how_to_go_on(horse, monkeypatch):
    train_step = HORSETrainer.train_step

    def interrupted(trainer, records):
        os.kill(os.getpid(), signal.SIGINT)
        return train_step(trainer, records)

    line = "train --hparams tiny --train train.json --val val.json --out stopped --epochs 2"
    with monkeypatch.context() as patch:
        patch.setattr(HORSETrainer, "train_step", interrupted)
        code, _, err = horse(line)
    assert code == 1
    says = "horse: stopped after step 1 of 4; stopped holds an archive, and --resume goes on."
    assert says in err.splitlines()
    assert horse(f"{line} --resume")[0] == 0


@pytest.mark.slow
def test_a_training_is_forecast_watched_and_drawn(folder, horse):
    line = "train --hparams tiny --train train.json --val val.json --out w --epochs 2"
    code, out, err = horse(f"{line} --dry-run")
    assert code == 0 and out.startswith("4 steps of"), err
    says = r"2 validations: about .+ in all\. Memory of the machine: about \d"
    assert re.search(says, " ".join(out.split()))
    assert not (folder / "w").exists()
    code, _, err = horse(f"{line} --log none")
    assert code == 2 and "log: 'none' is not one of tensorboard" in err
    assert horse(f"{line} --log tensorboard")[0] == 0
    assert list((folder / "w").glob("events.out.tfevents.*"))
    assert horse("report w")[0] == 0 and "Learning" in (folder / "w/report.html").read_text()


def test_train_edit_eval(folder, horse):
    code, out, _ = horse(
        "train --hparams tiny --train train.json --val val.json --out a --epochs 2"
    )
    assert code == 0
    assert "efficacy" in out
    _, about = load_tensors(folder / "a" / ARCHIVE)
    assert about["hparams"]["max_epochs"] == 2

    code, out, _ = horse(
        "edit --hparams tiny --archive a --data val.json --n-edits 5 --out e --save-model m"
    )
    assert code == 0
    rows = json.loads((folder / "e" / "results.json").read_text())
    assert [r["method"] for r in rows] == ["unedited", "HORSE"]
    for r in rows:
        for key in (
            "method dataset model n_edits efficacy generalization specificity locality "
            "edit_seconds peak_memory_mb seed versions"
        ).split():
            assert key in r
        assert r["n_edits"] == 5
    assert (rows[0]["locality"], rows[0]["edit_seconds"]) == (100.0, None)
    assert sorted(p.name for p in (folder / "e").iterdir()) == [
        "delta.safetensors",
        "edit.json",
        "facts.csv",
        "results.json",
    ]

    code, _, _ = horse(
        "eval --hparams tiny --data val.json --n-edits 5 --delta e --out r/eval.json"
    )
    assert code == 0
    line = "eval --hparams tiny --data val.json --n-edits 2 --delta e --generate --out r/text.json"
    line += " --probabilities"
    code, out, err = horse(line)
    assert code == 0 and "contains, Q&A" in out, err
    (row,) = json.loads((folder / "r" / "text.json").read_text())
    assert 0 <= row["generated"]["edit_exact_plain"] <= 100
    assert 0 <= row["probabilities"]["specificity_success"] <= 100
    assert len((folder / "r/text-written.csv").read_text().splitlines()) > 2 * 3 * 2
    assert (folder / "r/eval-facts.csv").read_text() == (folder / "e/facts.csv").read_text()
    (row,) = json.loads((folder / "r" / "eval.json").read_text())
    for figure in ("method", "efficacy", "generalization", "specificity", "locality"):
        assert row[figure] == rows[1][figure]

    moved = json.loads((folder / "tiny.yaml").read_text()) | {"model_name": str(folder / "m")}
    (folder / "moved.yaml").write_text(json.dumps(moved))
    code, _, _ = horse("eval --hparams moved --data val.json --n-edits 5 --out r/saved.json")
    (row,) = json.loads((folder / "r" / "saved.json").read_text())
    assert (row["method"], row["efficacy"]) == ("unedited", rows[1]["efficacy"])


@pytest.mark.slow
def test_compare_and_ablate_write_tables_and_go_on_where_they_stopped(folder, horse):
    (folder / "HORSE").mkdir()
    (folder / "HORSE" / "small.yaml").write_text((folder / "tiny.yaml").read_text())
    facts = "--data val.json --train train.json --val val.json --n-edits 2,4"
    line = f"compare --hparams-dir . --models small --methods unedited,HORSE {facts} --out c"
    code, out, err = horse(line)
    assert code == 0, err
    assert "Report: c/report.html" in out
    rows = json.loads((folder / "c" / "results.json").read_text())
    assert [(r["method"], r["n_edits"]) for r in rows] == [
        (m, n) for n in (2, 4) for m in ("unedited", "HORSE")
    ]
    files = sorted(p.name for p in (folder / "c").iterdir())
    assert files == [
        "archives",
        "edits-model-val.svg",
        "held-model-2.svg",
        "held-model-4.svg",
        "report.html",
        "results.csv",
        "results.json",
        "table.md",
        "table.tex",
    ]
    assert horse(line)[0] == 0
    assert json.loads((folder / "c" / "results.json").read_text()) == rows
    assert f"<code>horse {line}</code>" in (folder / "c" / "report.html").read_text()
    (archive_of,) = (folder / "c" / "archives").iterdir()
    code, out, err = horse(
        "ablate --hparams HORSE/small --data val.json --n-edits 4 --out b "
        f"--archive {archive_of} --rows horse,decay"
    )
    assert code == 0, err
    assert "decay, 4 edits: HORSE is trained: give training and validation records." in err
    of = json.loads((folder / "b" / "results.json").read_text())
    assert [r["method"] for r in of] == ["unedited", "HORSE", "decay"]
    assert of[1]["efficacy"] == rows[3]["efficacy"]


def test_stats_go_where_the_yaml_says(folder, horse):
    asks = {"model_name": str(folder / "model"), "layers": [2], "stats_dir": "s"}
    asks |= {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "mom2_dataset": "corpus"}
    asks |= {"mom2_dtype": "float32", "mom2_n_samples": 9}
    (folder / "memit.yaml").write_text(json.dumps(asks))
    code, out, err = horse("stats --hparams memit.yaml --corpus val.json")
    assert code == 0, err
    file = "s/model/corpus_stats/model.layers.2.mlp.down_proj_float32_mom2_9.npz"
    assert f"Written: {file}" in out
    assert (folder / file).is_file()
    assert "Written" not in horse("stats --hparams memit.yaml --corpus val.json")[1]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("edit --hparams . --data val.json --out x", 2, "no such hparams file"),
        ("edit --hparams tiny --data val.json --out tiny.yaml", 2, "tiny.yaml: cannot be written"),
        (
            "edit --hparams tiny --data val.json --out x/y --save-model model",
            2,
            "something already",
        ),
        ("edit --hparams tiny --data val.json --out n/e --save-model n", 2, "is to hold the edit"),
        ("edit --hparams tiny --data val.json --out n --save-model ./n", 2, "is to hold the edit"),
        (
            "edit --hparams tiny --data lines.jsonl --out x",
            2,
            "lines.jsonl: line 2: not valid JSON",
        ),
        (
            "train --hparams tiny --train val.json --val val.json --out broken",
            2,
            "holds an archive",
        ),
        ("train --hparams steps --train val.json --val val.json --out x", 2, "max_iters: must be"),
        ("edit --hparams none --data val.json --out x", 2, "none.yaml: no such hparams file"),
        ("edit --hparams n.yaml --data val.json --out x", 2, "horse: n.yaml: no such hparams"),
        ("eval --hparams lama2-7b --data val.json", 2, "Did you mean llama2-7b?"),
        ("eval --hparams near --data val.json", 2, "modle' not loaded"),
        (
            "eval --hparams near --data bare.json --probabilities",
            2,
            "no record has its true answer",
        ),
        ("general --hparams tiny --model wrong --data . --out x", 2, "'wrong' not loaded"),
        ("edit --hparams own --data val.json --out x", 2, "horse: 'own.txt': no such file of text"),
        ("init broken --out x", 2, "broken: holds no config.json"),
        ("compare --data val.json --seeds ² --out x", 2, "--seeds: expected whole numbers"),
        ("compare --data val.json --sequential ²x² --out x", 2, "batches x facts"),
        ("report nothing", 2, "results.json: holds no row"),
        ("eval --hparams tiny", 2, "give --data, or --delta for the facts of its edits"),
        ("eval --hparams near --data val.json", 2, "Did you mean model?"),
        ("edit --hparams tiny --data none.json --out x", 2, "none.json: no such file"),
        ("edit --hparams tiny --data bad.json --out x", 2, "bad.json: not valid JSON"),
        ("edit --hparams tiny --data empty.json --out x", 2, "empty.json: no records"),
        ("edit --hparams tiny --data field.json --out x", 2, "record 1: field 'target_new'"),
        ("edit --hparams tiny --data val.json --n-edits 7 --out x", 2, "it holds 6"),
        ("edit --hparams key --data val.json --out x", 2, "key.yaml: unknown key 'rnak'"),
        ("edit --hparams type --data val.json --out x", 2, "type.yaml: rank: expected"),
        ("edit --hparams tiny --data val.json --archive x --out x", 2, "holds no archive"),
        ("edit --hparams nomodel --data val.json --out x", 2, "model_name: 'nowhere' not loaded"),
        ("edit --hparams tiny --data val.json --archive broken --out x", 1, "damaged"),
        ("eval --hparams tiny --data val.json --delta none", 2, "none: holds no edit"),
        ("edit --hparams tiny --data val.json", 2, "give --out for an edit by itself, or --onto"),
        ("edit --hparams tiny --data val.json --onto x --name ../y", 2, "not a name for an edit"),
        ("log none", 2, "none: holds no chain of edits"),
        ("undo none", 2, "none: holds no chain of edits"),
        ("show none", 2, "none: holds no edit"),
        (
            "export --hparams tiny --delta none --out x --rank 3",
            2,
            "--max-error are for --lora",
        ),
        ("compare --methods GPT --out x", 2, "'GPT' is not one of unedited"),
        ("compare --data val.json --n-edits 3,x --out x", 2, "--n-edits: expected whole numbers"),
        ("compare --data val.json --sequential 3 --out x", 2, "batches x facts, such as 20x100"),
        ("compare --data val.json --sequential 2x2 --n-edits 4 --out x", 2, "leave --n-edits out"),
        ("compare --data val.json --train a --train b --out x", 2, "2 files for 1 data set."),
        ("ablate --hparams tiny --data val.json --n-edits 99 --out x", 2, "99 edits asked for"),
        ("stats --hparams tiny.yaml --corpus val.json", 2, "not a YAML that asks for statistics"),
        ("stats --hparams asks --corpus val.json", 2, "statistics: model_name is missing"),
        ("stats --hparams FT/llama-smollm2-135m --out x", 2, "mom2_dataset is missing"),
        ("stats --hparams layers --out x", 2, "layers: expected a list of numbers, got 5"),
        (
            "stats --hparams MEMIT/llama-smollm2 --out x",
            2,
            "Did you mean MEMIT/llama-smollm2-135m?",
        ),
        (
            "train --hparams tiny --train val.json --val val.json --out x --n-edits 7",
            2,
            "edits_per_step",
        ),
    ],
)
def test_bad_input_gives_one_line_and_leaves_nothing(folder, horse, line, code, says):
    good = json.loads((folder / "tiny.yaml").read_text())
    (folder / "bad.json").write_text("[{]")
    (folder / "empty.json").write_text("[]")
    (folder / "field.json").write_text('[{"prompt": "a", "target_new": "b"}, {"prompt": "a"}]')
    (folder / "asks.yaml").write_text("layers: [2]\nstats_dir: s\nmom2_dataset: corpus\n")
    asks = (ROOT / "hparams/MEMIT/llama-smollm2-135m.yaml").read_text()
    (folder / "layers.yaml").write_text(re.sub("layers: .*", "layers: 5", asks))
    (folder / "own.yaml").write_text(json.dumps(good | {"preserve": "own.txt"}))
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "nothing/results.json").write_text("[]")
    (folder / "bare.json").write_text('[{"prompt": "a", "target_new": "b"}]')
    (folder / "key.yaml").write_text(json.dumps(good | {"rnak": 3}))
    (folder / "type.yaml").write_text(json.dumps(good | {"rank": "high"}))
    (folder / "nomodel.yaml").write_text(json.dumps(good | {"model_name": "nowhere"}))
    (folder / "near.yaml").write_text(json.dumps(good | {"model_name": "modle"}))
    (folder / "steps.yaml").write_text(json.dumps(good | {"max_iters": 0}))
    (folder / "lines.jsonl").write_text('{"prompt": "a", "target_new": "b"}\n{"prompt": ')
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / ARCHIVE).write_bytes(b"not tensors")
    got, _, err = horse(line)
    assert (got, says in err) == (code, True), err
    said = [x for x in err.splitlines() if x and not x.startswith("No archive: ")]
    assert len(said) == 1
    assert said[0].startswith("horse: ")
    assert not [p for p in (folder / "x").rglob("*") if p.is_file()]


@pytest.mark.slow
def test_edits_are_chained_listed_shown_undone_and_exported(folder, horse):
    chain = "edit --hparams tiny --onto chain --max-rise 1e9"
    assert horse(f"{chain} --data val.json --n-edits 3 --name towns")[0] == 0
    assert horse(f"{chain} --data train.json --n-edits 4")[0] == 0
    last = json.loads((folder / "chain" / "002" / "results.json").read_text())[1]
    evaluate = "eval --hparams tiny --data train.json --n-edits 4 --delta chain --out r/chain.json"
    assert horse(evaluate)[0] == 0
    (row,) = json.loads((folder / "r" / "chain.json").read_text())
    assert (row["efficacy"], row["generalization"]) == (last["efficacy"], last["generalization"])

    code, out, _ = horse("log chain")
    assert code == 0 and out.index("towns") < out.index("002") and "undone" not in out
    assert "stale; since then added: 002" in " ".join(out.split())
    assert "These figures are stale; since then added: 002." in horse("show chain")[1]
    assert "stale" not in horse("show chain/towns")[1]
    code, out, err = horse("eval --hparams tiny --delta chain --out r/now.json")
    assert code == 0, err
    now = json.loads((folder / "r" / "now.json").read_text())
    assert [r["method"] for r in now] == ["towns", "002"]
    assert now[1]["efficacy"] == last["efficacy"]
    out = horse("log chain")[1]
    assert "stale" not in out and f"efficacy {now[0]['efficacy']:.1f}" in " ".join(out.split())
    code, out, _ = horse("show chain/towns")
    assert code == 0
    for told in ("towns", "LlamaForCausalLM", "efficacy", "down_proj", "perplexity", "facts hold"):
        assert told in out
    facts = read_facts(folder / "chain/towns")
    failed = [row["prompt"] for row in facts if row["holds"] == "False"]
    code, out, _ = horse("show chain --failed")
    assert code == 0 and f"towns: {len(failed)} of 3 facts do not hold" in out
    assert failed and all(word in out for prompt in failed for word in prompt.split())
    code, out, _ = horse("report chain --out r/chain.html")
    assert code == 0 and "Report: r/chain.html" in out
    page = (folder / "r/chain.html").read_text()
    assert "002: 4 facts edited" in page and "horse edit --hparams tiny --onto chain" in page
    assert horse("export --hparams tiny --delta chain --out whole")[0] == 0
    code, out, _ = horse("export --hparams tiny --delta chain --out lora --lora --rank 2")
    assert code == 0 and "relative error" in out
    assert json.loads((folder / "lora" / "adapter_config.json").read_text())["r"] == 2

    code, out, _ = horse("undo chain towns")
    assert code == 0 and "Stale since: the figures of 002." in out
    assert "`horse edit --onto chain`, with the options" in " ".join(out.split())
    code, out, err = horse("edit --hparams tiny --onto chain --max-rise 1e9")
    assert code == 0 and "Edit: chain/003" in out and "anew" not in out, err
    assert "those before it, anew" in horse("show chain/003")[1]
    assert horse("report chain")[0] == 0
    assert "003: 4 facts edited" in (folder / "chain" / "report.html").read_text()
    assert horse("undo chain 003")[0] == 0
    code, out, _ = horse("log chain")
    assert "undone" in out and "…" not in out
    assert horse(evaluate)[0] == 0
    code, out, _ = horse("redo chain towns")
    assert code == 0 and "In force again: towns." in out and "the figures of towns." in out
    assert horse("undo chain")[0] == horse("undo chain towns")[0] == 0
    code, _, err = horse("undo chain")
    assert (code, "no edit to undo; none is in force" in err) == (2, True)
    assert "No edit is in force" in horse("show chain")[1]
    code, _, err = horse("edit --hparams tiny --data val.json --out chain")
    assert (code, "chain: holds a chain of edits" in err) == (2, True)
    assert horse("log chain")[0] == 0


def test_the_edited_model_is_asked_once_and_in_a_conversation(folder, horse, monkeypatch):
    edit = "edit --hparams strong --data val.json --n-edits 4 --out asked --max-rise 1e9"
    settings = json.loads((folder / "tiny.yaml").read_text()) | {"strength": 5000.0}
    (folder / "strong.yaml").write_text(json.dumps(settings))
    assert horse(edit)[0] == 0
    prompts = [r["prompt"] for r in json.loads((folder / "val.json").read_text())[:2]]
    (folder / "prompts.txt").write_text("\n\n".join(prompts))
    editor = HorseEditor.from_hparams(str(folder / "strong.yaml"))
    before = editor.ask(prompts, 3)
    editor.apply(editor.load_delta(folder / "asked"))
    after = editor.ask(prompts, 3)
    assert before != after

    ask = "ask --hparams strong --delta asked --tokens 3"
    code, out, err = horse(f"{ask} --file prompts.txt --before")
    assert code == 0, err
    for text in (*prompts, *before, *after):
        assert all(word in out for word in re.findall(r"\w+", text))
    assert horse(f"{ask} capital")[1].strip() == editor.ask("capital", 3)[0]

    said = ["capital", "/before", "/undo none", "/undo asked", "capital", "/help"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said)))
    code, out, _ = horse(ask)
    assert code == 0
    after, (before,) = editor.ask("capital", 3)[0], editor.ask("capital", 3, before=True)
    _, *answers = (part.strip() for part in out.split("> "))
    assert answers[:2] == [after, before] == [answers[0], answers[4]]
    assert "no edit 'none'" in answers[2] and "No edit is in force" in answers[3]
    assert "/undo NAME" in answers[5]
    (folder / "none.txt").write_text("")
    assert "none.txt: holds no prompt" in horse(f"{ask} --file none.txt")[2]


def test_a_file_of_prompts_is_read_as_other_files_of_text_are(tmp_path):
    text = "\ufeffWho is Ada?\r\n\r\nThe city\u2028of Oslo\x0cis\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    found = prompts_of(tmp_path / "prompts.txt")
    assert found == ["Who is Ada?", "The city\u2028of Oslo\x0cis"]


def test_strict_refuses_on_the_command_line(folder, horse):
    (folder / "twice.json").write_text(
        json.dumps([{"prompt": "the capital is", "target_new": a} for a in ("Oslo", "Lima")])
    )
    code, _, err = horse("edit --hparams tiny --data twice.json --out strict --strict")
    assert (code, "facts that contradict another one on the same prompt: 1" in err) == (2, True)
    assert not list((folder / "strict").iterdir())


def test_every_command_takes_the_users_folder_in_every_path():
    commands = [command.callback for command in app.registered_commands]
    hints = [h for c in commands for h in get_type_hints(c, include_extras=True).items()]
    paths = [(name, hint) for name, hint in hints if "Path" in str(hint)]
    assert len(paths) > 30
    assert [name for name, hint in paths if hint.__metadata__[0].callback is not expanded] == []


@pytest.mark.slow
def test_a_users_folder_is_looked_at_before_it_is_written_to(folder, horse, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    again = "there is something already"
    assert horse("init model --out=~/begin")[0] == 0
    (tmp_path / "begin/facts.json").write_text("[]")
    code, _, err = horse("init model --out=~/begin")
    assert (code, again in err) == (2, True)
    (tmp_path / "begin/model.yaml").unlink()
    assert horse("init model --out=~/begin")[0] == 0
    assert (tmp_path / "begin/facts.json").read_text() == "[]"

    (tmp_path / "other.yaml").write_text("alg_name: MALMEN\nmodel_name: m\n")
    assert horse("convert-hparams ~/other.yaml --out=~/ours.yaml")[0] == 0
    code, _, err = horse("convert-hparams ~/other.yaml --out=~/ours.yaml")
    assert (code, again in err) == (2, True)

    line = "train --hparams tiny --train train.json --val val.json --epochs 1 --out=~/a"
    assert horse(line)[0] == 0
    code, _, err = horse(line)
    assert (code, "holds an archive already" in err) == (2, True)

    assert horse("edit --hparams tiny --data val.json --onto=~/chain --max-rise 1e9")[0] == 0
    assert horse("eval --hparams tiny --delta=~/chain")[0] == 0
    assert (tmp_path / "chain/now.json").is_file()

    (tmp_path / "mine/HORSE").mkdir(parents=True)
    (tmp_path / "mine/HORSE/small.yaml").write_text((folder / "tiny.yaml").read_text())
    line = "compare --hparams-dir=~/mine --models small --methods unedited --data val.json"
    line += " --out=~/o --n-edits"
    assert horse(f"{line} 2")[0] == 0
    assert horse(f"{line} 3")[0] == 0
    rows = json.loads((tmp_path / "o/results.json").read_text())
    assert [row["n_edits"] for row in rows] == [2, 3]
    assert not (folder / "~").exists()

    code, _, err = horse("show ~nobody-of-that-name/e")
    assert (code, "~nobody-of-that-name/e" in err) == (2, True)


def test_wrong_options_are_usage(horse):
    assert horse("edit --hparams tiny")[0] == 2
    assert horse("edit --no-such-option")[0] == 2
    assert horse("no-such-command")[0] == 2


@pytest.mark.parametrize(
    "command",
    """ init train edit eval ask play show report log undo redo export bench compare ablate stats
general demo""".replace("\n", " ").split(" "),
)
def test_help(horse, command):
    code, out, _ = horse(f"{command} --help")
    assert code == 0
    assert "Usage" in out


def test_init_writes_a_yaml_and_facts_that_edit_as_they_stand(folder, horse):
    code, out, err = horse("init model --out begin")
    assert code == 0, err
    assert "horse edit --hparams begin/model.yaml --data begin/facts.json" in out
    (folder / "begin" / "facts.json").write_text("[]")  # filled in
    code, _, err = horse("init model --out begin")
    assert (code, "there is something already" in err) == (2, True)
    assert horse("init model --out begin2")[0] == 0
    assert (folder / "begin2" / "facts.json").read_text() != "[]"


def test_threads_wait_without_spinning_unless_told_otherwise(horse, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    horse("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    horse("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_help_version_and_completion_load_no_torch(folder):
    code = """
        import os, sys
        from horse_plugin.cli.main import app, run
        import typer
        for line in ("--version", "--help", "edit --help", "demo --help"):
            sys.argv = ["horse", *line.split()]
            try:
                run()
            except SystemExit as left:
                assert not left.code
        os.environ |= {"_HORSE_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
        os.environ["COMP_WORDS"] = "horse edit --hparams llama2"
        try:
            app(prog_name="horse")
        except SystemExit:
            pass
        assert not {"torch", "transformers", "matplotlib"} & set(sys.modules)
    """
    lines = "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())
    run = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "horse-plugin" in run.stdout and run.stdout.splitlines()[-1] == "llama2-7b"


def test_no_space_left_says_so_and_leaves_nothing(folder, horse, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = horse("edit --hparams tiny --data val.json --out full")
    assert code == 1
    assert "No space left on device" in err
    assert not list((folder / "full").iterdir())


@pytest.mark.slow
def test_a_debug_run_shows_the_traceback(folder):
    line = "edit --debug --hparams none --data x.json --out x"
    run = subprocess.run(
        [sys.executable, "-c", "from horse_plugin.cli.main import run; run()", *line.split()],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert run.returncode == 2
    assert "Traceback" in run.stderr


@pytest.mark.slow
def test_importing_the_package_does_not_load_easyedit(tmp_path):
    (tmp_path / "easyeditor.py").write_text("")  # there to be imported, should anything try
    code = "import sys; from horse_plugin import *; assert 'easyeditor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_yaml_of_the_demo_is_found():
    from horse_plugin.hparams import default_hparams

    assert isinstance(default_hparams(), HORSEHyperParams)
