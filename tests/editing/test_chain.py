"""Edits chained, undone in any order, and kept in a folder by one process at a time."""

import gc
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from horse_plugin import EditRecord, Evaluator, HorseEditor, HorseError, UsageError
from horse_plugin.editing import chain as chains
from horse_plugin.editing import delta as deltas
from horse_plugin.editing.chain import CHAIN_FILE, Chain, read_edits
from horse_plugin.storage.digest import weight_digest
from horse_plugin.storage.files import locked_folder
from tests import tiny

MODULE = "model.layers.2.mlp.down_proj"


def editor(dtype=torch.float32, seed=0, **changes):
    return HorseEditor(
        tiny.model("llama", dtype, seed), tiny.bpe_tokenizer(), tiny.hparams(**changes)
    )


def state(editor):
    return {k: v.clone() for k, v in editor.backbone.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def facts(n, start):
    return [
        EditRecord(
            f"the {tiny.words(start + i)} of {tiny.words(3 * i)} {start} is", tiny.words(7 * i)
        )
        for i in range(n)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_edits_of_50_facts_undone_in_random_order(dtype):
    """Tolerance: none. What is left has the bits of the remaining edits applied afresh."""
    e = editor(dtype)
    before = state(e)
    for i in range(10):
        e.edit(facts(50, i), name=f"edit {i}")
    order = random.Random(6)
    while e.history:
        undone = e.undo(order.choice(e.history).name)
        assert undone not in e.history
        fresh = editor(dtype)
        fresh.apply_chain(e.history)
        assert same(state(fresh), state(e))
    assert same(before, state(e))


def test_an_edit_in_the_middle_is_undone_by_name_or_place():
    e = editor()
    for name in ("a", "b", "c"):
        e.edit(tiny.records(3), name)
    assert e.undo("b").name == "b"
    assert e.undo(0).name == "a"
    assert [d.name for d in e.history] == ["c"]
    with pytest.raises(UsageError, match="no edit 'b'; there are c"):
        e.undo("b")


@pytest.mark.parametrize("do", ["undo", "edit"])
def test_changes_by_others_are_noticed_and_not_overwritten(do):
    e = editor()
    e.edit(tiny.records())
    before = state(e)
    weight = e.backbone.modules[MODULE].weight
    weight.data[0, 0] += 1
    with pytest.raises(HorseError, match=rf"{MODULE}.*changed by others"):
        e.undo() if do == "undo" else e.edit(tiny.records())
    assert weight[0, 0] == before[f"{MODULE}.weight"][0, 0] + 1
    assert len(e.history) == 1
    e.undo(force=True)
    assert same(state(editor()), state(e))


def test_a_delta_knows_every_weight_that_it_touches(tmp_path):
    editor().edit(tiny.records()).save(tmp_path)
    delta = HorseEditor.load_delta(tmp_path)
    other = editor()
    other.backbone.modules[MODULE].weight.data[0, 0] += 1e-6
    before = state(other)
    with pytest.raises(UsageError, match=rf"made on other float32 weights of {MODULE}"):
        other.apply(delta)
    assert same(before, state(other)) and not other.history


def test_an_edit_meets_its_model_in_another_dtype_if_that_has_the_same_weights(tmp_path):
    """Both ways between bf16 and fp32, where all weights are bf16 numbers; else not down."""
    half = editor(torch.bfloat16)
    wide = tiny.model("llama", torch.bfloat16).float()
    wide = HorseEditor(wide, tiny.bpe_tokenizer(), tiny.hparams())
    for there, back in ((half, wide), (wide, half)):
        before = state(back)
        first, second = there.edit(tiny.records(), "first"), there.edit(tiny.records(2), "second")
        back.apply_chain([first, second])
        weight, as_made = (e.backbone.modules[MODULE].weight for e in (back, there))
        want = before[f"{MODULE}.weight"].float()
        for delta in (first, second):
            want = (want + delta.shift(MODULE).T).to(weight.dtype).float()
        assert torch.equal(weight.float(), want)
        torch.testing.assert_close(weight.float(), as_made.float(), rtol=2**-7, atol=1e-6)
        back.undo("first")
        back.apply(first)  # on the original weights, which it was made on
        for e in (back, there):
            e.undo()
            e.undo()
        assert same(before, state(back))
    precise = editor().edit(tiny.records(), "precise")
    with pytest.raises(UsageError, match=rf"precise: made on other float32 weights of {MODULE}"):
        half.apply(precise)
    assert editor(torch.bfloat16).edit(tiny.records()).about["weights"][MODULE][:9] == "bfloat16:"
    editor().apply(editor(torch.bfloat16).edit(tiny.records()))  # these weights round to those


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3, 40_000, 600_001])
def test_a_digest_notices_every_changed_bit_swap_and_shape(dtype, n):
    chance = torch.Generator().manual_seed(n)
    weight = torch.randn(n, generator=chance).to(dtype)
    was, others = weight_digest(weight), set()
    bits = weight.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
    width = 8 * dtype.itemsize
    for _ in range(60):
        at, other = torch.randint(n, (2,), generator=chance).tolist()
        bit = torch.randint(width, (), generator=chance).item()
        flip = torch.tensor(1 << bit if bit < width - 1 else -(1 << bit), dtype=bits.dtype)
        bits[at] ^= flip
        others.add(weight_digest(weight))
        if at != other:  # the same bit of two numbers, such as two signs
            bits[other] ^= flip
            others.add(weight_digest(weight))
            bits[other] ^= flip
        bits[at] ^= flip
        if weight[at] != weight[other]:
            weight[[at, other]] = weight[[other, at]]
            others.add(weight_digest(weight))
            weight[[at, other]] = weight[[other, at]]
    assert was == weight_digest(weight) and was not in others
    assert was != weight_digest(torch.cat([weight, torch.zeros(1, dtype=dtype)]))
    assert was != weight_digest(weight[None]) and was == weight_digest(weight[None][0])
    assert weight_digest(weight[1:]) == weight_digest(
        weight[1:].clone()
    )  # wherever it lies in memory
    if n == 3 and dtype is torch.float32:  # written into files: it must never change
        assert weight_digest(torch.arange(3.0)) == "float32:a371ba28171c1e33198856cbec6d8dd0"


