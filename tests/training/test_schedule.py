"""The records of each training step: each once an epoch, in steps of one size or of several."""

import math

import pytest

from horse_plugin.errors import UsageError
from horse_plugin.training.schedule import Schedule, described
from tests import tiny


def schedule(n_records, **settings):
    return Schedule(tiny.hparams(**settings), n_records)


def test_an_epoch_has_each_record_once_and_leaves_what_is_no_whole_step():
    steps = schedule(13, edits_per_step=4, max_epochs=3)
    assert [(s.epoch, s.size) for s in steps.steps] == [(e, 4) for e in range(3) for _ in range(3)]
    for epoch in range(3):
        read = [i for k in range(3) for i in steps.indices(3 * epoch + k)]
        assert len(set(read)) == 12 and set(read) < set(range(13))
    assert steps.indices(0) != steps.indices(3)
    assert [steps.epoch(i) for i in (0, 2, 3, 8, 9)] == [0, 0, 1, 2, 2]


def test_more_epochs_begin_with_the_steps_of_fewer_and_max_iters_ends_them():
    settings = {"edits_per_step": 20, "min_edits_per_step": 3}
    long, short = (schedule(50, max_epochs=n, **settings).steps for n in (7, 3))
    assert long[: len(short)] == short
    assert schedule(50, max_epochs=7, max_iters=4, **settings).steps == long[:4]


def test_drawn_sizes_fill_each_epoch_between_their_bounds():
    steps = schedule(1000, edits_per_step=100, min_edits_per_step=5, max_epochs=4)
    for epoch in range(4):
        of_epoch = [i for i, s in enumerate(steps.steps) if s.epoch == epoch]
        read = [i for step in of_epoch for i in steps.indices(step)]
        assert len(read) == len(set(read)) > 1000 - 5
        assert all(5 <= steps.steps[i].size <= 100 for i in of_epoch)


def test_sizes_are_log_uniform():
    """As many sizes from 10 to 100 as from 100 to 1,000: within four deviations of a half."""
    settings = {"edits_per_step": 1000, "min_edits_per_step": 10, "max_epochs": 20}
    sizes = [s.size for s in schedule(20_000, **settings).steps]
    small = sum(size < 100 for size in sizes) / len(sizes)
    assert abs(small - 0.5) < 4 * 0.5 / math.sqrt(len(sizes))


def test_sizes_depend_on_the_seed_alone():
    settings = {"edits_per_step": 50, "min_edits_per_step": 2, "max_epochs": 9}
    sizes = [[s.size for s in schedule(99, seed=seed, **settings).steps] for seed in (0, 0, 1)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_the_first_step_is_the_largest():
    """It shows whether memory is enough, and its records set the network's scales."""
    assert all(
        schedule(99, edits_per_step=50, min_edits_per_step=2, seed=seed).steps[0].size == 50
        for seed in range(9)
    )


def test_used_are_the_records_of_the_first_steps_or_all_of_an_epoch():
    steps = schedule(13, edits_per_step=4, max_epochs=2)
    assert list(steps.used(2)) == steps.indices(0) + steps.indices(1)
    assert list(steps.used(3)) == list(steps.used(4)) == list(range(13))
    for seed in range(9):
        steps = schedule(40, edits_per_step=9, min_edits_per_step=2, max_epochs=2, seed=seed)
        for n in range(1, len(steps) + 1):
            assert set(steps.used(n)) >= {i for step in range(n) for i in steps.indices(step)}


def test_a_run_says_how_many_steps_of_how_many_records():
    settings = {"edits_per_step": 1000, "min_edits_per_step": 20}
    assert described(40, settings) == "40 steps of 20 to 1,000 records"
    assert described(40, {"edits_per_step": 125}) == "40 steps of 125 records"
    assert described(1, {"edits_per_step": 1}) == "1 step of 1 record"


def test_the_smallest_step_is_no_larger_than_the_largest():
    with pytest.raises(
        UsageError, match="min_edits_per_step: must be at most edits_per_step, 4, got 5"
    ):
        tiny.hparams(edits_per_step=4, min_edits_per_step=5)
