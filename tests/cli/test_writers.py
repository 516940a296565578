"""Every command that writes: beside another process, killed on the way, and on a full disk."""

import json
import shutil
import signal

import pytest
import yaml

from horse_plugin.editing.delta import DELTA
from horse_plugin.model.backbone import Backbone
from tests import processes, tiny
from tests.test_faults import room_for

pytestmark = pytest.mark.kill

# Each command, and the folder or the file that it writes.
COMMANDS = {
    "train": ("train --hparams tiny --train train.json --val val.json --out archive", "archive"),
    "edit": ("edit --hparams tiny --data val.json --out e", "e"),
    "edit --onto": ("edit --hparams tiny --data val.json --onto chain", "chain"),
    "edit --save-model": ("edit --hparams tiny --data val.json --out e2 --save-model m", "m"),
    "undo": ("undo chain", "chain"),
    "eval": ("eval --hparams tiny --data val.json --out eval.json", "eval.json"),
    "eval of a chain": ("eval --hparams tiny --delta chain", "chain"),
    "export": ("export --hparams tiny --delta chain --out exported", "exported"),
    "export --lora": ("export --hparams tiny --delta chain --out adapter --lora", "adapter"),
    "compare": (
        "compare --hparams-dir . --models tiny --methods unedited --data val.json --n-edits 3 "
        "--out compared",
        "compared",
    ),
    "ablate": (
        "ablate --hparams HORSE/tiny.yaml --rows decay --data val.json --train train.json "
        "--val val.json --n-edits 3 --out ablated",
        "ablated",
    ),
    "stats": ("stats --hparams MEMIT.yaml --out stats", "stats/model/text_stats"),
    "general": ("general --hparams tiny --delta chain --tasks nli --data . --out able", "able"),
    "demo": ("demo --hparams demo.yaml --out demo", "demo"),
    "bench": ("bench --hparams tiny --data val.json --n-edits 3 --out bench.json", "bench.json"),
    "report": ("report chain --out report.html", "report.html"),
    "convert-hparams": ("convert-hparams MEMIT.yaml --out ours.yaml", "ours.yaml"),
}
NAMES = (  # files, and folders to be made
    *("m", "eval.json", "exported", "adapter", "bench.json", "report.html", "ours.yaml"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, its facts, a chain of two edits, and what other commands read."""
    folder = tmp_path_factory.mktemp("writers")
    tiny.files(folder)
    settings = json.loads((folder / "tiny.yaml").read_text()) | {"max_iters": 2}
    (folder / "tiny.yaml").write_text(json.dumps(settings))
    demo = {k: v for k, v in settings.items() if k != "n_edits"}
    demo |= {"edits_per_step": 6, "val_edits": 6, "max_iters": 1}
    (folder / "demo.yaml").write_text(json.dumps(demo))
    (folder / "HORSE").mkdir()
    shutil.copy(folder / "tiny.yaml", folder / "HORSE" / "tiny.yaml")
    memit = {
        "model_name": settings["model_name"],
        "stats_dir": "stats",
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layers": [3, 4],
        "mom2_dataset": "text",
        "mom2_dtype": "float32",
        "mom2_n_samples": 5,
    }
    (folder / "MEMIT.yaml").write_text(yaml.safe_dump(memit))
    question = {"sentence1": "Oslo is in Norway", "sentence2": "Oslo is", "label": "0"}
    (folder / "nli.jsonl").write_text(json.dumps(question) + "\n")
    process = processes.start(processes.chain, folder / "chain", 2)
    process.join()
    assert process.exitcode == 0
    return folder


def copied(whole, to):
    shutil.copytree(whole, to, ignore=shutil.ignore_patterns("model"))  # YAMLs say where that is
    return to


@pytest.fixture
def folder(whole, tmp_path):
    return copied(whole, tmp_path / "work")


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def held(whole, tmp_path_factory):
    """The folder, with everything that commands write held by another process."""
    folder = copied(whole, tmp_path_factory.mktemp("held") / "work")
    ready = processes.multiprocessing.get_context("forkserver").Event()
    folders = {path for _, path in COMMANDS.values()} - set(NAMES)
    process = processes.start(processes.hold, folder, sorted(folders), NAMES, ready)
    assert ready.wait(60)
    yield folder
    process.kill()
    process.join()


@pytest.mark.parametrize("name", COMMANDS)
def test_beside_another_process_every_command_says_so_before_the_work(held, run, monkeypatch, name):
    line, path = COMMANDS[name]
    if name != "stats":  # whose folder is named after the model
        monkeypatch.setattr(Backbone, "load", None)
    code, _, err = run(held, line)
    assert (code, err) == (
        1,
        f"horse: {path}: another process is writing into it. "
        "Wait for it, or choose another name.\n",
    )


# How many calls that write come before the last ones, whose file or folder gets its name.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(("edit", at) for at in (2, 7, 11)),
        *(("edit --save-model", at) for at in (11, 12)),
        *(("undo", at) for at in (0, 3)),
        *(("eval", at) for at in (1, 3)),
        ("export", 0),
        *(("export --lora", at) for at in (3, 8)),
        *(("compare", at) for at in (2, 6, 14, 17)),
        *(("ablate", at) for at in (2, 17)),
        *(("demo", at) for at in (22, 30)),
        ("convert-hparams", 2),
        *(("stats", at) for at in (3, 5)),
        *(("general", at) for at in (3, 5)),
        ("bench", 2),
    ],
)
def test_a_killed_command_leaves_whole_files_only_and_nothing_once_it_ran_again(folder, name, at):
    line, path = COMMANDS[name]
    before = files(folder)
    killed = processes.start(processes.command, folder, line, at)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    left = {k: v for k, v in files(folder).items() if "/." not in f"/{k}"}
    for file, data in left.items():
        assert file in before or data
        if file.endswith(".json") and data != before.get(file):
            json.loads(data)
    for made in ("e", "e2"):  # an edit that is whole is never overwritten
        if (folder / made / DELTA).exists():
            shutil.rmtree(folder / made)
    again = processes.start(processes.command, folder, line)
    again.join()
    assert again.exitcode == 0
    assert (folder / path).exists()
    hidden = [p for p in files(folder) if "/." in f"/{p}"]
    assert not hidden


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_said_and_leaves_the_files_as_they_were(folder, run, name):
    before = files(folder)
    with room_for(0):
        code, _, err = run(folder, COMMANDS[name][0])
    *_, last = err.splitlines()
    assert (code, "not written" in last and "Is there space" in last) == (1, True), err
    assert files(folder) == before
