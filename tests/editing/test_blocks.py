"""An edit in blocks: what an edit at once would write, from sums, and again after a stop."""

import warnings

import pytest
import torch

from horse_plugin import HorseEditor, HorseError, UsageError
from horse_plugin.editing import blocks, crowding
from horse_plugin.editing import editor as editing
from horse_plugin.method.ridge import Ridge
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import capture
from tests import tiny
from tests.fast import fast

SETTINGS = {"edit_sweeps": 4, "normalizer": "scale", "residual_cap": 0.5, "full_loss": 0.7}


def editor(network=None, **changes):
    hparams = tiny.hparams(**SETTINGS | changes)
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    return HorseEditor.from_backbone(backbone, hparams, network)


@pytest.fixture(scope="module")
def network():
    """One whose normaliser, η, λ and cap are set, as an archive's are."""
    one = editor()
    return one.untrained_network(one.capture(tiny.records()))


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("metric", [False, True])
def test_sums_solve_eq_2(n, metric):
    keys, residual = torch.randn(n, 12).double(), torch.randn(n, 7).double()
    root = torch.randn(12, 12).double().triu() + 3 * torch.eye(12) if metric else None
    mu = torch.tensor(0.7)
    gram, right = keys.T @ keys, keys.T @ residual
    found = Ridge.of_sum(gram, n, mu, root)
    assert torch.equal(gram, keys.T @ keys)  # the next sweep may need it
    torch.testing.assert_close(found.shift_of(right), Ridge(keys, mu, root).shift(residual))
    assert found.crowding() == pytest.approx(Ridge(keys, mu, root).crowding())


@pytest.mark.parametrize("too_crowded", [0.35, 10.0])
def test_blocks_write_what_one_block_writes(network, monkeypatch, too_crowded):
    """Without Eq. 6, which is taken block by block, and with keys that are summed in float64."""
    monkeypatch.setattr(crowding, "TOO_CROWDED", too_crowded)
    network.spread, facts = "uniform", tiny.records()
    at_once = editor(network).edit(facts)
    in_blocks = editor(network, edit_block=3).edit(facts)
    whole = editor(network, edit_step=1.0).edit(facts)
    network.spread = "orthogonal"
    for name, shift in at_once.shifts.items():
        torch.testing.assert_close(in_blocks.shifts[name], shift, rtol=1e-3, atol=1e-6)
        assert torch.equal(whole.shifts[name], shift) == (too_crowded < 1)
    assert f"{name}.shift" in in_blocks.tensors


def test_sums_that_cannot_be_solved_name_their_module(network):
    one = editor(network)
    sums = blocks.Sums.none(one.backbone)
    sums.grams[1].fill_(torch.nan)
    second = list(one.backbone.modules)[1]
    with pytest.raises(HorseError, match=f"{second}: the Gram matrix"):
        blocks.solve_sums(one.backbone, network, sums, one.hparams, one.roots)


