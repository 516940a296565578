"""What SECURITY.md promises: kills, full disks, damage, forgeries and numbers that go wrong."""

import ast
import contextlib
import functools
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import horse_plugin
from horse_plugin import (
    EditDelta,
    HorseEditor,
    HorseError,
    HORSEHyperParams,
    HORSETrainer,
    UsageError,
    load_records,
)
from horse_plugin.cli import show
from horse_plugin.cli.console import PlainConsole
from horse_plugin.comparison.again import report_of
from horse_plugin.editing.archive import ARCHIVE, load_network, read_network
from horse_plugin.editing.chain import Chain, read_edits
from horse_plugin.editing.delta import FORM
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import load_model, random_model
from horse_plugin.storage.files import locked_folder, to_json
from horse_plugin.storage.schema import Maybe
from horse_plugin.storage.tensors import load_tensors, save_tensors
from horse_plugin.training.checkpoint import CHECKPOINT
from horse_plugin.training.history import HISTORY
from tests import ROOT, processes, tiny

pytestmark = pytest.mark.kill

FILES = (ARCHIVE, CHECKPOINT)
CONSOLE = PlainConsole()
CONSOLE.file = io.StringIO()
PACKAGE = Path(horse_plugin.__file__).parent
QUICK = settings(
    max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def editor(**changes):
    return HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams(**changes))


def trainer(out, resume=False, **changes):
    hparams = tiny.hparams(**processes.SETTINGS | changes)
    backbone = Backbone.of(tiny.model(), tiny.bpe_tokenizer(), hparams)
    data = tiny.records(15)
    return HORSETrainer(hparams, data[:9], data[9:12], out, backbone, resume, progress=False)


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a training run that nothing happened to, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    processes.start(int).join()  # the server is warm from now on
    start = time.monotonic()
    process = processes.start(processes.train, folder)
    process.join()
    assert process.exitcode == 0
    return content(folder), time.monotonic() - start


# Four steps, each saved as checkpoint, and some as archive, with four calls a file; or the clock.
@pytest.mark.parametrize("moment", range(12))
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path, undisturbed, moment):
    wanted, seconds = undisturbed
    chance = random.Random(moment)
    at = chance.randrange(20) if moment % 2 else None
    after = None if moment % 2 else chance.uniform(0.02, 0.9) * seconds
    killed = processes.start(processes.train, tmp_path, at, after)
    killed.join()
    assert killed.exitcode in (-signal.SIGKILL, 0)
    assert killed.exitcode or at is None  # the clock may come too late, a call cannot
    for name in content(tmp_path).keys() & set(FILES):
        load_tensors(tmp_path / name)  # under a final name, files are whole
    resumed = processes.start(processes.train, tmp_path, None, None, True)
    resumed.join()
    assert resumed.exitcode == 0
    assert content(tmp_path) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(wanted)  # and nothing beside them


# Of the 21 calls of each edit the last nine are the list's, the folder's name and the list's again.
@pytest.mark.parametrize("at", [*range(0, 12, 4), *range(12, 22), 30, 40])
def test_a_chain_whose_process_is_killed_holds_whole_edits_only(tmp_path, at):
    """And all of them: every folder is in the list, and everything in the list is there."""
    killed = processes.start(processes.chain, tmp_path, 2, at)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir() and p.name[0] != ".")
    assert names == [d.name for d in Chain(tmp_path).deltas()]
    assert names == ["001", "002"][: sum(at > named for named in (16, 16 + 21))]
    goes_on = processes.start(processes.chain, tmp_path, 1)
    goes_on.join()
    assert goes_on.exitcode == 0
    assert [d.name for d in read_edits(tmp_path)] == [*names, f"{len(names) + 1:03d}"]


# Two blocks in two sweeps, each followed by the sums: four calls a file.
@pytest.mark.parametrize("at", [*range(1, 33, 5), 35])
def test_an_edit_in_blocks_that_is_killed_goes_on_to_the_same_bits(tmp_path, at):
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder, die_at, ends in ((whole, None, 0), (again, at, -signal.SIGKILL), (again, None, 0)):
        folder.mkdir(exist_ok=True)
        process = processes.start(processes.blocks, folder, die_at)
        process.join()
        assert process.exitcode == ends
    made = [load_tensors(folder / "made.safetensors")[0] for folder in (whole, again)]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert [p.name for p in again.iterdir() if p.name != ".lock"] == ["made.safetensors"]


