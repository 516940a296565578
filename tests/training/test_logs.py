"""What a training tells a log, and the ready-made ones."""

import struct
import sys
import types

import pytest

from horse_plugin import UsageError
from horse_plugin.training import logs
from horse_plugin.training.history import flat
from horse_plugin.training.logs import LOGS, ready_log
from tests.training.test_trainer import trainer


def test_a_log_gets_each_step_with_its_losses_and_validation(tmp_path):
    told = []
    t = trainer(tmp_path, log=told.append)
    t.run()
    assert [figures["step"] for figures in told] == [1, 2, 3, 4, 5, 6]
    assert told == list(map(flat, t.history))
    assert all(isinstance(v, (int, float)) for figures in told for v in figures.values())
    assert ["validation_score" in figures for figures in told] == [False, True] * 3


def test_tensorboard_finds_every_figure(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    figures = {"step": 3, "edit": 0.5, "validation_score": 81.25}
    with ready_log("tensorboard", tmp_path) as log:
        log(figures)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    data, found = file.read_bytes(), {}
    while data:  # records of a length with its checksum, and an event with its own
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
        data = data[16 + size :]
    assert found == {"edit": (3, 0.5), "validation_score": (3, 81.25)}


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_others_get_a_run_of_the_folders_name_which_is_finished(tmp_path, monkeypatch, name):
    calls = []
    library = types.SimpleNamespace(
        init=lambda **kwargs: calls.append(("init", kwargs)),
        log=lambda figures, step: calls.append((step, figures)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, library)

    def stopped():
        with ready_log(name, tmp_path / "mine", {"rank": 4}) as log:
            log({"step": 1, "edit": 2.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    began = {"project": "horse", "name": "mine", "config": {"rank": 4}}
    assert calls == [("init", began), (1, {"edit": 2.0}), "finish"]


FIGURES = [{"step": 1, "edit": 2.25}, {"step": 2, "edit": 1.5, "validation_score": 81.25}]


def test_trackio_itself_keeps_every_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    with ready_log("trackio", tmp_path / "mine", {"rank": 4}) as log:
        for figures in FIGURES:
            log(figures)
    kept = trackio.SQLiteStorage.get_logs("horse", "mine")
    assert [{k: v for k, v in of.items() if k != "timestamp"} for of in kept] == FIGURES


def test_wandb_itself_keeps_every_figure_on_disk_when_it_is_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with ready_log("wandb", tmp_path / "mine", {"rank": 4}) as log:
        run = wandb.run
        for figures in FIGURES:
            log(figures)
    assert (run.project, run.name, dict(run.config)) == ("horse", "mine", {"rank": 4})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert all(f"{value}".encode() in file.read_bytes() for value in (2.25, 1.5, 81.25))


def test_a_log_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="'csv' is not one of tensorboard, trackio, wandb"):
        ready_log("csv", tmp_path).__enter__()
    for name, package in LOGS.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"pip install 'horse-plugin\[{name}\]'"):
            ready_log(name, tmp_path).__enter__()


def test_only_the_main_process_has_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "is_main_process", lambda: False)
    for name in LOGS:  # whether it is installed or not
        with ready_log(name, tmp_path) as log:
            log({"step": 1, "edit": 0.5})
    assert not list(tmp_path.iterdir())
