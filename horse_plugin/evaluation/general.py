"""General ability before and after an edit, as the paper's Table 3, by lm-evaluation-harness.

The tasks are the harness's own, from the hub; or, given a folder of JSONL files, the same tasks on
these: a question and some answers, of which the model takes the one it finds likeliest.
"""

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from horse_plugin.data.sources import read_items
from horse_plugin.errors import HorseError, UsageError, not_installed, reason
from horse_plugin.evaluation.drift import Cost
from horse_plugin.evaluation.metrics import mean
from horse_plugin.evaluation.tables import Table, figure, number
from horse_plugin.evaluation.verdict import (
    BAD,
    FAIR,
    GOOD,
    HARM,
    LESS_HARM,
    Verdict,
    level_of,
    rise,
    worst,
)
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.loading import quiet_transformers
from horse_plugin.storage.files import write
from horse_plugin.storage.schema import Maybe, finite

LETTERS = "ABCDEFGHIJ"
Read = Callable[[dict], tuple[str, list[str], int]]  # a line → prompt, answers, the right one


def _choices(head: str) -> Read:
    """Return a reader of a question with its choices, of which a letter names the right one."""

    def read(doc: dict) -> tuple[str, list[str], int]:
        letters = LETTERS[: len(doc["choices"])]
        options = (f"{letter}. {c}" for letter, c in zip(letters, doc["choices"], strict=True))
        text = "\n".join([head + doc["question"].strip(), *options, "Answer:"])
        return _about(doc.get("subject")) + text, list(letters), doc["answer"]

    return read


def _about(subject: str | None) -> str:
    """Return what stands before MMLU's questions of a subject."""
    if subject is None:
        return ""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def _pair(text: str, labels: dict[str, Sequence[str]]) -> Read:
    """Return a reader of two texts with a label; answer → the labels that mean it."""

    def read(doc: dict) -> tuple[str, list[str], int]:
        right = [str(doc["label"]) in of for of in labels.values()].index(True)
        return text.format(**doc) + "\nAnswer:", list(labels), right

    return read


ENTAILED, NOT_ENTAILED = ("entailment", "0"), ("not_entailment", "1")
NO_YES = {"no": ("0",), "yes": ("1",)}
# name → the harness's task, its metrics, and how to read a line of <name>.jsonl. Prompts and
# answers are the harness's, word for word.
TASKS: dict[str, tuple[str, Sequence[str], Read]] = {
    "mmlu": ("mmlu", ("acc",), _choices("")),
    "nli": (
        "rte",
        ("acc",),
        _pair(
            "{sentence1}\nQuestion: {sentence2} True or False?",
            {"True": ENTAILED, "False": NOT_ENTAILED},
        ),
    ),
    "mrpc": (
        "mrpc",
        ("acc", "f1"),
        _pair(
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Question: Do both sentences mean the same thing?",
            NO_YES,
        ),
    ),
    "qnli": (
        "qnli",
        ("acc",),
        _pair(
            "{question}\n{sentence}\nQuestion: Does this response answer the question?",
            {"yes": ENTAILED, "no": NOT_ENTAILED},
        ),
    ),
    "qqp": (
        "qqp",
        ("acc", "f1"),
        _pair(
            "Question 1: {question1}\nQuestion 2: {question2}\n"
            "Question: Do both questions ask the same thing?",
            NO_YES,
        ),
    ),
    "commonsenseqa": ("commonsense_qa", ("acc",), _choices("Question: ")),
}


@dataclass
class Ability:
    """What the harness found of one model.

    Attributes:
        figures, stderr: (task, metric) → figure and its standard error, in percent; as they are
            where less is better, as of perplexities.
        chance: task → the accuracy of guessing, in percent, where answers are chosen.
        output: all that the harness gave.
        less_is_better: the (task, metric) of which less is better.
    """

    figures: dict[tuple[str, str], float]
    stderr: dict[tuple[str, str], float]
    chance: dict[str, float]
    output: dict
    less_is_better: set[tuple[str, str]] = field(default_factory=set)

    def save(self, folder, name: str):
        """Write ``<name>.json``, the harness's results, and ``<name>-samples.jsonl``, each answer.

        Raises:
            HorseError: they could not be written.
        """
        samples = self.output.get("samples", {})
        rest = {key: value for key, value in self.output.items() if key != "samples"}
        lines = [_json({"task": task, **one}) for task, of in samples.items() for one in of]
        write(Path(folder, f"{name}.json"), _json(rest, indent=1) + "\n")
        write(Path(folder, f"{name}-samples.jsonl"), "".join(f"{line}\n" for line in lines))