def test_of_two_processes_one_wins_and_the_other_says_so(tmp_path):
    ready = processes.multiprocessing.get_context("forkserver").Event()
    first = processes.start(processes.chain, tmp_path, 1, None, ready)
    assert ready.wait(60)
    with (
        pytest.raises(HorseError, match="another process is writing into it"),
        locked_folder(tmp_path),
    ):
        raise AssertionError
    first.kill()
    first.join()
    with locked_folder(tmp_path):  # a dead process holds nothing
        Chain(tmp_path).add(editor().edit(tiny.records(2), "a"))
    assert len(read_edits(tmp_path)) == 1


@pytest.mark.parametrize("step", [0, 2])
def test_ctrl_c_leaves_a_usable_archive_and_the_run_goes_on_to_the_same_bits(tmp_path, step):
    interval = 1 if step else 3  # the first Ctrl-C comes before any validation
    t = trainer(tmp_path, val_interval=interval)
    train_step = t.train_step

    def interrupted(records):
        if t.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(records)

    t.train_step = interrupted
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step + 1} of 4"):
        t.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    named = {k: processes.SETTINGS[k] for k in ("rank", "inner_params")}
    assert editor(archive=str(tmp_path), **named).edit(tiny.records()).tensors
    trainer(tmp_path, resume=True, val_interval=interval).run()
    whole = tmp_path / "whole"
    trainer(whole, val_interval=interval).run()
    assert content(whole) == {name: (tmp_path / name).read_bytes() for name in (*FILES, HISTORY)}


