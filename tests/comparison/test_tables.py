"""The paper's tables and Fig. 2 from rows of results.json: marks, deviations, the report."""

import csv
import re

import pytest

from horse_plugin.comparison import tables
from horse_plugin.comparison.methods import ABLATIONS
from horse_plugin.comparison.output import write_output
from horse_plugin.evaluation import charts

PAGE = tables.Page("m/llama", 100)


def row(method, efficacy, seed=0, n=100, dataset="facts", **other):
    made = {"method": method, "dataset": dataset, "model": "m/llama", "n_edits": n, "seed": seed}
    figures = {"efficacy": efficacy, "generalization": efficacy, "specificity": 10.0}
    costs = {"edit_seconds": 1.0, "train_seconds": None, "peak_memory_mb": 100.0}
    return made | figures | {"locality": None, "versions": {"torch": "1"}} | costs | other


def test_best_is_bold_second_underlined_and_the_unedited_model_apart():
    rows = [row("unedited", 99.0), row("FT", 50.0), row("MEMIT", 70.04), row("HORSE", 80.0)]
    text = tables.figures_table(rows, PAGE).markdown()
    assert "| unedited | 99.0 | 99.0 | 10.0 | 69.3 |" in text
    assert "| FT | 50.0 | 50.0 | **10.0** | 36.7 |" in text  # as good as the best
    assert "| MEMIT | <u>70.0</u> | <u>70.0</u> | **10.0** | <u>50.0</u> |" in text
    assert "| HORSE | **80.0** | **80.0** | **10.0** | **56.7** |" in text
    assert "| Δ | +10.0 | +10.0 | +0.0 | +6.6 |" in text
    latex = tables.figures_table(rows, PAGE).latex()
    assert r"HORSE & \textbf{80.0} & \textbf{80.0} & \textbf{10.0} & \textbf{56.7} \\" in latex
    assert r"MEMIT & \underline{70.0}" in latex
    assert r"$\Delta$ & +10.0" in latex


def test_the_rows_of_an_ablation_are_symbols_that_latex_knows():
    latex = tables.figures_table([row(name, 1.0) for name in ABLATIONS], PAGE).latex()
    for name in (r"$\bar{C}$ = I", "$C_0$ only", r"$\lambda$ from 0", "w/o $c_i$ in the loss"):
        assert f"\n{name} & " in latex
    assert latex.isascii()


def test_one_method_alone_is_not_marked_as_the_best():
    text = tables.figures_table([row("unedited", 1.0), row("FT", 50.0)], PAGE).markdown()
    assert "| FT | 50.0 | 50.0 | 10.0 | 36.7 |" in text


def test_seeds_become_mean_and_deviation_and_a_missing_figure_a_dash():
    rows = [row("HORSE", 80.0), row("HORSE", 90.0, seed=1)]
    rows += [row("FT", 1.0), row("FT", None, seed=1, reason="A & B_c: 5%")]
    grid = tables.figures_table(rows, PAGE)
    assert "85.0 ± 7.1" in grid.markdown()
    assert "| FT | – | – |" in grid.markdown()
    assert r"A \& B\_c: 5\%" in grid.latex()
    assert r"$\pm$" in grid.latex()


def test_equal_budgets_are_said_once():
    trained = {"budget": "2 steps of 6 records from 6"}
    rows = [row("MALMEN", 1.0, **trained), row("HORSE", 2.0, **trained)]
    caption = tables.figures_table(rows, PAGE).caption
    assert caption.endswith("Trained: MALMEN, HORSE (facts): 2 steps of 6 records from 6.")


def test_what_easyedits_metrics_say_stands_in_the_caption():
    ours = {"efficacy": 80.0, "generalization": 79.5, "specificity": 10.0}
    theirs = {"efficacy": 80.0, "generalization": 80.0, "specificity": None}
    check = {"records": 20, "ours": ours, "easyedit": theirs}
    caption = tables.figures_table([row("HORSE", 80.0, check=check)], PAGE).caption
    assert caption.endswith("on 20 of the records, are within 0.50 of these.")