def _json(value, **kwargs) -> str:
    return json.dumps(value, default=str, ensure_ascii=False, **kwargs)


def measure(
    backbone: Backbone,
    tasks: Sequence[str],
    data=None,
    limit: int | None = None,
    batch_size=16,
    include=None,
) -> Ability:
    """Return what the harness finds of the model as it is.

    Args:
        tasks: names from :data:`TASKS`, and any of the harness's or of ``include``; with ``data``
            only the former, unless there is an ``include``.
        data: folder of ``<task>.jsonl`` for those in :data:`TASKS`; none: they come from the hub.
        limit: this many questions a task, from the start.
        include: folder of YAMLs of the harness with tasks of one's own.

    Raises:
        UsageError: no such task or file, or a file that does not fit; the harness is not installed.
        HorseError: the harness could not run a task.
    """
    wanted = {
        name: _local(name, data) if data and not (include and name not in TASKS) else _of(name)
        for name in tasks
    }
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise not_installed("general", error, "general") from None
    try:
        with quiet_transformers(), _quiet(), backbone.held():
            # reading all of its own tasks takes seconds
            manager = TaskManager(include_path=include and str(include), include_defaults=not data)
            output = lm_eval.simple_evaluate(
                HFLM(backbone.model, tokenizer=backbone.tokenizer, batch_size=batch_size),
                tasks=list(wanted.values()),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=100,
            )
    except Exception as error:  # whatever the harness and the hub raise
        raise HorseError(f"general: the harness failed ({reason(error)}).") from error
    found = Ability({}, {}, {}, output)
    for name, task in wanted.items():
        task = task if isinstance(task, str) else task["task"]
        more_is_better = output["higher_is_better"].get(task, {})
        for metric, value in output["results"][task].items():
            metric, is_plain = metric.removesuffix(",none"), metric.endswith(",none")
            if is_plain and isinstance(value, (int, float)):
                of = found.stderr if metric.endswith("_stderr") else found.figures
                metric = metric.removesuffix("_stderr")
                less = more_is_better.get(metric) is False
                of[name, metric] = value if less else 100 * value
                if less:
                    found.less_is_better.add((name, metric))
        if chance := _chance(output, task):
            found.chance[name] = 100 * chance
    return found


def _chance(output: dict, task: str) -> float | None:
    """Return the accuracy of guessing in a task, or in all tasks of a group; None: no choice."""
    if parts := output.get("group_subtasks", {}).get(task):
        return mean(c for part in parts if (c := _chance(output, part)) is not None)
    if output["configs"].get(task, {}).get("output_type") != "multiple_choice":
        return None
    samples = output["samples"][task]
    return mean(1 / len({answer for _, answer in one["arguments"]}) for one in samples)


ROW = {"task": str, "metric": str, "before": finite, "after": finite, "difference": finite}
ROW |= {"command": Maybe(str), "less_is_better": Maybe(bool)}
ROW |= dict.fromkeys(("stderr_before", "stderr_after", "chance"), Maybe(finite))
IN_PERCENT = "General ability, percent; drift in nats a token and perplexity as they are"
# A loss that is larger than so many standard errors is fair, or bad.
STDERRS = (1, 2)


def rows(before: Ability, after: Ability) -> list[dict]:
    """Return one row for each task and metric, in percent."""
    return [
        {
            "task": task,
            "metric": metric,
            "before": value,
            "after": after.figures[task, metric],
            "difference": after.figures[task, metric] - value,
            "stderr_before": before.stderr.get((task, metric)),
            "stderr_after": after.stderr.get((task, metric)),
            "chance": before.chance.get(task) if metric == "acc" else None,
            "less_is_better": (task, metric) in before.less_is_better,
        }
        for (task, metric), value in before.figures.items()
    ]


def rows_of_text(name: str, before: Cost, after: Cost) -> list[dict]:
    """Return one row for the drift and one for the perplexity on a text of that name."""
    pairs = {m: (before.summary()[m], after.summary()[m]) for m in before.summary()}
    return [
        {"task": name, "metric": metric, "before": b, "after": a, "difference": a - b}
        for metric, (b, a) in pairs.items()
    ]


