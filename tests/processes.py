"""Work for the tests that kill it: run in processes of their own, which fork from a warm server."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # which every optimiser loads, slowly, on its first step

from horse_plugin import HorseEditor, HORSETrainer
from horse_plugin.cli import main as cli
from horse_plugin.editing import blocks as module
from horse_plugin.editing.chain import Chain
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.files import locked_folder, reserved
from horse_plugin.storage.tensors import save_tensors
from tests import tiny

SETTINGS = {
    "max_epochs": 2,
    "max_iters": 4,
    "edits_per_step": 3,
    "val_interval": 1,
    "rank": 1,
    "inner_params": ["model.layers.7.mlp.down_proj"],
}
MODEL, TOKENIZER = tiny.model(), tiny.bpe_tokenizer()


def start(work, *args) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.processes"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the server
    process = context.Process(target=_quietly, args=(work, *args))
    process.start()
    return process


def _quietly(work, *args):
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny.shorten_text(Path(folder))  # as in the tests' own process
        work(*args)


def train(out, die_at: int | None = None, seconds: float | None = None, resume=False):
    """Train; die by SIGKILL at the ``die_at``-th call that writes, or after so many seconds."""
    settings = tiny.hparams(**SETTINGS)
    backbone = Backbone.of(MODEL, TOKENIZER, settings)
    data = tiny.records(15)
    _die(die_at, seconds)
    with locked_folder(out):
        trainer = HORSETrainer(settings, data[:9], data[9:12], out, backbone, resume, False)
        trainer.run()


def chain(folder, n: int, die_at: int | None = None, ready=None):
    """Put ``n`` edits on top of those in a chain."""
    editor = HorseEditor(MODEL, TOKENIZER, tiny.hparams())
    _die(die_at, None)
    with locked_folder(folder):
        chain = Chain(folder)
        editor.apply_chain(chain.deltas())
        if ready:
            ready.set()
            time.sleep(600)  # until killed, with the folder held
        for _ in range(n):
            chain.add(editor.edit(tiny.records(2), chain.new_name()))


def blocks(folder, die_at: int | None = None):
    """Make an edit in blocks whose files are all saved as soon as they can be."""
    module.SECONDS, module.BUSY = 0.0, 0
    settings = tiny.hparams(edit_sweeps=2, edit_block=3)
    editor = HorseEditor(MODEL, TOKENIZER, settings)
    _die(die_at, None)
    with locked_folder(folder):
        delta = editor.edit(tiny.records(6), "a", unfinished=folder)
        save_tensors(folder / "made.safetensors", delta.tensors, {})


def command(folder, line: str, die_at: int | None = None):
    """Run a command line in a folder."""
    os.chdir(folder)
    sys.argv = ["horse", *line.split()]
    _die(die_at, None)
    cli.run()


def hold(folder, folders, names, ready):
    """Hold folders, and names of files and of new folders, until killed."""
    os.chdir(folder)
    with contextlib.ExitStack() as stack:
        for path in folders:
            stack.enter_context(locked_folder(path))
        for path in names:
            stack.enter_context(reserved(path))
        ready.set()
        time.sleep(600)


def _die(at: int | None, seconds: float | None):
    """SIGKILL before, within or after one of the system calls that write, or by the clock."""
    if seconds is not None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))
    if at is None:
        return
    count = iter(range(at))

    def deadly(call):
        def counted(*args, **kwargs):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "chmod", "replace", "fdopen"):
        setattr(os, name, deadly(getattr(os, name)))
