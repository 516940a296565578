"""The comparison on a tiny model: every cell once, from the same weights, into honest tables."""

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from horse_plugin import HorseError, HORSEHyperParams, UsageError
from horse_plugin import comparison as compare
from horse_plugin.comparison import METHODS, DataSet, Plan, methods, output, runner, tables
from horse_plugin.comparison.baselines import stats
from horse_plugin.comparison.methods import Engine
from horse_plugin.comparison.task import Edited, Task
from horse_plugin.editing.editor import new_network
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.capture import trace
from horse_plugin.training.objective import backward


@pytest.fixture(scope="module")
def yamls(tmp_path_factory):
    """A tiny model on disk and its YAML for HORSE and for MALMEN."""
    path = tmp_path_factory.mktemp("compare")
    model = path / "llama-tiny"
    tiny.model().save_pretrained(model)
    tiny.bpe_tokenizer().save_pretrained(model)
    settings = {"model_name": str(model), "dtype": "fp32", "device": "cpu", "rank": 4}
    settings |= {"n_edits": 6, "max_epochs": 2, "val_interval": 2}
    for name in ("HORSE", "MALMEN"):
        (path / name).mkdir()
        (path / name / "tiny.yaml").write_text(json.dumps(settings | {"alg_name": name}))
    return path


@pytest.fixture
def plan(yamls, tmp_path):
    def make(table, n_edits=(4,), seeds=(0,), out=tmp_path / "out"):
        facts = tiny.records(18)
        data = [DataSet("facts", facts[:6], facts[6:12], facts[12:])]
        return Plan(table, {"tiny": yamls / "HORSE/tiny.yaml"}, data, n_edits, yamls, out, seeds)

    return make


class Broken(methods.Unedited):
    @contextlib.contextmanager
    def __call__(self, task):
        raise RuntimeError("no such luck\nsecond line")
        yield


class Counted(methods.Unedited):
    """Does nothing, and remembers the weights and records that it was given."""

    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def __call__(self, task):
        self.seen.append((runner.weights_digest(task.backbone), task.records))
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


def test_what_was_measured_before_a_stop_is_there_after_it(plan, tmp_path, monkeypatch):
    class Stop(methods.Unedited):
        @contextlib.contextmanager
        def __call__(self, task):
            raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        runner.run(plan({"unedited": Counted(), "other": Stop()}), progress=False)
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["method"] == "unedited"


def test_every_method_starts_from_the_same_weights_and_records(plan):
    before, after = Counted(), Counted()
    table = {"before": before, "HORSE": Engine(), "MALMEN": Engine("MALMEN"), "after": after}
    rows = runner.run(plan(table), progress=False)
    assert before.seen == after.seen
    assert rows[0]["locality"] == rows[-1]["locality"] == 100.0
    assert rows[1]["budget"] == rows[2]["budget"] == "2 steps of 6 records from 6"
    assert rows[1]["train_seconds"] > 0
    assert rows[1]["edit_seconds"] > 0


def test_a_method_that_leaves_the_model_changed_is_named(plan):
    class Careless(methods.Unedited):
        @contextlib.contextmanager
        def __call__(self, task):
            next(iter(task.backbone.modules.values())).weight[0, 0] += 1e-3
            yield Edited(task.backbone)

    with pytest.raises(HorseError, match="careless: the model's weights are not"):
        runner.run(plan({"careless": Careless()}), progress=False)


def test_a_method_that_fails_keeps_its_row_and_is_tried_again(plan, tmp_path):
    table = {"unedited": Counted(), "broken": Broken(), "HORSE": Engine()}
    _, row, horse = runner.run(plan(table), progress=False)
    assert row["reason"] == "RuntimeError: no such luck"
    assert (row["efficacy"], row["edit_seconds"], row["n_edits"]) == (None, None, 4)
    assert horse["efficacy"] is not None
    output.write(tmp_path / "out", [row, horse])
    for name in ("table.md", "table.tex", "report.html"):
        assert "no such luck" in (tmp_path / "out" / name).read_text()
    rows = runner.run(plan({"broken": Counted()}), progress=False)
    assert "reason" not in rows[0]
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 3


