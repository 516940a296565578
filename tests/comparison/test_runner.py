"""The comparison on a tiny model: every cell once, from the same weights, into honest tables."""

import contextlib
import copy
import itertools
import json
import shutil
import sys
import types
from dataclasses import replace

import pytest
import torch

from horse_plugin import Evaluator, HorseEditor, HorseError, HORSEHyperParams, UsageError
from horse_plugin.comparison import experiments, methods, runner
from horse_plugin.comparison.experiments import ablate
from horse_plugin.comparison.methods import ABLATIONS, METHODS, Engine
from horse_plugin.comparison.output import write_output
from horse_plugin.comparison.plan import DataSet, Plan
from horse_plugin.comparison.tables import drawn_in, pages, retention, retention_table
from horse_plugin.comparison.task import Edited, Task
from horse_plugin.data.seam import PLAIN
from horse_plugin.editing.archive import ARCHIVE, read_network
from horse_plugin.evaluation import charts
from horse_plugin.evaluation.drift import OrdinaryText, heldout_pieces
from horse_plugin.evaluation.probability import success_and_magnitude
from horse_plugin.method.spread import SPREADS
from horse_plugin.model.backbone import Backbone
from tests import ROOT, tiny
from tests.fast import fast


@pytest.fixture(scope="module")
def yamls(tmp_path_factory):
    """A tiny model on disk and its YAML for HORSE and for MALMEN."""
    path = tmp_path_factory.mktemp("compare")
    model = path / "llama-tiny"
    tiny.model().save_pretrained(model)
    tiny.bpe_tokenizer().save_pretrained(model)
    settings = {"model_name": str(model), "dtype": "fp32", "device": "cpu", "rank": 4}
    settings |= {"edits_per_step": 6, "max_epochs": 2, "val_interval": 2}
    settings |= {"preserve_tokens": 256, "stats_dir": str(path / "stats")}
    for name in ("HORSE", "MALMEN"):
        (path / name).mkdir()
        (path / name / "tiny.yaml").write_text(json.dumps(settings | {"alg_name": name}))
    return path


@pytest.fixture
def plan(yamls, tmp_path):
    def make(table, n_edits=(4,), seeds=(0,), out=tmp_path / "out", batch=None):
        facts = tiny.records(18)
        data = [DataSet("facts", facts[:6], facts[6:12], facts[12:])]
        models = {"tiny": yamls / "HORSE/tiny.yaml"}
        return Plan(table, models, data, n_edits, yamls, out, seeds, batch=batch)

    return make


def test_rows_that_could_not_be_told_apart_are_refused(plan, yamls):
    asked = plan({"unedited": methods.Unedited()})
    (data,) = asked.datasets
    with pytest.raises(UsageError, match="facts: two data sets have this name"):
        replace(asked, datasets=[data, replace(data, records=data.records[::-1])])
    twice = replace(asked, models={"one": yamls / "HORSE/tiny.yaml", "two": yamls / "HORSE/tiny"})
    with pytest.raises(UsageError, match="models: two YAMLs name "):
        runner.run(twice, progress=False)
    for nothing in ("seeds", "n_edits"):
        with pytest.raises(UsageError, match=f"{nothing}: there is none"):
            replace(asked, **{nothing: ()})


class Broken(methods.Unedited):
    def __call__(self, task):
        raise RuntimeError("no such luck\nsecond line")
        yield


