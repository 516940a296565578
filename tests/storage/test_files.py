"""Files and folders: one writer at a time, nothing of others removed, and nothing left behind."""

import os
import threading

import filelock
import pytest

from horse_plugin import HorseError, UsageError
from horse_plugin.storage.files import (
    LOCK,
    NAME_LOCK,
    PART,
    check_empty,
    locked_folder,
    new_folder,
    reserved,
    write,
)


def refused(hold, path) -> bool:
    """Whether another thread cannot hold the path; a thread of its own is as good as a process."""
    errors = []

    def work():
        try:
            with hold(path):
                pass
        except HorseError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert all(str(path) in e and "another process is writing into it" in e for e in errors)
    return bool(errors)


@pytest.mark.parametrize("hold", [locked_folder, reserved, new_folder])
def test_of_two_writers_one_wins_and_its_thread_may_hold_again(tmp_path, hold):
    path = tmp_path / "deep" / "it"
    with hold(path):
        assert refused(hold, path) and not refused(hold, tmp_path / "deep" / "other")
        if hold is not new_folder:
            with hold(path):
                assert refused(hold, path)
        assert refused(hold, path)
    assert hold is new_folder or not refused(hold, path)
    assert not list(tmp_path.rglob(".*"))


def test_only_what_a_killed_process_of_ours_left_is_swept(tmp_path):
    for name in (".movie.mkv.part", ".x.part", ".y.lock", ".hidden", f"named{PART}"):
        (tmp_path / name).write_text("the user's own")
    kept = sorted(p.name for p in tmp_path.iterdir())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("")
    (tmp_path / f".link{PART}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f".dangling{PART}").symlink_to(tmp_path / "nowhere")
    (tmp_path / f".results.json.abc{PART}").write_text("half")
    (tmp_path / f".model{PART}").mkdir()
    (tmp_path / f".model{PART}" / "weights").write_text("half")
    (tmp_path / f".model{NAME_LOCK}").write_text("")
    with locked_folder(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LOCK, "elsewhere", *kept])
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_folder_that_is_being_made_is_not_swept(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def export():
        with new_folder(tmp_path / "model") as made:
            (made / "weights").write_text("whole")
            begun.set()
            assert go_on.wait(60)

    thread = threading.Thread(target=export)
    thread.start()
    assert begun.wait(60)
    with locked_folder(tmp_path):  # as an undo in the same folder
        pass
    go_on.set()
    thread.join(60)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_what_a_killed_export_left_goes_with_the_next(tmp_path):
    (tmp_path / f".model{PART}").mkdir()
    (tmp_path / f".model{PART}" / "half").write_text("")
    with new_folder(tmp_path / "model") as made:
        (made / "whole").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["whole"]
    of_this, of_another = f".a.json.12345678{PART}", f".a.json.b.12345678{PART}"
    for name in (of_this, of_another):
        (tmp_path / name).write_text("half")
    with reserved(tmp_path / "a.json"):
        write(tmp_path / "a.json", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [of_another, "a.json", "model"]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    with new_folder(tmp_path / "model") as made:
        (made / "whole").write_text("")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "model" / "whole").exists()


def test_what_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UsageError, match="full: there is something already"):
        check_empty(tmp_path / "full")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("disk"))
    with pytest.raises(UsageError, match=r"disk: is a mount point; choose a new folder in it\."):
        check_empty(tmp_path / "disk")
    with new_folder(tmp_path / "disk" / "new"):
        pass


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError()])
def test_a_file_system_without_locks_is_refused_before_the_work(tmp_path, monkeypatch, error):
    def acquire(lock):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    for hold in (locked_folder, reserved):
        with pytest.raises(UsageError, match="here: cannot be locked"), hold(tmp_path / "here"):
            raise AssertionError


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write(tmp_path / "a.json", "old")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_lock_of_a_killed_process_does_not_cost_what_was_made(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    with new_folder(tmp_path / "out") as made:
        (made / "file").write_text("made")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