def test_a_method_without_a_yaml_says_so(plan):
    (row,) = runner.run(plan({"FT": METHODS["FT"]}), progress=False)
    assert "no such hparams file, so FT cannot run" in row["reason"]


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


def test_an_archive_serves_all_numbers_of_edits_and_only_its_seed(plan, tmp_path):
    runner.run(plan({"HORSE": Engine()}, (2, 4), seeds=(0, 1)), progress=False)
    assert len(list((tmp_path / "out/archives").iterdir())) == 2


def test_seeds_do_not_repeat_what_they_do_not_change(plan):
    table = {"unedited": METHODS["unedited"], "HORSE": Engine(trained=False)}
    rows = runner.run(plan(table, seeds=(0, 1, 2)), progress=False)
    assert [r["method"] for r in rows] == ["unedited", "HORSE", "HORSE", "HORSE"]


def test_more_edits_than_records_are_refused_before_anything_runs(plan):
    with pytest.raises(UsageError, match="facts: 7 edits asked for"):
        plan({}, (7,))


def test_the_tables_are_of_all_that_was_measured_into_a_folder(yamls, tmp_path):
    facts = tiny.records(18)
    data = [DataSet("facts", facts[:6], facts[6:12], facts[12:])]

    def measured(*names, seeds=(0,)):
        compare.compare(tmp_path, names, ["tiny"], data, (4,), seeds, hparams_dir=yamls)
        lines = (tmp_path / "table.md").read_text().splitlines()
        figures = lines[: lines.index("", 3)]  # the first table, before that of times
        return [line.split(" | ")[0].strip("| ") for line in figures if line.startswith("| ")][2:]

    assert measured("HORSE, untrained") == ["HORSE, untrained"]
    assert measured("unedited") == ["unedited", "HORSE, untrained"]
    measured("HORSE, untrained", seeds=(0, 1))
    assert "over 2 seeds" in (tmp_path / "table.md").read_text()


