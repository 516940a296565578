"""Trunk states in memory and in files: back bit for bit, within their room, gone when stale."""

import errno
import os

import pytest
import torch

from horse_plugin import UsageError
from horse_plugin.data.batches import batches
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.trunk_cache import TrunkCache, _reserve
from tests import tiny


def cache(weights, *limits) -> TrunkCache:
    return TrunkCache(lambda: weights, lambda: torch.zeros(1), *limits)


def some(n=6, dtype=torch.float32):
    """Token ids, and states of 8 numbers a token for them."""
    prompts = [tuple(range(i, 2 * i + 3)) for i in range(n)]
    return prompts, [torch.randn(len(p), 8).to(dtype) for p in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("memory", "disk"), [(1e-3, 0), (0, 1e-3), (1e-6, 1e-3)])
def test_states_come_back_bit_for_bit_and_no_file_is_left(tmp_path, memory, disk, dtype):
    store = cache([], memory, disk, tmp_path)
    prompts, states = some(dtype=dtype)
    for i in range(0, len(prompts), 2):
        store.put(prompts[i : i + 2], states[i : i + 2])
        assert not list(tmp_path.iterdir())
    for found, wanted in zip(store.get(prompts), states, strict=True):
        assert found.dtype is dtype
        assert torch.equal(found, wanted)
    assert store.get([(99,)]) == [None]


def test_what_is_kept_for_a_while_is_dropped_with_its_room():
    weight = torch.nn.Parameter(torch.zeros(1))
    prompts, states = some()
    store = cache([weight], sum(s.nbytes for s in states[:3]) / 1e9)
    store.put(prompts[:1], states[:1])
    with store.for_a_while():
        store.put(prompts[1:3], states[1:3])
        store.put(prompts[3:4], states[3:4])
        assert store.missing(prompts) == prompts[3:] and store.full
    assert store.missing(prompts) == prompts[1:] and not store.full
    store.put(prompts[1:3], states[1:3])
    assert store.missing(prompts) == prompts[3:]
    with store.for_a_while(), torch.no_grad():
        weight.add_(1)
    assert store.missing(prompts) == prompts


def test_work_that_begins_anew_finds_nothing_and_leaves_what_was_there():
    prompts, states = some()
    store = cache([], sum(s.nbytes for s in states[:3]) / 1e9)
    store.put(prompts[:3], states[:3])
    store.put(prompts[3:4], states[3:4])
    assert store.full
    with store.for_a_while(anew=True):
        assert store.missing(prompts) == prompts and not store.full
        store.put(prompts[1:2], states[1:2])
        assert store.missing(prompts[:2]) == prompts[:1]
    assert store.missing(prompts) == prompts[3:] and store.full


def test_where_memory_is_full_states_go_to_files_or_nowhere(tmp_path):
    class OnAFullGPU(torch.Tensor):
        def new_empty(self, n):
            raise torch.OutOfMemoryError

    prompts, states = some()
    states = [s.as_subclass(OnAFullGPU) for s in states]
    for disk, kept in ((0, 0), (1e-3, 6)):
        store = cache([], 1e-3, disk, tmp_path)
        with pytest.warns(UserWarning, match="trunk_cache_gb: no memory is free"):
            store.put(prompts, states)
        assert len(prompts) - len(store.missing(prompts)) == kept and store.full == (not kept)


def test_room_is_kept_to_and_comes_back():
    weight = torch.nn.Parameter(torch.zeros(1))
    prompts, states = some()
    size = [s.nbytes for s in states]
    store = cache([weight], size[0] / 1e9, (size[1] + size[2]) / 1e9)
    for p, s in zip(prompts, states, strict=True):
        assert store.full == (p in prompts[4:])  # the fourth is the first without room
        store.put([p], [s])
    assert store.missing(prompts) == prompts[3:]
    with torch.no_grad():
        weight.add_(1)
    assert store.missing(prompts) == prompts
    assert not store.full
    store.put(prompts[1:3], states[1:3])
    assert store.missing(prompts) == [prompts[0], *prompts[3:]]


def test_room_on_disk_is_taken_without_posix_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "states"
    with path.open("wb") as file:
        _reserve(file.fileno(), 3 * 2**20 + 5)
    assert path.stat().st_size == 3 * 2**20 + 5


def test_a_full_disk_is_said_and_lived_with(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = cache([], 0, 1, tmp_path)
    prompts, states = some()
    with pytest.warns(UserWarning, match="No space left"):
        store.put(prompts, states)
    assert store.full and store.missing(prompts) == prompts
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: cannot be written to"):
        cache([], 0, 1, tmp_path / "file")


def test_the_model_runs_on_states_from_files_and_computes_what_is_stale(tmp_path):
    model, tokenizer = tiny.model(), tiny.bpe_tokenizer()
    stored = Backbone.of(
        model, tokenizer, tiny.hparams(trunk_cache_gb=0, trunk_disk_gb=0.1, batch_tokens=60)
    )
    kept = Backbone.of(model, tokenizer, tiny.hparams(trunk_cache_gb=0.1, batch_tokens=60))
    prompts = stored.prepare(tiny.records(), ["edit"]).flat()
    stored.cache_trunk_states(prompts), kept.cache_trunk_states(prompts)
    assert not stored.trunk_cache.missing([p.inputs for p in prompts])
    for _ in range(2):
        for batch in batches(prompts, 60):
            assert torch.equal(stored.logits(batch), kept.logits(batch))
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)


def test_a_process_without_a_part_of_a_weight_has_states_too():
    """As FSDP leaves it with a matrix of one row; and one bit of a matrix is another trunk."""
    prompts, states = some()
    whole = torch.nn.Parameter(torch.randn(4, 6).bfloat16())
    store = cache([whole, torch.zeros(0, 8), torch.zeros(3, 5)], 1e-3)
    store.put(prompts, states)
    store.check()
    assert not store.missing(prompts)
    whole.data.view(torch.int16)[3, 5] += 1
    store.check()
    assert store.missing(prompts) == prompts