@pytest.mark.parametrize("stop_at", fast([1, 2, 4, 7], [4]))
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_stopped_edit_goes_on_and_ends_with_the_same_bits(
    network, tmp_path, monkeypatch, stop_at, seconds
):
    """Whether the sums were saved after each block, or at the end of a sweep only."""
    monkeypatch.setattr(blocks, "SECONDS", seconds)
    monkeypatch.setattr(blocks, "BUSY", 0)
    monkeypatch.setattr(crowding, "TOO_CROWDED", 1.5)  # so that the step is one of its own
    whole = editor(network, edit_block=3).edit(tiny.records())
    ran, read = [], blocks.capture

    def counted(*args):
        ran.append(args)
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(blocks, "capture", counted)
    one = editor(network, edit_block=3)
    with pytest.raises(KeyboardInterrupt):
        one.edit(tiny.records(), unfinished=tmp_path)
    assert not one.history
    (kept,) = tmp_path.iterdir()
    done = len(list(kept.iterdir()))
    assert done or stop_at == 1
    n_blocks = -(-len(tiny.records()) // 3)
    stop_at = 0  # from now on, all run
    again = editor(network, edit_block=3).edit(tiny.records(), unfinished=tmp_path)
    assert not list(tmp_path.iterdir())
    for name, tensor in whole.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    if seconds == 0:
        assert len(ran) <= 4 * n_blocks + 1  # none was read twice, but for the one it stopped in


def test_files_of_another_edit_are_not_gone_on_from(network, tmp_path):
    other = tmp_path / f"{blocks.PREFIX}0123"
    other.mkdir()
    (other / blocks.SUMS).write_text("what is this")
    whole = editor(network, edit_block=3).edit(tiny.records())
    found = editor(network, edit_block=3).edit(tiny.records(), unfinished=tmp_path)
    assert not other.exists()
    assert all(torch.equal(found.tensors[n], t) for n, t in whole.tensors.items())


def test_where_an_edit_works_makes_it_no_other_edit(network, tmp_path, monkeypatch):
    """One that memory refused goes on when its keys are kept elsewhere."""
    sums = []

    def stopped(*args):
        sums.append(args)
        raise KeyboardInterrupt

    def began(**changes):
        one = editor(network, edit_block=3, **changes)
        with pytest.raises(KeyboardInterrupt):
            one.edit(tiny.records(), unfinished=tmp_path)
        return sums[-1][-1]

    monkeypatch.setattr(editing, "sums_of_blocks", stopped)
    first = began()
    assert began(offload_keys=True, stats_dir="elsewhere", edit_memory_gb=9.0) == first
    assert began(max_drift=9.0, meta_lr=0.5, trunk_dir=str(tmp_path)) == first
    assert began(edit_ridge=2.0) != first


def test_an_edit_of_another_preserved_text_is_another_one(network, tmp_path, monkeypatch):
    text, sums = tmp_path / "text.txt", []

    def stopped(*args):
        sums.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(editing, "sums_of_blocks", stopped)
    for i in range(2):
        text.write_text("\n".join(tiny.words(i + j, 9) for j in range(12)))
        settings = {"preserve": str(text), "stats_dir": str(tmp_path / "stats")}
        with pytest.raises(KeyboardInterrupt):
            editor(network, edit_block=3, **settings).edit(tiny.records(), unfinished=tmp_path)
    assert sums[0][-1] != sums[1][-1]


def test_a_block_whose_file_is_gone_ends_the_edit(network, tmp_path, monkeypatch):
    """What its earlier sweeps wrote would be missing, without a word."""
    ran, read = [], blocks.capture

    def losing(*args):
        ran.append(args)
        if len(ran) == 2 * -(-len(tiny.records()) // 3):  # in the second sweep
            next(tmp_path.rglob("block-000000.safetensors")).unlink()
        return read(*args)

    monkeypatch.setattr(blocks, "capture", losing)
    with pytest.raises(HorseError, match=r"block-000000.*is gone.*Remove"):
        editor(network, edit_block=3).edit(tiny.records(), unfinished=tmp_path)


def test_files_of_a_stopped_edit_go_when_a_small_one_is_made(network, tmp_path):
    other = tmp_path / f"{blocks.PREFIX}0123"
    other.mkdir()
    editor(network).edit(tiny.records(), unfinished=tmp_path)
    assert not other.exists()


def test_facts_in_force_are_part_of_the_sums(network):
    """A later edit in blocks leaves an earlier one alone, as one at once does."""
    facts = tiny.records()
    results = {}
    for name, size in (("at once", 8192), ("in blocks", 3)):
        one = editor(network, edit_block=size)
        one.edit(facts[:3])
        one.edit(facts[3:])
        prompts = one.backbone.prepare(facts[:3], ["edit"]).to_capture()
        losses = capture(one.backbone, prompts).losses
        results[name] = losses.mean().item()
    assert results["in blocks"] == pytest.approx(results["at once"], rel=0.2)


def test_a_budget_is_kept_by_an_edit_in_blocks():
    def budget(most):
        with warnings.catch_warnings(action="ignore"):
            one = editor(edit_block=3, max_drift=most, strength=30.0, residual_cap=None)
            return one.edit(tiny.records()).about["budget"]

    free = budget(1e3)
    bound = budget(free["drift"] / 4)
    assert 0 < bound["drift"] <= free["drift"] / 4
    assert bound["edit_ridge"] > free["edit_ridge"] == 1.0


def test_several_processes_edit_at_once(network, monkeypatch):
    monkeypatch.setattr("horse_plugin.distributed.world_size", lambda: 2)
    with pytest.raises(UsageError, match=r"edit_block: several processes edit \d+ prompts"):
        editor(network, edit_block=3).edit(tiny.records())
