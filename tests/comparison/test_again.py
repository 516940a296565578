"""Reports are drawn again from what lies in a folder, and look right in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from horse_plugin import Chain, HorseEditor, HorseError, UsageError, checked_edit
from horse_plugin.comparison.again import report_of
from horse_plugin.evaluation import general, results
from horse_plugin.evaluation.report import Report
from horse_plugin.training.history import read_history, save_history
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An edit with text from files that a browser would take for its own."""
    path = tmp_path_factory.mktemp("report")
    editor = HorseEditor(tiny.model(), tiny.bpe_tokenizer(), tiny.hparams())
    records = [replace(tiny.records()[0], target_new="<img src=x onerror=alert(1)>")]
    delta, rows = checked_edit(editor, records + tiny.records()[1:], "facts", "mine", max_rise=1e9)
    delta.about["command"] = "horse edit --data 'a&b.json'"
    delta.save(path / "edit")
    results.save(path / "edit" / "results.json", rows)
    chain = Chain(path / "chain")
    chain.add(delta, rows)
    return path


def test_an_edit_shows_its_verdict_first_and_each_fact(folder):
    page = report_of(folder / "edit").html()
    order = ["mine: 6 facts edited", "of 6 facts hold", "Held, and at what cost", "Each fact"]
    places = [page.index(part) for part in (*order, "horse edit --data &#39;a&amp;b.json&#39;")]
    assert places == sorted(places)
    assert page.count("<tr data-is=") == 6 and page.count("<svg") == 2
    assert "&lt;img src=x onerror" in page and "<img" not in page
    assert not re.search(r"""(src|href) *= *["']?[^"'# ]+//|url\((?!#)|@import""", page)
    assert report_of(folder / "chain").html() == page


def test_general_ability_has_a_report_and_a_folder_of_nothing_an_error(tmp_path):
    errors = {("nli", "acc"): 0.4}
    rows = general.rows(
        *(general.Ability({("nli", "acc"): share}, errors, {}, {}) for share in (50.0, 49.0))
    )
    results.save(tmp_path / "results.json", [row | {"command": "horse general"} for row in rows])
    page = report_of(tmp_path).html()
    assert "-1.0" in page and "<code>horse general</code>" in page
    verdict = (
        "1 of 1 tasks lost more than a standard error (nli 50.0 → 49.0). The model is damaged."
    )
    assert page.index(verdict) < page.index("<h2>")
    with pytest.raises(UsageError, match=r"holds no edit, no training and no results\.json"):
        report_of(tmp_path / "none")
    (tmp_path / "results.json").write_text('{"a": 1}')
    with pytest.raises(HorseError, match="damaged"):
        report_of(tmp_path)


def test_a_training_has_a_report_with_its_curves(tmp_path):
    step = {"step": 1, "edit": 2.5, "rephrase": None, "validation": {"efficacy": 99.0}}
    save_history(tmp_path, [step])
    page = report_of(tmp_path).html()
    assert "A training of 1 step<" in page and page.count("<svg") == 2
    save_history(tmp_path, [])
    with pytest.raises(UsageError, match="holds no step"):
        report_of(tmp_path)


def test_a_history_is_read_as_it_was_saved(tmp_path):
    history = [{"step": 1, "edit": 2.5, "ordinary": None}, {"step": 2, "edit": 1.5}]
    history[1]["validation"] = {"efficacy": 99.0, "score": 80.0}
    save_history(tmp_path, history)
    assert read_history(tmp_path) == [{"step": 1, "edit": 2.5}, history[1]]
    (tmp_path / "training.csv").write_text("no,steps\n1,2\n")
    with pytest.raises(HorseError, match=r"training\.csv: damaged"):
        read_history(tmp_path)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<pre id=probe></pre><script>
const input = document.querySelector("input"), shown = () =>
  [...document.querySelectorAll("tr[data-is]")].filter(row => !row.hidden).length;
const wide = Math.max(...[...document.querySelectorAll("body *")].map(
  e => e.getBoundingClientRect().right));
const all = shown(), first = document.querySelector("tr[data-is] td").textContent;
input.value = first; input.dispatchEvent(new Event("input"));
document.getElementById("probe").textContent =
  JSON.stringify({width: innerWidth, wide: Math.ceil(wide), all, found: shown(), first});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Debian's package chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_in_a_browser_and_the_search_finds_facts(folder, tmp_path, width):
    page = report_of(folder / "edit").html().replace("</body>", PROBE)
    frame = f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "frame.html").write_text(
        f"<body>{frame}<pre id=out></pre><script>onload = () => document.getElementById('out')"
        ".textContent = document.querySelector('iframe').contentDocument.getElementById('probe')"
        ".textContent</script></body>"
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    run = subprocess.run(
        [BROWSER, *options, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    probe = json.loads(re.search(r'<pre id="out">(.*?)</pre>', run.stdout, re.S)[1])
    assert probe["width"] == width >= probe["wide"]
    same = sum(r.prompt == probe["first"] for r in tiny.records())
    assert (probe["all"], probe["found"]) == (6, same)


def test_a_report_without_figures_is_a_page(tmp_path):
    assert "<h1>Nothing</h1>" in Report("Nothing").html()