def test_a_quick_comparison_trains_every_method_as_briefly(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_measured", lambda plan, kind: plan)
    plan = compare.compare(tmp_path, ["MEND", "MALMEN", "HORSE"], quick=True)
    ((model, yaml),) = plan.models.items()
    (data,) = plan.datasets
    facts = data.records, data.train, data.val
    hparams = HORSEHyperParams.from_hparams(yaml)
    task = Task(model, data.name, None, hparams, *facts, plan.hparams_dir, tmp_path)
    mend, *ours = (method.settings(task) for method in plan.methods.values())
    budgets = [[about["n_edits"], about["max_epochs"], about["max_iters"]] for about in ours]
    assert budgets == 2 * [mend["steps"]]
    assert mend["steps"] != [hparams.n_edits, hparams.max_epochs, hparams.max_iters]


def test_names_of_methods_are_checked():
    assert list(methods.choose(["horse", "FT"], METHODS)) == ["FT", "HORSE"]
    with pytest.raises(UsageError, match="'GPT' is not one of unedited; FT"):
        methods.choose(["GPT"], METHODS)


# ablate


def test_ablations_each_change_what_they_say(yamls, tmp_path):
    facts = tiny.records(18)
    data = [DataSet("facts", facts[:6], facts[6:12], facts[12:])]
    rows = compare.ablate(tmp_path, yamls / "HORSE/tiny.yaml", data, (6,))
    assert [r["method"] for r in rows] == ["unedited", *compare.ABLATIONS]
    assert not [r["reason"] for r in rows if r.get("reason")]
    from horse_plugin.storage import archive

    networks = [archive.read_network(f)[0] for f in (tmp_path / "archives").iterdir()]
    assert len(networks) == 8  # all but the untrained one
    assert sum(n.lamda.abs().max().item() == 0 for n in networks) == 1  # λ fixed
    assert sorted(n.coefficient for n in networks)[:2] == ["edit_only", "none"]
    assert {n.spread for n in networks} == {"orthogonal", "uniform", "gram_schmidt", "decay"}


@pytest.mark.parametrize("coefficient", ["token", "edit_only", "none"])
def test_without_c_the_residual_is_eta_times_the_gradient(coefficient):
    hparams = tiny.hparams(coefficient=coefficient, spread="uniform", lr=0.5)
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    network = new_network(backbone, hparams)
    traced = trace(backbone, backbone.tokenize([r.edit for r in tiny.records()]), 512)
    network.update_normalizers(traced.keys, traced.grads)
    edit = network.residuals(traced.keys, traced.grads)[0]
    loss = network.residuals(traced.keys, traced.grads, in_loss=True)[0]
    pseudo = network(0, traced.keys[0], traced.grads[0])[1]
    assert torch.allclose(edit, -0.5 * pseudo) == (coefficient == "none")
    assert torch.allclose(loss, -0.5 * pseudo) == (coefficient != "token")
    backward(network, traced, lambda shifts: ({}, shifts))
    assert network.log_eta.grad.abs().sum() > 0


# tables


def row(method, efficacy, seed=0, n=100, dataset="facts", **other):
    made = {"method": method, "dataset": dataset, "model": "m/llama", "n_edits": n, "seed": seed}
    figures = {"efficacy": efficacy, "generalization": efficacy, "specificity": 10.0}
    costs = {"edit_seconds": 1.0, "train_seconds": None, "peak_memory_mb": 100.0}
    return made | figures | {"locality": None, "versions": {"torch": "1"}} | costs | other


def test_best_is_bold_second_underlined_and_the_unedited_model_apart():
    rows = [row("unedited", 99.0), row("FT", 50.0), row("MEMIT", 70.04), row("HORSE", 80.0)]
    text = tables.figures_table(rows, "m/llama", 100).markdown()
    assert "| unedited | 99.0 | 99.0 | 10.0 | 69.3 |" in text
    assert "| FT | 50.0 | 50.0 | **10.0** | 36.7 |" in text  # as good as the best
    assert "| MEMIT | <u>70.0</u> | <u>70.0</u> | **10.0** | <u>50.0</u> |" in text
    assert "| HORSE | **80.0** | **80.0** | **10.0** | **56.7** |" in text
    assert "| Δ | +10.0 | +10.0 | +0.0 | +6.6 |" in text
    latex = tables.figures_table(rows, "m/llama", 100).latex()
    assert r"HORSE & \textbf{80.0} & \textbf{80.0} & \textbf{10.0} & \textbf{56.7} \\" in latex
    assert r"MEMIT & \underline{70.0}" in latex
    assert r"$\Delta$ & +10.0" in latex


def test_seeds_become_mean_and_deviation_and_a_missing_figure_a_dash():
    rows = [row("HORSE", 80.0), row("HORSE", 90.0, seed=1)]
    rows += [row("FT", 1.0), row("FT", None, seed=1, reason="A & B_c: 5%")]
    grid = tables.figures_table(rows, "m/llama", 100)
    assert "85.0 ± 7.1" in grid.markdown()
    assert "| FT | – | – |" in grid.markdown()
    assert r"A \& B\_c: 5\%" in grid.latex()
    assert r"$\pm$" in grid.latex()


def test_equal_budgets_are_said_once():
    trained = {"budget": "2 steps of 6 records from 6"}
    rows = [row("MALMEN", 1.0, **trained), row("HORSE", 2.0, **trained)]
    caption = tables.figures_table(rows, "m/llama", 100).caption
    assert caption.endswith("Trained: MALMEN, HORSE (facts): 2 steps of 6 records from 6.")


def test_what_easyedits_metrics_say_stands_in_the_caption():
    ours = {"efficacy": 80.0, "generalization": 79.5, "specificity": 10.0}
    theirs = {"efficacy": 80.0, "generalization": 80.0, "specificity": None}
    check = {"records": 20, "ours": ours, "easyedit": theirs}
    caption = tables.figures_table([row("HORSE", 80.0, check=check)], "m/llama", 100).caption
    assert caption.endswith("on 20 of the records, are within 0.50 of these.")


def test_csv_holds_every_row():
    rows = [row("FT", None, reason='said "no", twice'), row("HORSE", 2.0)]
    read = list(csv.DictReader(tables.to_csv(rows).splitlines()))
    assert [r["method"] for r in read] == ["FT", "HORSE"]
    assert read[0]["reason"] == 'said "no", twice'


def test_the_report_needs_nothing_but_itself_and_shows_fig_2(tmp_path):
    rows = [row(m, 10.0 * i, n=n) for i, m in enumerate(("unedited", "HORSE")) for n in (1, 100)]
    output.write(tmp_path, rows)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3  # bars at 1 and at 100 edits, and Fig. 2
    assert not re.search(r"""(src|href) *= *["']?[^"'#]|url\((?!#)|@import|<script""", page)
    assert (tmp_path / "edits-llama-facts.svg").read_text().startswith("<svg")


# statistics


def test_second_moments_equal_the_keys_of_all_tokens_one_text_at_a_time():
    backbone = Backbone(tiny.model(), tiny.bpe_tokenizer())
    layers = [f"model.layers.{i}.mlp.down_proj" for i in (1, 3)]
    texts = ["the capital of Norway is Oslo", "Lima", "who plays the piano in Kyoto city ?"]
    found = stats.second_moments(backbone, layers, texts, batch_tokens=16, progress=False)
    for name in layers:
        keys = []
        hook = backbone.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, keys=keys: keys.append(args[0][0])
        )
        for text in texts:
            backbone.model(**backbone.tokenizer(text, return_tensors="pt"))
        hook.remove()
        keys = torch.cat(keys)
        total, count = found[name]
        assert count == len(keys)
        assert torch.allclose(total, keys.T @ keys, rtol=1e-4, atol=1e-6)