class Counted(methods.Unedited):
    """Does nothing, and remembers the weights and records that it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, task):
        self.seen.append((runner.weights_digest(task.backbone), task.records))
        for _ in task.batches:
            yield Edited(task.backbone, 1.5)


def test_every_cell_is_measured_once_and_kept_as_soon_as_it_is_there(plan, tmp_path):
    counted = Counted()
    first = plan({"unedited": counted, "HORSE": Engine()}, (2, 4))
    rows = runner.run(first, progress=False)
    assert [(r["method"], r["n_edits"]) for r in rows] == [
        ("unedited", 2),
        ("HORSE", 2),
        ("unedited", 4),
        ("HORSE", 4),
    ]
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert kept == rows
    assert len(counted.seen) == 2
    again = plan({"unedited": counted, "HORSE": Engine()}, (2, 4))
    assert runner.run(again, progress=False) == rows
    assert len(counted.seen) == 2  # nothing was measured a second time
    more = plan({"unedited": counted, "HORSE": Engine(changes={"strength": 0.3})}, (2, 6))
    rows = runner.run(more, progress=False)
    assert len(counted.seen) == 3  # the new number of edits only
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert len(kept) == 6  # cells of other plans stay; other settings replaced HORSE's at 2
    assert [r for r in kept if (r["method"], r["n_edits"]) == ("HORSE", 2)] == [rows[1]]


def test_probabilities_are_those_of_the_edited_model_and_measured_if_a_row_lacks_them(plan):
    counted = Counted()
    (row,) = runner.run(plan({"unedited": counted}), progress=False)
    assert "probabilities" not in row
    asked = replace(plan({"unedited": counted}), probabilities=True)
    (row,) = runner.run(asked, progress=False)
    backbone = HorseEditor.from_hparams(str(asked.models["tiny"])).backbone
    records = asked.datasets[0].records[:4]
    Evaluator(backbone, records)  # which keeps trunk states, as in a comparison: to the same bits
    assert row["probabilities"] == success_and_magnitude(backbone, records)
    assert runner.run(asked, progress=False) == [row]
    assert len(counted.seen) == 2  # the third run measured nothing


def test_records_that_the_model_cannot_read_are_refused_before_the_first_cell(plan):
    counted = Counted()
    asked = plan({"unedited": counted})
    (data,) = asked.datasets
    bad = replace(data.records[1], target_new="no " * 5000)
    asked.datasets = [data, DataSet("bad", [data.records[0], bad, *data.records[2:4]])]
    with pytest.raises(UsageError, match=r"^bad: record 1: answer .*longer than max_length"):
        runner.run(asked, progress=False)
    assert counted.seen == []


@pytest.mark.slow
def test_a_comparison_that_is_stopped_leaves_tables_of_what_was_measured(
    yamls, tmp_path, monkeypatch
):
    monkeypatch.setitem(METHODS, "FT", Stops(0))
    asked = ["unedited", "FT"], ["tiny"], [DataSet("facts", tiny.records(4))], (4,)
    with pytest.raises(KeyboardInterrupt):
        experiments.compare(tmp_path / "out", *asked, hparams_dir=yamls)
    assert "| unedited |" in (tmp_path / "out/table.md").read_text()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        experiments.compare(tmp_path / "out", ["FT"], *asked[1:], hparams_dir=yamls)
    assert not list((tmp_path / "out").iterdir())  # there is nothing to show


def test_probabilities_that_cannot_be_had_are_asked_for_once(plan):
    counted = Counted()
    asked = replace(plan({"unedited": counted}), probabilities=True)
    facts = [replace(r, ground_truth=None, unrelated=()) for r in asked.datasets[0].records]
    asked.datasets = [DataSet("facts", facts)]
    (row,) = runner.run(asked, progress=False)
    assert row["probabilities"] == {}
    assert runner.run(asked, progress=False) == [row]
    assert len(counted.seen) == 1


def test_a_check_is_made_of_rows_that_are_there_and_what_they_had_stays(plan, monkeypatch):
    def both(backbone, hparams, records, ours):
        return {"records": len(records), "ours": {}, "easyedit": {}}

    name = "horse_plugin.comparison.baselines.check"  # which imports EasyEdit
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(both=both))
    counted = Counted()

    def measured(**more):
        (row,) = runner.run(replace(plan({"unedited": counted}), **more), progress=False)
        return (row.get("check") or {}).get("records"), bool(row.get("probabilities"))

    assert measured(probabilities=True) == (None, True)
    assert measured(check=2) == (2, True)
    assert measured(check=1) == measured() == measured(probabilities=True) == (2, True)
    assert len(counted.seen) == 2
    assert measured(check=20) == measured(check=30) == (4, True)  # of 4 records
    assert len(counted.seen) == 3


def test_what_was_measured_before_a_stop_is_there_after_it(plan, tmp_path, monkeypatch):
    class Stop(methods.Unedited):
        def __call__(self, task):
            raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        runner.run(plan({"unedited": Counted(), "other": Stop()}), progress=False)
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["method"] == "unedited"


@pytest.mark.slow
def test_every_method_starts_from_the_same_weights_and_records(plan):
    before, after = Counted(), Counted()
    table = {"before": before, "HORSE": Engine(), "MALMEN": Engine("MALMEN"), "after": after}
    rows = runner.run(plan(table), progress=False)
    assert before.seen == after.seen
    assert rows[0]["locality"] == rows[-1]["locality"] == 100.0
    assert rows[1]["budget"] == rows[2]["budget"] == "2 steps of 6 records from 6"
    assert rows[1]["train_seconds"] > 0
    assert rows[1]["edit_seconds"] > 0


def test_batches_are_edited_one_on_top_of_the_other_and_measured_after_each(plan, tmp_path):
    """The last state is that of an editor which made the same edits, and the model comes back."""
    engine = Engine(trained=False, changes={"strength": 300.0})
    rows = runner.run(plan({"unedited": Counted(), "HORSE": engine}, (5,), batch=2), progress=False)
    unedited, row = rows
    assert [len(b["efficacy"]) for b in row["batches"]] == [1, 2, 3]
    assert all(b["drift"] == 0 for b in unedited["batches"])
    drifts = [b["drift"] for b in row["batches"]]
    assert 0 < drifts[0] < drifts[-1] == row["drift"]
    sizes = (2, 2, 1)
    of_all = sum(n * e for n, e in zip(sizes, row["batches"][-1]["efficacy"], strict=True)) / 5
    assert of_all == pytest.approx(row["efficacy"])

    one = plan({})
    hparams = HORSEHyperParams.from_hparams(one.models["tiny"])
    editor = HorseEditor.from_hparams(replace(hparams, strength=300.0, archive=None))
    text = OrdinaryText(editor.backbone, heldout_pieces())
    facts = one.datasets[0].records
    for batch in (facts[:2], facts[2:4], facts[4:5]):
        editor.edit(batch)
    assert text.measure().summary()["drift"] == pytest.approx(row["drift"], rel=1e-3)

    # Edits at once stand in the same folder, and a second run measures neither again.
    both = runner.run(plan({"HORSE": engine}, (5,)), progress=False)
    assert "batches" not in both[0]
    assert runner.run(plan({"HORSE": engine}, (5,), batch=2), progress=False) == [row]
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 3


class Stops(methods.Unedited):
    """Does nothing, and stops after some of its batches."""

    def __init__(self, after, error=KeyboardInterrupt, settings=None):
        self.after, self.error, self.about = after, error, settings or {}

    def settings(self, task):
        return self.about

    def __call__(self, task):
        yield from itertools.islice(super().__call__(task), self.after)
        raise self.error("the power went")


@pytest.mark.slow
@pytest.mark.parametrize("error", fast([KeyboardInterrupt, RuntimeError], [KeyboardInterrupt]))
def test_a_method_that_stops_between_batches_leaves_what_was_measured(plan, tmp_path, error):
    table = {"unedited": methods.Unedited(), "FT": Stops(2, error)}
    with contextlib.suppress(KeyboardInterrupt):
        runner.run(plan(table, (5,), batch=2), progress=False)
    whole, stopped = runner.held_rows(tmp_path / "out")
    killed = error is KeyboardInterrupt
    reason = "stopped after batch 2 of 3" if killed else "RuntimeError: the power went"
    assert (stopped["reason"], stopped["efficacy"]) == (reason, None)
    assert stopped["batches"] == whole["batches"][:2]

    write_output(tmp_path / "out", [whole, stopped])
    page = pages([whole])[0]
    alone = retention([stopped], page)["facts"]
    assert drawn_in(alone, charts.RETENTION) == ["so far", "drift"]
    write_output(tmp_path / "alone", [stopped])
    drawn = retention([whole, stopped], page)["facts"]
    assert [len(drawn[m]["drift"]) for m in table] == [3, 2]
    assert [len(drawn[m]["by age"]) for m in table] == [3, 0]
    lines = {line[0]: line[1:] for line in retention_table([whole, stopped], page).lines}
    assert "–" not in lines["unedited"] and set(lines["FT"]) == {"–"}

    table["FT"] = methods.Unedited()
    *_, again = runner.run(plan(table, (5,), batch=2), progress=False)
    assert "reason" not in again and again["batches"] == whole["batches"]


@pytest.mark.slow
def test_less_of_the_same_does_not_take_the_place_of_what_is_kept(plan, tmp_path):
    def held_after(method):
        with contextlib.suppress(KeyboardInterrupt):
            runner.run(plan({"FT": method}, (5,), batch=2), progress=False)
        (row,) = runner.held_rows(tmp_path / "out")
        return len(row.get("batches", ())), row.get("reason")

    def killed(*args):
        raise KeyboardInterrupt

    assert held_after(Stops(1)) == (1, "stopped after batch 1 of 3")
    assert held_after(Stops(2)) == (2, "stopped after batch 2 of 3")
    assert held_after(Stops(1)) == (2, "stopped after batch 2 of 3")
    assert held_after(Stops(0, RuntimeError)) == (2, "stopped after batch 2 of 3")
    assert held_after(Stops(1, settings={"lr": 1})) == (1, "stopped after batch 1 of 3")
    assert held_after(methods.Unedited()) == (3, None)
    assert held_after(Stops(2, settings={"lr": 2})) == (3, None)  # until it is done, or fails
    assert held_after(Stops(2, RuntimeError, {"lr": 2})) == (2, "RuntimeError: the power went")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Evaluator, "evaluate", killed)
        assert held_after(methods.Unedited()) == (3, "stopped after the last batch")


def test_a_row_that_cannot_be_kept_is_no_fault_of_the_method(plan, monkeypatch):
    def full(*args):
        raise HorseError("no space left on the disk")

    monkeypatch.setattr(runner.results, "save", full)
    with pytest.raises(HorseError, match="no space left"):
        runner.run(plan({"unedited": methods.Unedited()}, (5,), batch=2), progress=False)


@pytest.mark.slow
def test_a_model_that_an_edit_wrecked_leaves_a_row_that_can_be_read(plan, tmp_path):
    class Wrecks(methods.Unedited):
        def __call__(self, task):
            for _ in task.batches:
                broken = copy.deepcopy(task.backbone.model)
                next(iter(broken.parameters())).data.fill_(torch.nan)
                yield Edited(Backbone.of(broken, task.backbone.tokenizer, task.hparams))

    runner.run(plan({"FT": Wrecks()}, (5,), batch=2), progress=False)
    (row,) = runner.held_rows(tmp_path / "out")
    assert [b["drift"] for b in row["batches"]] == [None] * 3 and row["drift"] is None
    write_output(tmp_path / "out", [row])


def test_seeds_that_stopped_count_as_far_as_they_came():
    about = {"model": "tiny", "n_edits": 4, "batch": 1, "dataset": "facts", "method": "FT"}

    def row(n, efficacy, **more):
        batches = [{"efficacy": [efficacy] * i, "drift": efficacy} for i in range(1, n + 1)]
        return about | {"batches": batches} | more

    rows = [row(4, 10.0), row(2, 90.0, reason="stopped after batch 2 of 4")]
    found = retention(rows, pages(rows)[0])["facts"]["FT"]
    assert found == {"by age": [10.0] * 4, "so far": [50, 50, 10, 10], "drift": [50, 50, 10, 10]}


def test_a_method_that_leaves_the_model_changed_is_named(plan):
    class Careless(methods.Unedited):
        def __call__(self, task):
            next(iter(task.backbone.modules.values())).weight[0, 0] += 1e-3
            yield Edited(task.backbone)

    with pytest.raises(HorseError, match="careless: the model's weights are not"):
        runner.run(plan({"careless": Careless()}), progress=False)


@pytest.mark.slow
def test_a_method_that_fails_keeps_its_row_and_is_tried_again(plan, tmp_path):
    table = {"unedited": Counted(), "broken": Broken(), "HORSE": Engine()}
    _, row, horse = runner.run(plan(table), progress=False)
    assert row["reason"] == "RuntimeError: no such luck"
    assert (row["efficacy"], row["edit_seconds"], row["n_edits"]) == (None, None, 4)
    assert horse["efficacy"] is not None
    write_output(tmp_path / "out", [row, horse])
    for name in ("table.md", "table.tex", "report.html"):
        assert "no such luck" in (tmp_path / "out" / name).read_text()
    rows = runner.run(plan({"broken": Counted()}), progress=False)
    assert "reason" not in rows[0]
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 3


def test_a_method_without_a_yaml_says_so(plan):
    (row,) = runner.run(plan({"FT": METHODS["FT"]}), progress=False)
    assert "no such hparams file, so FT cannot run" in row["reason"]


def test_a_method_whose_yaml_is_gone_takes_the_place_of_no_figures(plan, yamls, tmp_path):
    folder = tmp_path / "yamls"
    shutil.copytree(yamls, folder)
    asked = replace(plan({"MALMEN": Engine("MALMEN", trained=False)}), hparams_dir=folder)
    (measured,) = runner.run(asked, progress=False)
    (folder / "MALMEN/tiny.yaml").unlink()
    (row,) = runner.run(asked, progress=False)
    assert "no such hparams file, so MALMEN cannot run" in row["reason"]
    assert runner.held_rows(tmp_path / "out") == [measured]


def test_a_method_edits_the_model_as_it_is_measured_whatever_its_own_yaml_says(plan):
    asked = plan({})
    hparams = HORSEHyperParams.from_hparams(asked.models["tiny"])
    hparams = replace(hparams, separator=" → ", append_eos=True)
    backbone = HorseEditor.from_hparams(hparams).backbone
    data = asked.datasets[0]
    facts = data.records, data.train, data.val
    task = Task("tiny", data.name, backbone, hparams, *facts, asked.hparams_dir, asked.out)
    malmen = Engine("MALMEN", trained=False, changes={"max_length": 60})  # of another backbone
    with contextlib.closing(malmen(task)) as states:
        assert next(states).backbone.seam == backbone.seam != PLAIN


def test_a_comment_in_a_yaml_is_no_other_setting_but_a_key_is(plan, yamls):
    one = plan({})
    data = one.datasets[0]
    hparams = HORSEHyperParams.from_hparams(one.models["tiny"])
    folders = one.hparams_dir, one.out
    task = Task("tiny", data.name, None, hparams, data.records, data.train, data.val, *folders)
    (yamls / "FT").mkdir()

    def settings(text):
        (yamls / "FT/tiny.yaml").write_text(text)
        return METHODS["FT"].settings(task)

    try:
        assert settings("lr: 1e-3") == settings("# chosen\nlr: 1e-3") != settings("lr: 1e-2")
        with pytest.raises(UsageError, match="not a readable YAML file"):
            settings("lr: [")
    finally:
        shutil.rmtree(yamls / "FT")


@pytest.mark.slow
def test_an_archive_serves_all_numbers_of_edits_and_only_its_seed(plan, tmp_path):
    runner.run(plan({"HORSE": Engine()}, (2, 4), seeds=(0, 1)), progress=False)
    assert len(list((tmp_path / "out/archives").iterdir())) == 2


@pytest.mark.slow
def test_seeds_do_not_repeat_what_they_do_not_change(plan):
    table = {"unedited": METHODS["unedited"], "HORSE": Engine(trained=False)}
    rows = runner.run(plan(table, seeds=(0, 1, 2)), progress=False)
    assert [r["method"] for r in rows] == ["unedited", "HORSE", "HORSE", "HORSE"]


@pytest.mark.slow
def test_other_seeds_do_not_measure_again_what_they_do_not_change(plan, tmp_path):
    counted = Counted()
    (row,) = runner.run(plan({"unedited": counted}), progress=False)
    asked = plan({"unedited": counted}, seeds=(1, 2))
    assert runner.run(asked, progress=False) == [row]
    assert len(counted.seen) == 1
    results = tmp_path / "out/results.json"
    results.write_text(json.dumps([row, row | {"seed": 1}]))  # as earlier releases left them
    asked.datasets[0].records = asked.datasets[0].records[::-1]
    again = runner.run(asked, progress=False)
    assert len(counted.seen) == 2 and json.loads(results.read_text()) == again


def test_records_that_are_no_file_are_a_data_set_by_a_name():
    data = DataSet.load(tiny.records(3), tiny.records(2), name="mine")
    assert (data.name, len(data.records), len(data.train), data.val) == ("mine", 3, 2, ())
    with pytest.raises(UsageError, match="name: records that are no file need one"):
        DataSet.load(tiny.records(3))


def test_more_edits_than_records_are_refused_before_anything_runs(plan):
    with pytest.raises(UsageError, match="facts: 7 edits asked for"):
        plan({}, (7,))


@pytest.mark.slow
def test_the_tables_are_of_all_that_was_measured_into_a_folder(yamls, tmp_path):
    facts = tiny.records(18)
    data = [DataSet("facts", facts[:6], facts[6:12], facts[12:])]

    def measured(*names, seeds=(0,)):
        experiments.compare(tmp_path, names, ["tiny"], data, (4,), seeds, hparams_dir=yamls)
        lines = (tmp_path / "table.md").read_text().splitlines()
        figures = lines[: lines.index("", 3)]  # the first table, before that of times
        return [line.split(" | ")[0].strip("| ") for line in figures if line.startswith("| ")][2:]

    assert measured("HORSE, untrained") == ["HORSE, untrained"]
    assert measured("unedited") == ["unedited", "HORSE, untrained"]
    measured("HORSE, untrained", seeds=(0, 1))
    assert "over 2 seeds" in (tmp_path / "table.md").read_text()


def test_a_quick_comparison_trains_every_method_as_briefly(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_measured", lambda plan: plan)
    plan = experiments.compare(tmp_path, ["MEND", "MALMEN", "HORSE"], quick=True)
    ((model, yaml),) = plan.models.items()
    (data,) = plan.datasets
    facts = data.records, data.train, data.val
    hparams = HORSEHyperParams.from_hparams(yaml)
    task = Task(model, data.name, None, hparams, *facts, plan.hparams_dir, tmp_path)
    mend, *ours = (method.settings(task) for method in plan.methods.values())
    budgets = [[about["n_edits"], about["max_epochs"], about["max_iters"]] for about in ours]
    assert budgets == 2 * [mend["steps"]]
    assert mend["steps"] != [hparams.edits_per_step, hparams.max_epochs, hparams.max_iters]


def test_names_of_methods_are_checked():
    assert list(methods.choose(["horse", "FT"], METHODS)) == ["FT", "HORSE"]
    pieces = ["horse", "untrained", "horse", "ft"]  # as a comma-separated list comes
    assert list(methods.choose(pieces, METHODS)) == ["FT", "HORSE, untrained", "HORSE"]
    for name in methods.ABLATIONS:
        assert list(methods.choose(name.split(", "), methods.ABLATIONS)) == [name]
    with pytest.raises(UsageError, match="'GPT' is not one of unedited; FT"):
        methods.choose(["GPT"], METHODS)


# ablate


@pytest.mark.slow
def test_ablations_each_change_what_they_say(yamls, tmp_path):
    file = tmp_path / "HORSE" / "tiny.yaml"
    file.parent.mkdir()
    settings = {"token": "subject", "edit_sweeps": 2, "normalizer": "scale", "residual_cap": 1}
    settings["keep_next"] = True
    file.write_text(json.dumps(json.loads((yamls / "HORSE/tiny.yaml").read_text()) | settings))
    (tmp_path / "MALMEN").symlink_to(yamls / "MALMEN")
    facts = tiny.records(18)
    data = [DataSet("facts", facts[:6], facts[6:12], facts[12:])]
    rows = ablate(tmp_path, file, data, (6,))
    assert [r["method"] for r in rows] == ["unedited", *ABLATIONS]
    assert not [r["reason"] for r in rows if r.get("reason")]

    found = [read_network(f) for f in (tmp_path / "archives").iterdir()]
    networks = [network for network, *_ in found]
    # Not the untrained one, nor the two whose change is what the tiny YAML says anyway.
    assert len(networks) == len(ABLATIONS) - 3
    preserved = [preserve for _, preserve, _ in found]
    assert sum(p is None for p in preserved) == 2  # one of them the paper as printed
    assert sum(p.rho == 1 for p in preserved if p) == 1
    assert sum(not p.unrelated for p in preserved if p) == 1
    assert sum(about["hparams"]["keep_coef"] == 0 for *_, about in found) == 4
    assert sum(n.lamda.abs().max().item() == 0 for n in networks) == 1  # λ fixed
    assert sorted(n.coefficient for n in networks)[:2] == ["edit_only", "none"]
    assert {n.spread for n in networks} == set(SPREADS)
    changed = [about["hparams"] for *_, about in found]
    for key, own in settings.items():  # printed, one row, and MALMEN
        assert sum(hp[key] != own for hp in changed) == 3, key


def test_malmen_is_trained_on_as_many_records_in_no_fewer_steps_than_horse():
    folder = ROOT / "hparams"
    ours, theirs = (
        HORSEHyperParams.from_hparams(folder / method / "llama-smollm2-135m.yaml").to_dict()
        for method in ("HORSE", "MALMEN")
    )
    differing = {key for key in ours if ours[key] != theirs[key]}
    methods_own = {"alg_name", "spread", "spread_strength", "ridge"}
    methods_own |= {"preserve", "preserve_mix", "val_score", "edit_ridge", "strength", "normalizer"}
    methods_own |= {"token", "edit_sweeps", "train_sweeps", "residual_cap", "keep_next"}
    methods_own |= {"full_loss", "keep_edits", "archive"}
    losses_own = {"loc_coef", "edit_coef", "gen_coef", "keep_coef", "meta_lr"}
    assert differing == methods_own | losses_own
    assert theirs["max_iters"] >= ours["max_iters"]


def test_what_is_in_an_archive_or_in_a_text_is_a_setting(plan, tmp_path):
    asked = plan({})
    text, archive = tmp_path / "text.txt", tmp_path / ARCHIVE

    def settings(engine, **changes):
        hparams = HORSEHyperParams.from_hparams(asked.models["tiny"])
        task = Task("tiny", "facts", None, replace(hparams, **changes), [], [], [], tmp_path, ROOT)
        return engine.settings(task)

    preserved, trained = [], []
    for content in ("one", "two", "two"):
        text.write_text(content)
        archive.write_text(content)
        preserved.append(settings(Engine(), preserve=str(text))["preserve"])
        trained.append(settings(Engine(archive=str(tmp_path)))["trained"])
    for first, second, third in (preserved, trained):
        assert first != second == third
    for source in ("shipped", "model", "owner/name:configuration"):
        assert settings(Engine(), preserve=source)["preserve"] == source
    assert settings(Engine(archive="owner/name"))["trained"] == "owner/name"


def test_rows_and_archives_of_0_1_stay_held():
    """What the settings are called may change, the digest that a row is held by may not."""
    yaml = ROOT / "hparams/HORSE/llama-smollm2-135m.yaml"
    hparams = HORSEHyperParams.from_hparams(yaml)
    task = Task("llama-smollm2-135m", "facts", None, hparams, [], [], [], ROOT / "hparams", ROOT)
    settings = Engine(trained=False).settings(task)
    assert settings["n_edits"] == 125 and "edits_per_step" not in settings
    assert settings["val_steps"] is None and "val_records" not in settings