def test_edits_of_one_model_combine_but_not_one_without_what_it_was_made_on():
    first = editor()
    a, b = first.edit(tiny.records(3)), first.edit(tiny.records(6)[3:])
    with pytest.raises(UsageError, match="apply first what it was made on top of"):
        editor().apply(b)
    c, both = editor().edit(tiny.records(2)), editor()
    both.apply(a)
    both.apply(c)
    assert both.history == [a, c]


def test_a_chain_that_fails_on_the_way_leaves_the_model_alone():
    e = editor()
    a, b = e.edit(tiny.records(3)), e.edit(tiny.records(3))
    b.tensors = {n: t * torch.nan for n, t in b.tensors.items()}
    fresh = editor()
    before = state(fresh)
    with pytest.raises(HorseError, match=rf"{MODULE}: the edited weight is not finite"):
        fresh.apply_chain([a, b])
    assert same(before, state(fresh)) and not fresh.history


def test_a_chain_keeps_undone_edits_and_puts_the_rest_into_a_fresh_model(tmp_path):
    e, chain = editor(), Chain(tmp_path)
    for name in (None, "towns", None):
        chain.add(e.edit(tiny.records(4), chain.new_name(name)))
    assert [entry["name"] for entry in Chain(tmp_path).entries] == ["001", "towns", "003"]
    assert Chain(tmp_path).undo("towns") == "towns"
    e.undo("towns")
    fresh = editor()
    fresh.apply_chain(read_edits(tmp_path))
    assert same(state(e), state(fresh))
    assert Chain(tmp_path).undo() == "003"
    assert (tmp_path / "003" / "delta.safetensors").exists()
    assert Chain(tmp_path).undo() == "001"
    with pytest.raises(UsageError, match="none is in force"):
        Chain(tmp_path).undo()
    assert read_edits(tmp_path) == []


def test_an_undone_edit_comes_back_into_its_old_place(tmp_path):
    e, chain = editor(), Chain(tmp_path)
    for i in range(3):
        chain.add(e.edit(facts(5, i), name=f"{i}"))
    after = state(e)
    chain.undo("1")
    Chain(tmp_path).redo("1")
    chain = Chain(tmp_path)
    assert chain.in_force == ["0", "1", "2"]
    fresh = editor()
    fresh.apply_chain(chain.deltas())
    assert same(state(fresh), after)
    with pytest.raises(UsageError, match="no edit 1 to put back; none is undone"):
        chain.redo("1")


def test_the_name_of_an_edit_whose_files_are_gone_is_not_free(tmp_path):
    e, chain = editor(), Chain(tmp_path)
    chain.add(e.edit(facts(5, 0), name="towns"))
    chain.undo("towns")
    shutil.rmtree(tmp_path / "towns")
    with pytest.raises(UsageError, match="the files of towns are gone; it stays undone"):
        chain.redo("towns")
    with pytest.raises(UsageError, match="towns is there already"):
        chain.new_name("towns")
    assert Chain(tmp_path).in_force == []


