"""Commands that prepare edits: settings, statistics, and the hypernetwork."""

import contextlib
import functools
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from horse_plugin.assets import DEFAULT_MODEL
from horse_plugin.cli.app import app, console
from horse_plugin.cli.options import Hparams, hparams_of, path_argument, path_option
from horse_plugin.errors import UsageError

CONFIGS = ("config.json", "adapter_config.json")  # one of which a folder of transformers has

command = functools.partial(app.command, rich_help_panel="Prepare")


@command()
def init(
    model: Annotated[str, typer.Argument(help="The model's folder, or its hub id.")],
    out: Annotated[Path, path_option(help="Folder for the two files.")] = Path(),
):
    """Write a YAML for a model, with what is found in it, and facts.json to fill in."""
    from horse_plugin.editing.settings import EXAMPLE_FACTS, yaml_for
    from horse_plugin.storage.files import reserved, write

    folder = Path(model).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in CONFIGS):
        raise UsageError(f"{model}: holds no {CONFIGS[0]}; name the folder of a model.")
    yaml, facts = out / f"{folder.resolve().name}.yaml", out / "facts.json"
    with reserved(yaml):
        if yaml.exists():
            raise UsageError(f"{yaml}: there is something already; choose another --out.")
        write(yaml, yaml_for(model))
    if not facts.exists():
        write(facts, EXAMPLE_FACTS)
    console.print(
        f"Written: {yaml}. Put your facts into {facts}, and then: "
        f"horse edit --hparams {yaml} --data {facts} --out edit",
        soft_wrap=True,
    )


@command()
def convert_hparams(
    files: Annotated[list[Path], path_argument(help="Settings of MEND, MALMEN, MEMIT or HORSE.")],
    out: Annotated[Path, path_option(help="The YAML to write.")],
):
    """Write a YAML of ours from other methods' of EasyEdit, or from the released code's files."""
    import yaml

    from horse_plugin.foreign import converted
    from horse_plugin.hparams import HORSEHyperParams, read_keys
    from horse_plugin.storage.files import reserved, write

    with reserved(out):
        if out.exists():
            raise UsageError(f"{out}: there is something already; choose a new name.")
        names = [f.name for f in fields(HORSEHyperParams)]
        keys, left_out = converted([read_keys(file) for file in files], names)
        HORSEHyperParams.from_dict(keys)  # names a value that does not do
        lines = [
            f"# from {', '.join(file.name for file in files)}",
            yaml.safe_dump(keys, sort_keys=False),
        ]
        lines += [f"# {key}: {why}." for key, why in left_out.items()]
        write(out, "\n".join(lines).rstrip() + "\n")
    console.print(f"{out}: {len(keys)} keys, and why {len(left_out)} others were left out.")


@command()
def train(
    train: Annotated[str, typer.Option(help="Training facts.")],
    val: Annotated[str, typer.Option(help="Validation facts: they choose the archive to keep.")],
    out: Annotated[Path, path_option(help="Folder for the archive.")],
    hparams: Hparams = DEFAULT_MODEL,
    edits_per_step: Annotated[
        int | None,
        typer.Option("--edits-per-step", "--n-edits", help="Facts in each training step.", min=1),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the facts.", min=1)] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUT.")] = False,
    log: Annotated[
        str | None, typer.Option(help="Where to watch it: tensorboard, trackio or wandb.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Only say steps, memory and time, after one step of it.")
    ] = False,
):
    """Train a hypernetwork; the best archive by validation score stays in OUT."""
    from horse_plugin.cli import show
    from horse_plugin.editing.archive import ARCHIVE
    from horse_plugin.evaluation.tables import number
    from horse_plugin.storage.files import locked_folder
    from horse_plugin.training.logs import ready_log
    from horse_plugin.training.trainer import HORSETrainer

    settings = hparams_of(hparams, max_epochs=epochs)
    if edits_per_step:
        settings = settings.in_steps_of(edits_per_step)
    if not resume and (out / ARCHIVE).exists():
        raise UsageError(f"{out}: holds an archive already; --resume, or name another folder.")
    if dry_run:
        trainer = HORSETrainer(settings, train, val, out=out, resume=resume)
        console.print(show.forecast(trainer.dry_run(), trainer.backbone.edit_device))
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_folder(out))
        watched = stack.enter_context(ready_log(log, out, settings.to_dict())) if log else None
        trainer = HORSETrainer(settings, train, val, out=out, resume=resume, log=watched)
        folder = trainer.run()
    if best := trainer.best:
        console.print(
            f"Best at step {best['step']}: efficacy {number(best['efficacy'])}, generalization "
            f"{number(best['generalization'])}, specificity {number(best['specificity'])}, "
            f"locality {number(best['locality'])}, drift {number(best['drift'], 3)} nats a token."
        )
    console.print(f"Archive: {folder}", soft_wrap=True)


@command()
def stats(
    hparams: Annotated[
        list[Path], path_option(help="YAML of MEMIT …, or a shipped one; repeatable.")
    ],
    corpus: Annotated[
        str, typer.Option(help="File of text or facts, a hub data-set id, or shipped.")
    ] = "shipped",
    out: Annotated[Path | None, path_option(help="Instead of the YAML's stats_dir.")] = None,
):
    """Second-moment statistics of any text, in the files that EasyEdit's MEMIT family reads."""
    from horse_plugin.comparison.baselines.stats import statistics_of_yamls

    for path in statistics_of_yamls(hparams, corpus, out):
        console.print(f"Written: {path}", soft_wrap=True)