def test_the_null_space_holds_what_the_text_does_not_use(tmp_path):
    keys = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 8)
    stats.write_null_space(tmp_path / "P.pt", {"l": (keys.T @ keys, 50)}, 1e-3)
    (P,) = torch.load(tmp_path / "P.pt")
    assert torch.allclose(P, torch.diag(torch.tensor([0.0] * 3 + [1.0] * 5)), atol=1e-6)


def test_a_corpus_is_any_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert stats.read_corpus(tmp_path / "a.txt", 2) == ["one", "two"]
    assert stats.read_corpus(tmp_path / "b.jsonl", 9) == ["one", "two"]
    texts = stats.read_corpus(tiny.records(1), 9)
    assert len(texts) == 3
    assert not [t for t in texts if tiny.records(1)[0].target_new in t.split(" is ")[-1:]]
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(UsageError, match="no text in it"):
        stats.read_corpus(tmp_path / "c.txt", 9)


def test_malmen_is_trained_on_as_many_records_in_as_many_steps_as_horse_is():
    folder = Path(__file__).parents[1] / "hparams"
    ours, theirs = (
        HORSEHyperParams.from_hparams(folder / method / "llama-smollm2-135m.yaml").to_dict()
        for method in ("HORSE", "MALMEN")
    )
    differing = {key for key in ours if ours[key] != theirs[key]}
    methods_own = {"alg_name", "spread", "spread_strength", "ridge", "edit_ridge"}
    losses_own = {"loc_loss", "loc_coef", "edit_coef", "gen_coef", "meta_lr"}
    assert differing == methods_own | losses_own
