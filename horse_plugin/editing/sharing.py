"""Archives, edits, chains and adapters on the Hugging Face hub, each with a card for people."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors
import yaml

from horse_plugin.editing.archive import ARCHIVE, HISTORY, read_network
from horse_plugin.editing.chain import NOW, Chain, read_edits
from horse_plugin.editing.delta import CHAIN_FILE, DELTA, EDIT, EditDelta
from horse_plugin.errors import HorseError, UsageError, first_line
from horse_plugin.evaluation.facts import FACTS_FILE
from horse_plugin.evaluation.metrics import ALL_FIGURES
from horse_plugin.evaluation.tables import Table, figures_of
from horse_plugin.evaluation.verdict import judge
from horse_plugin.storage.files import new_folder
from horse_plugin.storage.hub import fetch, upload
from horse_plugin.storage.schema import Maybe, check_form, finite, read_json

CARD = "README.md"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OF_EDIT = (DELTA, EDIT, "results.json", FACTS_FILE)
SHOWN = 20  # facts of an edit on its card


def push(folder, name: str, private: bool = False) -> str:
    """Put the archive, edit, chain or adapter of a folder on the hub; return its address.

    Of a chain only the edits in force go there.

    Args:
        name: ``owner/name``; what is there is replaced, as a new commit.

    Raises:
        UsageError: the folder holds none of them, or the name is none of the hub's.
        HorseError: the folder's content is damaged, or the hub refused it.
    """
    folder = Path(folder).expanduser()
    kind, card = _read(folder, name)
    files = {at: folder / at for at in _files(folder) if (folder / at).is_file()}
    if card:
        files[CARD] = card.encode()
    return upload(name, files, f"{kind}, by horse-plugin", private)


def pull(name: str, out) -> str:
    """Copy the archive, edit, chain or adapter of that name into a new folder; return its kind.

    Raises:
        UsageError: there is none of that name, or the folder is there already.
        HorseError: it is damaged, and no folder is made.
    """
    with new_folder(out) as made:
        copy = fetch(name)
        kind, _ = _read(copy, name)
        for at in (*_files(copy), CARD):
            if (copy / at).is_file():
                (made / at).parent.mkdir(exist_ok=True)
                shutil.copyfile(copy / at, made / at)
    return kind


def _files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that belong to what it holds."""
    if (folder / CHAIN_FILE).exists():
        of_edits = [f"{name}/{file}" for name in Chain(folder).in_force for file in OF_EDIT]
        return [CHAIN_FILE, NOW, *of_edits]
    return [ARCHIVE, HISTORY, *OF_EDIT, ADAPTER, ADAPTER_CONFIG, CARD]


def _read(folder: Path, name: str) -> tuple[str, str | None]:
    """Check what a folder holds as whoever reads it would; return its kind and a card for it.

    An adapter has its card already.
    """
    if (folder / ARCHIVE).exists():
        _, _, about = read_network(folder)
        check_form(folder / ARCHIVE, about, {"best": Maybe({str: Maybe(finite)})})
        return "archive", _card_of_archive(about, name)
    if (folder / CHAIN_FILE).exists() or (folder / DELTA).exists():
        return "edits", _card_of_edits(read_edits(folder), name)
    if (folder / ADAPTER_CONFIG).exists():
        read_json(folder / ADAPTER_CONFIG, {"base_model_name_or_path": str, "r": int})
        try:
            with safetensors.safe_open(folder / ADAPTER, framework="pt"):
                pass
        except Exception as error:  # whatever a damaged header provokes
            raise HorseError(f"{folder / ADAPTER}: damaged ({first_line(error)}).") from None
        return "adapter", None
    raise UsageError(f"{name}: holds no archive, no edit, no chain of edits and no adapter.")


def portable(model_name: str) -> str:
    """Return a model's name as other machines know it: its hub id, or the name of its folder."""
    is_path = model_name.startswith((".", "~", "/")) or model_name.count("/") > 1
    return Path(model_name).name if is_path or Path(model_name).is_dir() else model_name


def front(base: str, library: str, *tags: str) -> str:
    """Return the head of a card, which the hub reads."""
    head = {"base_model": base, "library_name": library, "tags": ["knowledge-editing", *tags]}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def said(delta: EditDelta) -> str:
    """Return a line on one edit: how many facts hold, and what they cost the model."""
    figures = delta.about.get("figures")
    verdict = judge(figures).sentence if figures else "Not measured."
    facts = f"{len(delta.records):,} facts" if delta.records else "the facts before it, anew"
    return f"- {delta.name}: {facts}. {verdict}"


def _head(about: dict, tag: str, title: str) -> list[str]:
    """Return the head and the title of a card; the title says {} for the base model."""
    base = portable(str(about["hparams"].get("model_name") or about["model"]["name"]))
    return [front(base, "horse-plugin", tag), f"# {title.format(base)}"]


def _card_of_archive(about: dict, name: str) -> str:
    lines = [
        *_head(about, "horse-archive", "Editing {} with HORSE"),
        "A trained hypernetwork for horse-plugin. It makes edits of facts, and holds none itself.",
        f"    horse edit --archive {name} --data facts.json --out edit",
    ]
    if best := about.get("best"):
        row = {"method": f"step {best['step']}", "dataset": "Validation records"} | best
        row |= {"n_edits": about["hparams"].get("edits_per_step", 0), "edit_seconds": None}
        lines.append(figures_of([row], ALL_FIGURES).markdown())
    return "\n\n".join(lines) + "\n"


def _card_of_edits(deltas: Sequence[EditDelta], name: str) -> str:
    if not deltas:
        raise UsageError(f"{name}: no edit is in force.")
    lines = [
        *_head(deltas[0].about, "horse-edit", "Facts edited in {}"),
        "Made with horse-plugin, which puts them into the model and takes them out, to the bit:",
        f'    horse ask "…" --delta {name}',
        "\n".join(map(said, deltas)),
    ]
    for delta in (d for d in deltas if d.records):
        facts = [[r.prompt, r.target_new] for r in delta.records[:SHOWN]]
        caption = f"{delta.name}: the first {len(facts):,} of {len(delta.records):,} facts"
        lines.append(Table(["prompt", "answer"], facts, caption, is_text=True).markdown())
        if measured := delta.about.get("figures"):
            row = {"dataset": delta.name, "n_edits": len(delta.records), "edit_seconds": None}
            rows = [row | {"method": when} | measured[when] for when in ("before", "after")]
            lines.append(figures_of(rows, ALL_FIGURES).markdown())
    return "\n\n".join(lines) + "\n"
