"""Each fact's fate: one row a record, with its figures and what the model predicts, as CSV."""

import csv
import io
from pathlib import Path

from horse_plugin.data.prompts import PreparedEdits, Prompt
from horse_plugin.errors import UsageError
from horse_plugin.evaluation.metrics import FIGURES, Evaluation
from horse_plugin.evaluation.tables import as_written, not_computed
from horse_plugin.storage.files import write
from horse_plugin.storage.schema import read_text

FACTS_FILE = "facts.csv"
READ = {"prompt", "wanted", "before", "after", "holds", "generalization", "locality"}


def fact_rows(
    edits: PreparedEdits, tokenizer, before: Evaluation, after: Evaluation
) -> list[dict[str, object]]:
    """Return one row for each record: its figures in percent, and answers predicted and wanted.

    The rows go into a DataFrame as they are. ``holds`` is whether the model gives the whole answer.
    Of several rephrases and unrelated prompts, the row shows the one that came out worst.

    Args:
        before, after: what an :class:`horse_plugin.Evaluator` of these edits found.
    """

    def predicted(prompt: Prompt, found: Evaluation) -> str:
        return tokenizer.decode(found.predicted[prompt], skip_special_tokens=True).strip()

    def wrong(prompt: Prompt, right) -> int:
        return sum(a != b for a, b in zip(after.predicted[prompt].tolist(), right, strict=True))

    rows = []
    for i, record in enumerate(edits.records):
        shares = after.records[i]
        (edit,) = edits.of("edit", i)
        row = {
            "record": i,
            "case_id": record.case_id,
            "subject": record.subject,
            "prompt": record.prompt,
            "wanted": record.target_new,
            "before": predicted(edit, before),
            "after": predicted(edit, after),
            "holds": shares["written"] == 1,
            **{f: None if shares[f] is None else 100 * shares[f] for f in FIGURES},
        }
        queries = list(zip(record.rephrases, edits.of("rephrase", i), strict=True))
        if queries:
            text, prompt = max(queries, key=lambda q: wrong(q[1], q[1].answer))
            row |= {"rephrase": text, "rephrase_after": predicted(prompt, after)}
        queries = list(zip(record.unrelated, edits.of("unrelated", i), strict=True))
        if queries:
            query, prompt = max(queries, key=lambda q: wrong(q[1], before.predicted[q[1]].tolist()))
            row |= {"unrelated": query.prompt, "unrelated_wanted": query.answer}
            row |= {
                "unrelated_before": predicted(prompt, before),
                "unrelated_after": predicted(prompt, after),
            }
        rows.append(row)
    return rows


def save_facts(path, rows: list[dict]):
    """Write the rows of :func:`fact_rows` as CSV, in which no spreadsheet computes a text."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, names)  # its own line ends, so that any in a text are quoted
    writer.writeheader()
    for row in rows:
        writer.writerow({k: not_computed(v) if isinstance(v, str) else v for k, v in row.items()})
    write(path, text.getvalue())


def read_facts(folder) -> list[dict[str, str]]:
    """Return the rows of an edit's ``facts.csv``, as text.

    Raises:
        UsageError: the folder has none, or it cannot be read, or lacks a column.
    """
    path = Path(folder, FACTS_FILE)
    try:
        lines = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
        rows = [{name: as_written(line[name]) for name in lines.fieldnames} for line in lines]
    except FileNotFoundError:
        raise UsageError(f"{path}: not there; `horse eval --out` measures the facts.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: not readable as CSV ({error}).") from None
    if rows and not rows[0].keys() >= READ:
        raise UsageError(f"{path}: lacks a column of {', '.join(sorted(READ))}.")
    return rows