def table(rows: Iterable[dict]) -> Table:
    """Return the rows of :func:`rows` as a table; a note names tasks that are at chance.

    A task is at chance if guessing is within two standard errors of the accuracy before the edit.
    """
    rows = list(rows)
    lines = [
        [
            r["task"],
            r["metric"],
            *(_with_stderr(r, when) for when in ("before", "after")),
            f"{r['difference']:+.{_digits(r)}f}",
        ]
        for r in rows
    ]
    at_chance = [r["task"] for r in rows if _is_at_chance(r)]
    notes = [f"At chance before the edit, so that no harm could show: {', '.join(at_chance)}."]
    names = ["task", "metric", "before", "after", "difference"]
    return Table(names, lines, IN_PERCENT, notes=notes if at_chance else [])


def verdict(rows: Iterable[dict]) -> Verdict | None:
    """Return the verdict on what an edit left of the model's general ability.

    A task loses as many standard errors as the worst of its figures. One that was at chance before
    the edit shows no harm, and does not count. None: no row has a standard error, and none is of a
    text.
    """
    tasks, texts = {}, {}
    for r in rows:
        if r.get("stderr_before") is not None:
            tasks.setdefault(r["task"], []).append(r)
        elif r["metric"] in ("drift", "perplexity"):
            texts.setdefault(r["task"], {})[r["metric"]] = r
    texts = {name: of for name, of in texts.items() if len(of) == 2}  # not a harness's perplexity
    if not tasks and not texts:
        return None
    at_chance = [task for task, of in tasks.items() if any(map(_is_at_chance, of))]
    shown = [max(of, key=_loss) for task, of in tasks.items() if task not in at_chance]
    lost = [r for r in shown if _loss(r) > STDERRS[0]]
    levels, parts = [BAD if _loss(r) > STDERRS[1] else FAIR for r in lost], []
    if shown:
        each = [f"{r['task']} {number(r['before'])} → {number(r['after'])}" for r in lost]
        named = f" ({', '.join(each)})" if lost else ""
        parts.append(f"{len(lost)} of {len(shown)} tasks lost more than a standard error{named}")
    if at_chance:
        parts.append(f"no harm could show where guessing is as good: {', '.join(at_chance)}")
    for name, of in texts.items():
        drift = of["drift"]["after"]
        perplexity = [of["perplexity"][when] for when in ("before", "after")]
        levels += [level_of("drift", drift), level_of("rise", rise(*perplexity) or 0)]
        change = " → ".join(map(number, perplexity))
        parts.append(f"on {name}, perplexity {change} and drift {figure('drift', drift)}")
    level = worst(levels or [GOOD])
    harm = f"The model is {HARM[level]}" if shown or texts else "These tasks say nothing of harm"
    said = "; ".join(parts)
    sentence = f"{said[0].upper()}{said[1:]}. {harm}."
    return Verdict(None, level, sentence, [LESS_HARM] * (level != GOOD))


def _loss(row: dict) -> float:
    """Return how much worse a figure is after the edit, in standard errors."""
    loss = row["difference"] if row.get("less_is_better") else -row["difference"]
    error = max(row["stderr_before"], row.get("stderr_after") or 0)
    return loss / error if error else math.copysign(math.inf, loss) if loss else 0.0


def _digits(row: dict) -> int:
    return 3 if row["metric"] == "drift" else 1


def _with_stderr(row: dict, when: str) -> str:
    error = row.get(f"stderr_{when}")
    return number(row[when], _digits(row)) + ("" if error is None else f" ± {number(error)}")


def _is_at_chance(row: dict) -> bool:
    if row.get("chance") is None or row.get("stderr_before") is None:
        return False
    return abs(row["before"] - row["chance"]) <= 2 * row["stderr_before"]


def _of(name: str) -> str:
    """Return the harness's name of a task."""
    return TASKS[name][0] if name in TASKS else name


def _local(name: str, data) -> dict:
    """Return a task of the harness on the folder's file."""
    if name not in TASKS:
        raise UsageError(f"tasks: {name!r} is not one of {', '.join(TASKS)}.")
    _, metrics, reader = TASKS[name]
    docs = _read(Path(data, f"{name}.jsonl"), reader)

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
        "metric_list": [{"metric": metric} for metric in metrics],
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
    """Keep the harness's log messages out of the output, and its bars out of a log file."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    watched = sys.stderr.isatty()
    try:
        with contextlib.nullcontext() if watched else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