def test_probabilities_have_a_table_where_they_were_measured(tmp_path):
    found = {"efficacy_success": 90.0, "efficacy_magnitude": 12.5}
    rows = [row("unedited", 1.0), row("HORSE", 2.0, probabilities=found)]
    rows += [row("HORSE", 2.0, seed=1, probabilities=found | {"efficacy_success": 80.0})]
    write_output(tmp_path, rows)
    shown = "| method | facts Eff. success | facts Eff. magnitude |\n| --- | --: | --: |\n"
    assert shown + "| HORSE | 85.0 ± 7.1 | 12.5 ± 0.0 |" in (tmp_path / "table.md").read_text()
    assert "Eff. magnitude" in (tmp_path / "report.html").read_text()
    write_output(tmp_path, rows[:1])
    assert "Probability" not in (tmp_path / "report.html").read_text()


def test_csv_holds_every_row():
    rows = [row("FT", None, reason='said "no", twice', check=None), row("HORSE", 2.0)]
    rows[1] |= {"batches": batches([[1.0]], [0.1]), "check": {"records": 2}}
    read = list(csv.DictReader(tables.to_csv(rows).splitlines()))
    assert [r["method"] for r in read] == ["FT", "HORSE"]
    assert read[0]["reason"] == 'said "no", twice'
    assert not read[0].keys() & {"batches", "check", "versions"}


COSTS = {"locality": 80.0, "written": 90.0, "drift": 0.05, "perplexity": 21.0, "fluency": 5.0}


def test_each_method_has_a_verdict_before_all_else(tmp_path):
    rows = [row("unedited", 5.0, **COSTS | {"drift": 0.0, "perplexity": 20.0})]
    for seed, drift in enumerate((0.5, 0.9)):
        rows.append(row("FT", 99.0, seed, **COSTS | {"drift": drift}))
    rows += [row("HORSE", 99.0, **COSTS), row("MEND", None, reason="no archive")]
    rows += [row("LoRA", 99.0, **COSTS | {"drift": None, "perplexity": None}), row("ROME", 99.0)]
    (table,) = tables.verdicts(rows, PAGE)
    said = dict(table.lines)
    assert list(said) == ["FT", "HORSE", "LoRA"]  # what 0.1 measured, ROME, has no drift
    assert "drift not finite, perplexity not finite. The model is damaged." in said["LoRA"]
    assert "drift 0.700. The model is damaged." in said["FT"]
    assert "perplexity 20.0 → 21.0, drift 0.050. The model is unharmed." in said["HORSE"]
    write_output(tmp_path, rows)
    page = (tmp_path / "report.html").read_text()
    order = ["What each comes to", "How to read this", "<svg", "Eff."]
    assert sorted(order, key=page.index) == order


def test_pictures_of_shares_show_the_perplexity_too():
    rows = [row("unedited", 5.0, **COSTS), row("HORSE", 99.0, **COSTS | {"perplexity": 93e6})]
    drawn = charts.before_and_after(rows)
    assert [bar.get_height() for bar in drawn.axes[1].patches] == [21.0, 93e6]
    found = tables.perplexities(rows, PAGE, "facts")
    drawn = charts.side_by_side("facts", tables.means(rows, PAGE)["facts"], found)
    assert [bar.get_width() for bar in drawn.axes[1].patches] == [21.0, 93e6]
    assert [text.get_text() for text in drawn.axes[1].texts] == ["21", "9e+07"]


def test_what_was_not_measured_has_no_bar():
    rows = [row("unedited", 5.0, **COSTS | {"locality": None}), row("HORSE", 0.0, locality=None)]
    rows[1]["specificity"] = None
    names = ["efficacy", "generalization", "specificity"]
    drawn = charts.before_and_after(rows)
    shares, perplexity = drawn.axes
    assert [bar.get_height() for bar in shares.patches] == [5.0, 5.0, 10.0, 0.0, 0.0]
    assert [label.get_text() for label in shares.get_xticklabels()] == names
    assert [bar.get_height() for bar in perplexity.patches] == [21.0]
    means = tables.means(rows, PAGE)["facts"]
    assert means["HORSE"] == [0.0, 0.0, None, None]
    shares, perplexity = charts.side_by_side("facts", means, {}).axes
    assert sorted(bar.get_width() for bar in shares.patches) == [0.0, 0.0, 5.0, 5.0, 10.0]
    assert shares.get_legend_handles_labels()[1] == names
    assert not perplexity.get_visible()


