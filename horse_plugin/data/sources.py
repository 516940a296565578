"""Where facts lie: JSON, JSONL and Parquet files, and data sets of the hub, as plain objects."""

import json
from pathlib import Path

from horse_plugin.errors import UsageError, first_line


def read_items(source) -> list:
    """Return the objects that a source holds.

    Args:
        source: a JSON, JSONL or Parquet file, or a hub data set, optionally with its split
            (``owner/name:train``).

    Raises:
        UsageError: the source is missing or cannot be read.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".parquet"):
        if not path.is_file():
            raise UsageError(f"{path}: no such file.")
        if suffix == ".parquet":
            return _read_dataset("parquet", path)
        return _read_json(path) if suffix == ".json" else _read_jsonl(path)
    if path.exists():
        raise UsageError(f"{path}: expected a .json, .jsonl or .parquet file.")
    return _read_dataset(str(source), None)


def _read_json(path: Path) -> list:
    text = _text(path)
    try:
        raw = _parse(path, text, "")
    except UsageError:
        if not text.lstrip().startswith("{"):
            raise
        return _read_jsonl(path)  # a common name for JSON Lines, too
    if not isinstance(raw, list):
        raise UsageError(f"{path}: expected a list of records, found {type(raw).__name__}.")
    return raw


def _read_jsonl(path: Path) -> list:
    # Not splitlines(), which also breaks at marks that JSON strings may hold.
    lines = enumerate(_text(path).split("\n"), start=1)
    return [_parse(path, line, f"line {i}: ") for i, line in lines if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as UTF-8 text ({error}).") from None


def _parse(path: Path, text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {where}not valid JSON ({error}).") from None


def _read_dataset(name: str, file: Path | None) -> list:
    import datasets  # a second to import, and JSON files do not need it

    name, _, split = name.partition(":")
    try:
        kwargs = {"data_files": str(file)} if file else {}
        datasets.disable_progress_bars()
        return list(datasets.load_dataset(name, split=split or "train", **kwargs))
    except Exception as error:  # datasets raises whatever its readers and the hub raise
        raise UsageError(f"{file or name}: could not be read ({first_line(error)}).") from None