def test_of_several_processes_the_main_one_writes_the_chain(tmp_path, monkeypatch):
    e, chain, second = editor(), Chain(tmp_path), Chain(tmp_path)
    delta = e.edit(facts(5, 0))
    chain.add(delta)
    for module in (chains, deltas):
        monkeypatch.setattr(module, "is_main_process", lambda: False)
    second.add(delta)  # which comes when the main one is done
    delta.save(tmp_path / "001")
    assert second.in_force == chain.in_force == ["001"]


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden", "", "..", "towns"])
def test_no_name_leads_out_of_the_folder_or_onto_another_edit(tmp_path, name):
    (tmp_path / "towns").mkdir()
    with pytest.raises(UsageError, match=r"not a name|is there already"):
        Chain(tmp_path).new_name(name)


def test_a_forged_chain_cannot_point_outside(tmp_path):
    chain = Chain(tmp_path / "chain")
    editor().edit(tiny.records(2)).save(tmp_path / "elsewhere")
    (tmp_path / "chain").mkdir()
    chain._write([{"name": "../elsewhere", "made": "now", "n_edits": 2, "undone": None}])
    with pytest.raises(HorseError, match=r"'\.\./elsewhere' is no name"):
        read_edits(tmp_path / "chain")


def test_a_damaged_chain_does_not_load(tmp_path):
    chain = Chain(tmp_path)
    chain.add(editor().edit(tiny.records(2), "a"))
    whole = (tmp_path / CHAIN_FILE).read_bytes()
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
            (tmp_path / CHAIN_FILE).write_bytes(damaged)
            with pytest.raises(HorseError, match=CHAIN_FILE):
                Chain(tmp_path)


def test_a_chain_locks_itself(tmp_path):
    """A lock belongs to a thread, so that another thread is as good as another process."""
    delta = editor().edit(tiny.records(2), "a")
    chain = Chain(tmp_path)
    with locked_folder(tmp_path), ThreadPoolExecutor() as others:
        for change in (lambda: chain.add(delta), chain.undo, lambda: chain.save_now([])):
            with pytest.raises(HorseError, match="another process is writing into it"):
                others.submit(change).result()
        chain.add(delta)  # whoever holds the folder goes on
    assert [d.name for d in read_edits(tmp_path)] == ["a"]


def test_a_chain_that_another_process_changed_is_opened_again(tmp_path):
    """Its edits would be made on other weights than this one's, or be lost from the list."""
    e, stale = editor(), Chain(tmp_path)
    Chain(tmp_path).add(e.edit(tiny.records(2), "a"))
    with pytest.raises(HorseError, match="another process has changed the chain"):
        stale.add(e.edit(tiny.records(2), "b"))
    with pytest.raises(HorseError, match="another process has changed the chain"):
        stale.undo()
    with pytest.raises(HorseError, match="another process has changed the chain"):
        stale.save_now([])
    assert [d.name for d in read_edits(tmp_path)] == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", CHAIN_FILE]


@pytest.mark.slow
def test_200_times_edit_evaluate_undo_leave_weights_and_memory_as_they_were():
    e = editor()
    before, records = state(e), tiny.records(2)
    evaluator, process = Evaluator(e.backbone, records), psutil.Process()
    sizes = []
    for i in range(200):
        e.edit(records)
        evaluator.evaluate()
        e.undo()
        if i in (19, 199):
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert sizes[1] < 1.02 * sizes[0]
    assert same(before, state(e)) and not e.history


def test_edit_json_says_when_how_far_and_on_which_weights(tmp_path):
    e = editor()
    was = e.backbone.modules[MODULE].weight.clone()
    delta = e.edit(tiny.records(2), "towns")
    delta.save(tmp_path)
    told = json.loads((tmp_path / "edit.json").read_text())
    assert (told["name"], told["weights"].keys()) == ("towns", e.backbone.modules.keys())
    moved = (e.backbone.modules[MODULE].weight - was).norm() / was.norm()
    assert told["moved"][MODULE] == pytest.approx(moved.item()) and moved > 0


def test_home_is_written_out_before_an_edit_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    delta = editor().edit(tiny.records(2), "a")
    delta.save("~/edit")
    for taken in (lambda: delta.save("~/edit"), lambda: Chain("~/edit")):
        with pytest.raises(UsageError, match="holds a"):
            taken()
    Chain("~/chain").add(delta)
    assert Chain.at("~/chain").in_force == ["a"]
