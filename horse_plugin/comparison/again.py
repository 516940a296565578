"""The report of a folder, drawn again from the files in it: ``horse report``."""

from pathlib import Path

from horse_plugin.comparison.output import comparison_report
from horse_plugin.comparison.runner import ROW
from horse_plugin.editing.archive import ARCHIVE, HISTORY, read_network
from horse_plugin.editing.chain import read_edits
from horse_plugin.editing.delta import CHAIN_FILE, DELTA, EditDelta
from horse_plugin.errors import UsageError, counted
from horse_plugin.evaluation import general, report
from horse_plugin.evaluation.facts import FACTS_FILE, read_facts
from horse_plugin.evaluation.verdict import judge
from horse_plugin.storage.schema import check_form, read_json
from horse_plugin.training.history import read_history


def report_of(folder) -> report.Report:
    """Return the report of what is in a folder.

    It may be an edit, a chain, of which the last edit in force is shown, a demo, a comparison, an
    ablation, a training, or general ability before and after an edit.

    Raises:
        UsageError: the folder holds none of them.
        HorseError: a file in it is damaged.
    """
    folder = Path(folder).expanduser()
    if (folder / DELTA).exists():
        return _of_edit(EditDelta.load(folder), folder)
    if (folder / CHAIN_FILE).exists():
        if deltas := read_edits(folder):
            return _of_edit(deltas[-1], folder / deltas[-1].name)
        raise UsageError(f"{folder}: no edit is in force.")
    if (folder / HISTORY).exists():
        return _of_training(folder)
    path = folder / "results.json"
    if not path.exists():
        raise UsageError(f"{folder}: holds no edit, no training and no results.json.")
    rows = read_json(path, [dict])
    if not rows:
        raise UsageError(f"{path}: holds no row.")
    if "task" in rows[0]:
        check_form(path, rows, [general.ROW])
        return report.Report(
            "General ability before and after",
            verdict=general.verdict(rows),
            commands=report.commands_of(rows),
            sections=[report.Section("Tasks", tables=[general.table(rows)])],
        )
    check_form(path, rows, [ROW])
    if (folder / "edit" / DELTA).exists():
        return _of_demo(folder, rows)
    return comparison_report(rows)


def _of_edit(delta: EditDelta, folder: Path) -> report.Report:
    facts = read_facts(folder) if (folder / FACTS_FILE).exists() else []
    figures = delta.about.get("figures")
    return report.of_edit(
        {"name": delta.name, **delta.about},
        len(delta.records or facts),
        judge(figures) if figures else None,
        facts,
    )


def _of_training(folder: Path) -> report.Report:
    history = read_history(folder)
    if not history:
        raise UsageError(f"{folder / HISTORY}: holds no step.")
    made = report.Report(f"A training of {counted(len(history), 'step')}")
    if (folder / ARCHIVE).exists():
        _, _, about = read_network(folder)
        made.meta = f"Model {about['model']['name']}, {about['hparams']['alg_name']}."
        made.versions = about["versions"]
    made.sections.append(report.learning_section(history))
    return made


def _of_demo(folder: Path, rows: list[dict]) -> report.Report:
    made = _of_edit(EditDelta.load(folder / "edit"), folder / "edit")
    made.title = f"{rows[0]['n_edits']:,} facts edited at once"
    made.sections = [report.held_and_cost(rows), *made.sections[1:]]
    if (folder / "archive" / HISTORY).exists():
        made.sections.append(report.learning_section(read_history(folder / "archive")))
    return made
