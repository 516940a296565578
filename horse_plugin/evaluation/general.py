"""General ability before and after an edit, as the paper's Table 3, by lm-evaluation-harness.

The tasks are the harness's own, from the hub; or, given a folder of JSONL files, the same tasks on
these: a question and some answers, of which the model takes the one it finds likeliest.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from horse_plugin.data.sources import read_items
from horse_plugin.errors import HorseError, UsageError, reason
from horse_plugin.evaluation.tables import Table, number
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import quiet_transformers
from horse_plugin.storage.schema import Maybe, finite

YES_NO = ["yes", "no"]
LETTERS = "ABCDEFGHIJ"


def _choices(doc: dict) -> tuple[str, list[str], int]:
    letters = LETTERS[: len(doc["choices"])]
    options = (f"{letter}. {c}" for letter, c in zip(letters, doc["choices"], strict=True))
    return "\n".join([doc["question"].strip(), *options, "Answer:"]), list(letters), doc["answer"]


def _yes_no(first: str, second: str, question: str, yes: Sequence):
    """Return a reader of two texts with a label; ``yes`` holds the labels that mean yes."""

    def read(doc: dict) -> tuple[str, list[str], int]:
        text = f"{doc[first]}\n{doc[second]}\nQuestion: {question}\nAnswer:"
        return text, YES_NO, int(str(doc["label"]) not in yes)

    return read


ENTAILED, SAME = ("entailment", "0"), ("1",)
# name → the harness's task, and how to read a line of <name>.jsonl: prompt, answers, the right one.
TASKS = {
    "mmlu": ("mmlu", _choices),
    "nli": ("rte", _yes_no("sentence1", "sentence2", "Is the second true, then?", ENTAILED)),
    "mrpc": ("mrpc", _yes_no("sentence1", "sentence2", "Do both mean the same?", SAME)),
    "qnli": ("qnli", _yes_no("question", "sentence", "Does this answer it?", ENTAILED)),
    "qqp": ("qqp", _yes_no("question1", "question2", "Do both ask the same?", SAME)),
    "commonsenseqa": ("commonsense_qa", _choices),
}


def measure(
    backbone: Backbone, tasks: Sequence[str], data=None, limit: int | None = None, batch_size=16
) -> dict[tuple[str, str], float]:
    """Return (task, metric) → figure of the model as it is, in percent.

    Args:
        tasks: names from :data:`TASKS`; without ``data`` also any of the harness's.
        data: folder of ``<task>.jsonl``; none: the tasks come from the hub.
        limit: this many questions a task, from the start.

    Raises:
        UsageError: no such task or file, or a file that does not fit; the harness is not installed.
        HorseError: the harness could not run a task.
    """
    wanted = {name: _local(name, data) if data else _from_hub(name) for name in tasks}
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(
            f"general: {error}: install it with `pip install 'horse-plugin[general]'`."
        ) from None
    try:
        with quiet_transformers(), _quiet(), backbone.held():
            found = lm_eval.simple_evaluate(
                HFLM(backbone.model, tokenizer=backbone.tokenizer, batch_size=batch_size),
                tasks=list(wanted.values()),
                task_manager=TaskManager(include_defaults=not data),  # reading all takes seconds
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )["results"]
    except Exception as error:  # whatever the harness and the hub raise
        raise HorseError(f"general: the harness failed ({reason(error)}).") from error
    names = {name: task if isinstance(task, str) else task["task"] for name, task in wanted.items()}
    return {
        (name, metric.partition(",")[0]): 100 * value
        for name, task in names.items()
        for metric, value in found[task].items()
        if metric.endswith(",none") and "stderr" not in metric and isinstance(value, (int, float))
    }


ROW = {
    "command": Maybe(str),
    "task": str,
    "metric": str,
    "before": finite,
    "after": finite,
    "difference": finite,
}


def rows(before: dict, after: dict) -> list[dict]:
    """Return one row for each task and metric, in percent."""
    return [
        {
            "task": task,
            "metric": metric,
            "before": value,
            "after": after[task, metric],
            "difference": after[task, metric] - value,
        }
        for (task, metric), value in before.items()
    ]


def table(rows: Iterable[dict]) -> Table:
    """Return the rows of :func:`rows` as a table, in percent."""
    lines = [
        [r["task"], r["metric"], *map(number, (r["before"], r["after"])), f"{r['difference']:+.1f}"]
        for r in rows
    ]
    names = ["task", "metric", "before", "after", "difference"]
    return Table(names, lines, "General ability, percent")


def _from_hub(name: str) -> str:
    return TASKS[name][0] if name in TASKS else name


def _local(name: str, data) -> dict:
    """Return a task of the harness on the folder's file."""
    if name not in TASKS:
        raise UsageError(f"tasks: {name!r} is not one of {', '.join(TASKS)}.")
    docs = _read(Path(data, f"{name}.jsonl"), TASKS[name][1])

    def dataset(**_):
        from datasets import Dataset

        return {"test": Dataset.from_list(docs)}

    return {
        "task": f"local_{name}",
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _read(path: Path, reader) -> list[dict]:
    docs = []
    for i, item in enumerate(read_items(path), 1):
        try:
            docs.append(dict(zip(("prompt", "choices", "answer"), reader(item), strict=True)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}, item {i}: not a question with its answers ({error!r})."
            ) from None
    if not docs:
        raise UsageError(f"{path}: holds no questions.")
    return docs


@contextlib.contextmanager
def _quiet():
    """Keep the harness's log messages out of the command line's output."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