@contextlib.contextmanager
def room_for(size: int):
    """No file may grow beyond the size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_good_archive_edit_and_chain(tmp_path):
    trainer(tmp_path / "a", max_epochs=1).run()
    e, chain = editor(), Chain(tmp_path / "chain")
    chain.add(e.edit(tiny.records(2), "first"))
    second = e.edit(tiny.records(2), "second")
    good = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for size in (0, 3000):
        for write in (
            lambda: trainer(tmp_path / "a", resume=True).run(),
            lambda: chain.add(second),
            lambda: second.save(tmp_path / "e"),
            lambda: e.save_model(tmp_path / "m"),
        ):
            with room_for(size), pytest.raises(HorseError, match=r"not written: .*Is there space"):
                write()
    left = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    left.pop(tmp_path / "e" / "edit.json", None)  # no edit without its tensors, and a good text
    assert left == good
    assert len(read_edits(tmp_path / "chain")) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An archive, a checkpoint and an edit on disk: path → how to read it."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, max_iters=1, val_interval=1).run()
    e = editor(inner_params=["model.layers.7.mlp.down_proj"])
    e.edit(tiny.records(2), "é").save(folder)
    return {
        folder / ARCHIVE: lambda: read_network(folder),
        folder / CHECKPOINT: lambda: load_tensors(folder / CHECKPOINT),
        folder / "delta.safetensors": lambda: EditDelta.load(folder),
        folder / "edit.json": lambda: EditDelta.load(folder),
    }


def regions(name, whole: bytes) -> list[int]:
    """Every byte of the JSON and of its length; of each tensor both ends and every 64 bytes."""
    if name.endswith(".json"):
        return list(range(len(whole)))
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:start])
    spans = [t["data_offsets"] for key, t in header.items() if key != "__metadata__"]
    assert len(spans) > 1 and max(end for _, end in spans) == len(whole) - start
    data = (start + at for first, end in spans for at in (*range(first, end, 64), end - 1))
    return [*range(start), *data]


@pytest.mark.parametrize("name", [*FILES, "delta.safetensors", "edit.json"])
def test_no_flipped_bit_and_no_missing_end_is_read(saved, name):
    """One of the eight bits in every region, and the file cut off in every 32nd."""
    path = next(p for p in saved if p.name == name)
    whole, read, chance = path.read_bytes(), saved[path], random.Random(name)

    def is_refused():
        with pytest.raises(HorseError, match=r"damaged|holds no|format"):
            read()

    places = regions(name, whole)
    try:
        with path.open("r+b", buffering=0) as file:  # to write it anew each time takes a minute
            for at in places:
                os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << chance.randrange(8)]), at)
                is_refused()
                os.pwrite(file.fileno(), whole[at : at + 1], at)
            read()
            for at in places[::-32]:
                file.truncate(at)
                is_refused()
    finally:
        path.write_bytes(whole)
    read()


@contextlib.contextmanager
def only_our_errors(*named):
    """Nothing else goes through, and each says in which file, or in which edit or module."""
    try:
        yield
    except HorseError as error:
        if not any(str(name) in str(error) for name in named):
            raise AssertionError(f"unnamed: {error}") from error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    """prompt target_new rephrase_prompt locality portability subject ground_truth src alt loc
    requested_rewrite neighborhood_prompts answers""".split()
)


@given(
    st.lists(st.dictionaries(FIELDS, JSON, max_size=5) | JSON, max_size=3), st.binary(max_size=3)
)
@QUICK
def test_500_malformed_data_files(tmp_path_factory, items, junk):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(json.dumps(items).encode() + junk)
    with only_our_errors(path):
        assert load_records(path)


KEYS = st.sampled_from([*HORSEHyperParams.__dataclass_fields__, "alg", "unknown"])


@given(st.dictionaries(KEYS, JSON, max_size=4) | JSON, st.text(max_size=3))
@QUICK
def test_500_malformed_yamls(tmp_path_factory, keys, junk):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(keys) + junk, encoding="utf-8", errors="replace")
    with only_our_errors(path):
        HORSEHyperParams.from_hparams(path)


def put(tree, path, value):
    """The tree with the value at the end of the path, as far as the path leads anywhere."""
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def paths(tree, above=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*above, key))


@functools.cache
def editor_of_one_module() -> HorseEditor:
    return editor(inner_params=processes.SETTINGS["inner_params"])


@pytest.mark.parametrize("name", [ARCHIVE, "delta.safetensors"])
@given(data=st.data())
@QUICK
def test_500_forged_archives_and_500_forged_edits_with_the_right_checksum(saved, name, data):
    """One field, or one tensor, is another; reading and using it raises our errors or works."""
    path = next(p for p in saved if p.name == name)
    whole = path.read_bytes()
    tensors, about = load_tensors(path)
    if data.draw(st.booleans()):
        about = put(about, data.draw(st.sampled_from(list(paths(about)))), data.draw(JSON))
    else:
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]))
        names = st.sampled_from([*tensors, "other", "network.log_eta"])
        tensors[data.draw(names)] = torch.zeros(shape, dtype=dtype)
    e = editor_of_one_module()
    try:
        save_tensors(path, tensors, about)
        with only_our_errors(path.parent, "edit", "é", "down_proj"):
            if name == ARCHIVE:
                load_network(path.parent, e.backbone)
            else:
                delta = EditDelta.load(path.parent)
                for part in show.edit(delta):
                    CONSOLE.print(part)
                e.apply(delta)
                e.undo()
    finally:
        path.write_bytes(whole)


def test_what_an_edit_may_lack_may_be_null_too(saved):
    path = next(p for p in saved if p.name == "delta.safetensors")
    whole = path.read_bytes()
    tensors, about = load_tensors(path)
    for name in (name for name, form in FORM.items() if isinstance(form, Maybe)):
        try:
            save_tensors(path, tensors, about | {name: None})
            for part in show.edit(EditDelta.load(path.parent)):
                CONSOLE.print(part)
            assert "facts edited" in report_of(path.parent).html()
        finally:
            path.write_bytes(whole)


def test_no_foreign_code_is_loaded():
    """No pickle in any disguise, no unsafe YAML, no eval; and remote code only if the user says."""
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    assert not forbidden & {n.name.split(".")[0] for n in names}, path
                case ast.ImportFrom(module=module):
                    assert (module or "").split(".")[0] not in forbidden, path
                case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=attr)):
                    assert (owner, attr) not in {("torch", "load"), ("yaml", "load")}, path
                    assert attr not in ("unsafe_load", "full_load", "read_pickle"), path
                case ast.Call(func=ast.Name(id=name)):
                    assert name not in ("eval", "exec", "__import__"), path
    assert HORSEHyperParams("m").trust_remote_code is False


LOADS = ("from_pretrained", "from_config")


def test_every_call_that_could_load_code_says_whether_it_may():
    """Without ``trust_remote_code`` transformers asks, and a "y" from a pipe runs the code."""
    said = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in LOADS:
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                said.append(given.get("trust_remote_code"))
                assert said[-1] in ("trust", "False"), f"{path}: {ast.unparse(node)}"
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "trust":
                assert ast.unparse(node.value) == "hparams.trust_remote_code", path
    assert said.count("trust") == 4  # the model, its config, its shell to quantise, a random one


@pytest.fixture
def foreign(tmp_path):
    """A model's folder whose config names code; the code leaves a file when it runs."""
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    tiny.model().save_pretrained(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as Config\n"
    (folder / "code.py").write_text(code)

    def named(model_type):
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return named, ran


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_beside_a_config_is_not_run_nor_asked_about(foreign, monkeypatch, answer):
    named, ran = foreign
    folder = named("foreign")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    hparams = tiny.hparams(model_name=str(folder), tokenizer_name=str(folder))
    for load in (lambda: load_model(hparams), lambda: random_model(folder, hparams)):
        with pytest.raises(UsageError, match=r"foreign.*not loaded: .*set trust_remote_code"):
            load()
    assert not ran.exists() and sys.stdin.read() == answer


def test_an_exported_model_names_no_code(foreign, tmp_path):
    named, ran = foreign
    folder = named("llama")  # whose own class transformers has
    e = HorseEditor.from_hparams(tiny.hparams(model_name=str(folder)))
    assert e.backbone.model.config.auto_map
    e.edit(tiny.records())
    e.save_model(tmp_path / "exported")
    for path in (tmp_path / "exported").glob("*.json"):
        assert "auto_map" not in path.read_text()
    assert e.backbone.model.config.auto_map and not ran.exists()
    assert Backbone.load(tiny.hparams(model_name=str(tmp_path / "exported")))


@pytest.mark.parametrize("what", ["keys", "residual", "shift", "weight"])
def test_numbers_that_go_wrong_name_layer_and_record(monkeypatch, what):
    half = torch.float16 if what == "weight" else torch.float32
    e = HorseEditor(tiny.model("llama", half), tiny.bpe_tokenizer(), tiny.hparams())
    e.edit(tiny.records())
    e.undo()
    network = e.untrained_network
    before = {k: v.clone() for k, v in e.backbone.model.state_dict().items()}

    def broken(captured):
        fitted = network(captured)
        row = (captured.record_of_row == 4).nonzero()[0].item()
        keys, residuals = captured.keys[1], fitted.residuals(captured.keys, captured.grads)
        if what == "keys":
            keys[row] = 1e30  # its square is infinite
        if what == "residual":
            residuals[1][row, 3] = torch.nan
        if what == "shift":
            residuals[1][row] = 3e38
            keys *= 1e3
        if what == "weight":
            residuals[1][row] = 1e9
        fitted.residuals = lambda *args: residuals
        return fitted

    monkeypatch.setattr(e, "untrained_network", broken)
    says = r"layers\.3\.mlp\.down_proj: "
    with pytest.raises(HorseError, match=says) as raised:
        e.edit(tiny.records())
    assert "bf16" in str(raised.value)
    if what != "weight":
        assert "ecord 4" in str(raised.value)
    after = e.backbone.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not e.history


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text() + (ROOT / "README.md").read_text()
    named = {w.strip("`.,()|") for w in text.split() if w.strip("`.,()|").startswith("test_")}
    named = {w for w in named if not w.endswith(".py")}
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 15
    assert not [n for n in named if f"def {n}(" not in tests]


def test_the_package_needs_no_module_of_one_system():
    """``fcntl`` and ``resource`` are not there on Windows; the peak of memory is unknown then."""
    code = """if True:
        import sys
        sys.modules["fcntl"] = sys.modules["resource"] = None
        from horse_plugin import *
        from horse_plugin.evaluation.results import peak_memory_mb
        import horse_plugin.cli.main, torch
        assert torch.cuda.is_available() or peak_memory_mb() is None
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_number_that_is_not_finite_is_null_in_json():
    row = {"drift": float("nan"), "nested": [{"perplexity": float("inf")}, (1, 0.5)], "name": "né"}
    wanted = {"drift": None, "nested": [{"perplexity": None}, [1, 0.5]], "name": "né"}

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(to_json(row), parse_constant=refuse) == wanted
