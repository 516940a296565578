"""Archives, edits, chains and adapters go to a hub and come back, with the checks of any folder."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from horse_plugin import HorseEditor, HORSEHyperParams, HORSETrainer, UsageError, checked_edit
from horse_plugin.editing.archive import ARCHIVE
from horse_plugin.editing.chain import Chain
from horse_plugin.editing.export import save_adapter, to_rank
from horse_plugin.editing.sharing import portable
from horse_plugin.storage.hub import local
from tests import ROOT, tiny
from tests.hub import Hub

# The hub's client reads its settings when it is imported, so that commands run in another process.
CHILD = """if True:
    import io, json, pathlib, sys, contextlib
    from horse_plugin.cli import main as cli
    from tests import tiny
    tiny.shorten_text(pathlib.Path(sys.argv[1]))
    for line in sys.stdin.read().splitlines():
        sys.argv, code = ["horse", *line.split()], 0
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.run()
            except SystemExit as left:
                code = left.code or 0
        print("RESULT" + json.dumps([code, out.getvalue(), err.getvalue()]))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive, an edit, a chain of it and an adapter, on disk."""
    path = tmp_path_factory.mktemp("shared")
    tiny.files(path)
    settings = HORSEHyperParams.from_hparams(path / "tiny.yaml")
    HORSETrainer(settings, path / "train.json", path / "val.json", path / "a", progress=False).run()
    editor = HorseEditor.from_hparams(settings)
    delta, rows = checked_edit(editor, tiny.records(4), "facts", "mine", max_rise=1e9)
    delta.save(path / "e")
    (path / "e" / "notes.txt").write_text("not ours")
    chain = Chain(path / "c")
    chain.add(delta, rows)
    editor.undo()
    save_adapter(to_rank(editor, [delta]), editor.backbone, path / "l", [delta])
    (path / "text").mkdir()
    return path


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


@pytest.fixture
def horse(folder, hub, tmp_path):
    """Run command lines with that hub: (exit code, what it printed, what it complained) of each."""

    def call(*lines, token="secret"):
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": token}
        env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD, str(folder / "text")]
        options = {"capture_output": True, "text": True, "env": env, "cwd": folder}
        done = subprocess.run(command, input="\n".join(lines), check=True, **options)
        parts = done.stdout.split("RESULT")[1:]
        return [json.loads(part) for part in parts]

    return call


@pytest.mark.slow
def test_what_is_pushed_is_used_by_name_and_pulled_as_it_was(folder, hub, horse):
    push = [f"push {name} me/{name}" for name in "aecl"]
    use = [
        "edit --hparams tiny --archive me/a --data val.json --out by-name --max-rise 1e9",
        "eval --hparams tiny --delta me/c --data val.json --out by-name.json",
        "show me/c",
        *(f"pull me/{name}@main --out pulled/{name}" for name in "aecl"),
        "pull me/e --out e",
    ]
    *done, taken = horse(*push, "push a me/p --private", *use)
    assert [code for code, _, _ in done] == [0] * len(done), done
    assert taken[0] == 2 and "something already" in taken[2]
    assert "mine" in done[7][1] and "of 4 facts hold" in " ".join(done[7][1].split())
    assert hub.private == {"me/p"} and "notes.txt" not in hub.repos["me/e"]
    for name in "aecl":
        for file in (folder / "pulled" / name).rglob("*"):
            ours = folder / name / file.relative_to(folder / "pulled" / name)
            if file.is_file() and (file.name != "README.md" or name == "l"):
                assert file.read_bytes() == ours.read_bytes()
        *_, head, card = hub.repos[f"me/{name}"]["README.md"].decode().split("---\n", 2)
        assert yaml.safe_load(head)["base_model"] == "model"
        assert str(folder) not in card
    card = hub.repos["me/e"]["README.md"].decode()
    assert "of 4 facts hold" in card and "The model is" in card and "| perplexity" in card
    for record in tiny.records(4):
        assert f"| {record.prompt} | {record.target_new} |" in card
    assert "efficacy" in card and "efficacy" in hub.repos["me/a"]["README.md"].decode()
    assert (folder / "pulled/c/mine/edit.json").exists() and (folder / "by-name.json").exists()


@pytest.mark.slow
def test_what_comes_from_a_hub_is_checked_as_any_folder_is(folder, hub, horse):
    whole = {p.name: p.read_bytes() for p in (folder / "e").iterdir() if p.name != ".lock"}
    flipped = bytearray(whole["delta.safetensors"])
    flipped[-5] ^= 4
    code = {"model.py": b"1/0", "pytorch_model.bin": b"\x80"}
    hub.repos = {
        "me/flipped": whole | {"delta.safetensors": bytes(flipped)},
        "me/code": whole | code,
        "me/none": {"README.md": b"nothing", **code},
        "me/cut": {ARCHIVE: (folder / "a" / ARCHIVE).read_bytes()[:-9]},
    }
    flipped, pulled, none, cut, missing, noname = horse(
        "pull me/flipped --out x/flipped",
        "pull me/code --out x/code",
        "show me/none",
        "edit --hparams tiny --archive me/cut --data val.json --out x/edit",
        "pull me/missing --out x/missing",
        "pull ../e --out x/noname",
    )
    assert flipped[0] == 1 and "damaged" in flipped[2]
    assert pulled[0] == 0 and not {*code} & {p.name for p in (folder / "x/code").iterdir()}
    assert none[0] == 2 and "holds no edit" in none[2]
    assert cut[0] == 1 and "damaged" in cut[2]
    assert missing[0] == 2 and "me/missing: no such folder, nor on the hub" in missing[2]
    assert noname[0] == 2 and "not a name on the hub" in noname[2]
    left = {p.name for p in (folder / "x").iterdir() if not p.name.startswith(".")}
    assert left == {"code", "edit"}
    ((code, _, err),) = horse("push e me/e", token="wrong")
    assert code == 1 and "me/e: not pushed" in err and "wrong" not in err


def test_a_folder_that_is_here_is_never_looked_for_on_a_hub(tmp_path, monkeypatch):
    (tmp_path / "me/e").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(local("me/e")) == "me/e"
    assert local("/me/e").is_absolute() and str(local("e")) == "e"  # nor is what is no name there
    assert str(local("../e")) == "../e" and str(local("me/e/f")) == "me/e/f"
    with pytest.raises(UsageError, match="me/x: no such folder, nor on the hub"):
        local("me/x")  # tests are offline


def test_a_base_model_is_named_as_other_machines_know_it(tmp_path):
    assert portable("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert portable(str(tmp_path / "mine")) == portable("~/models/mine") == "mine"