def test_the_report_needs_nothing_but_itself_and_shows_fig_2(tmp_path):
    rows = [row(m, 10.0 * i, n=n) for i, m in enumerate(("unedited", "HORSE")) for n in (1, 100)]
    write_output(tmp_path, rows)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5  # bars at 1 and at 100 edits, and three panels of Fig. 2
    assert not re.search(r"""(src|href) *= *["']?[^"'#]|url\((?!#)|@import|<script""", page)
    assert (tmp_path / "edits-llama-facts.svg").read_text().startswith("<svg")


def test_a_method_has_one_colour_in_all_panels_and_a_place_in_the_legend():
    points = [(1, 90.0), (100, 80.0)]
    of = {"MEND": ["drift"], "HORSE": ["efficacy", "drift"], "FT": ["efficacy", "drift"]}
    names = ["efficacy", "drift"]
    curves = {m: {name: points if name in has else [] for name in names} for m, has in of.items()}
    over_edits = charts.over_edits(curves, names)
    stopped = {"by age": [], "so far": [1.0], "drift": [1.0]}
    retention = charts.retention({"MEND": stopped, "FT": {key: [1.0] for key in stopped}})
    for figure, n in ((over_edits, 3), (retention, 2)):
        lines = [line for axes in figure.axes for line in axes.lines]
        colors = {line.get_label(): line.get_color() for line in lines}
        assert all(line.get_color() == colors[line.get_label()] for line in lines)
        assert len(set(colors.values())) == len(colors) == n
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.texts} == set(colors)


@pytest.mark.slow
def test_two_models_of_one_folder_name_have_pictures_of_their_own(tmp_path):
    models, n_edits = ("a/llama", "b/llama", "c/gpt"), (1, 100)
    rows = [row("HORSE", 99.0, n=n, **COSTS | {"model": m}) for m in models for n in n_edits]
    write_output(tmp_path, rows)
    assert len(list(tmp_path.glob("held-llama-*.svg"))) == 4
    assert len(list(tmp_path.glob("edits-llama-*-facts.svg"))) == 2
    assert (tmp_path / "held-gpt-100.svg").exists()
    page = (tmp_path / "report.html").read_text()
    headings = "100 edits on a/llama", "facts on b/llama, over", "100 edits on gpt"
    assert all(heading in page for heading in headings)


def batches(efficacy, drift):
    return [
        {"efficacy": e, "drift": d, "perplexity": 40.0}
        for e, d in zip(efficacy, drift, strict=True)
    ]


def test_batches_have_pages_of_their_own_with_what_is_left_of_each(tmp_path):
    first = batches([[100.0], [50.0, 90.0], [40.0, 60.0, 80.0]], [0.1, 0.2, 0.3])
    second = batches([[80.0], [70.0, 90.0], [60.0, 60.0, 90.0]], [0.1, 0.2, 0.5])
    rows = [row("HORSE", 90.0), row("HORSE", 60.0, batch=40, batches=first)]
    rows += [row("HORSE", 70.0, seed=1, batch=40, batches=second)]
    at_once, page = tables.pages(rows)
    assert (at_once, page) == (PAGE, tables.Page("m/llama", 100, 40))
    found = tables.retention(rows, page)["facts"]["HORSE"]
    assert found["by age"] == [50.0, 60.0, 85.0]
    assert found["so far"] == [90.0, 75.0, (60 + 70) / 2]
    assert found["drift"] == [0.1, 0.2, 0.4]
    assert tables.retention(rows, at_once) == {}
    lines = tables.retention_table(rows, page).markdown()
    assert "| method | facts batch 1 | facts batch 2 | facts batch 3 |" in lines
    assert "| HORSE | 50.0 | 60.0 | 85.0 |" in lines
    text = tables.figures_table(rows, page)
    assert text.columns[-1] == "First"
    assert text.lines[0][-1][0] == "50.0 ± 14.1"
    assert text.caption.startswith("100 edits, 40 at a time, each batch on top of those before")
    assert "First" not in tables.figures_table(rows, at_once).columns
    write_output(tmp_path, rows)
    assert (tmp_path / "retention-llama-100-by-40-facts.svg").exists()
    report = (tmp_path / "report.html").read_text()
    assert "100 edits, 40 at a time on llama" in report
    assert "Efficacy of each batch after the last" in report
