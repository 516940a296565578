"""The rows of a comparison: a name and a runner each.

A runner is a generator: called with a task, it yields the edited model after each of the task's
batches, each on top of those before it, and puts the model back when it is closed. To add a method,
add a row to :data:`METHODS`; to add an ablation, one to :data:`ABLATIONS`.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from horse_plugin import distributed
from horse_plugin.comparison.task import Edited, Task, records_digest
from horse_plugin.data.seam import Seam
from horse_plugin.editing.archive import ARCHIVE, read_network
from horse_plugin.editing.editor import HorseEditor
from horse_plugin.errors import UsageError
from horse_plugin.hparams import ALIASES, CHANGE_NO_FIGURE, HORSEHyperParams, canonical
from horse_plugin.model.backbone import Backbone
from horse_plugin.storage.digest import json_digest, source_digest
from horse_plugin.storage.files import write
from horse_plugin.storage.schema import Maybe, read_json
from horse_plugin.training.checkpoint import CHECKPOINT
from horse_plugin.training.schedule import described
from horse_plugin.training.trainer import HORSETrainer

# Settings are digested under the names of 0.1, where a key has one.
OLDER = {new: old for old, new in ALIASES.items() if old != "alg"}
OF_SEAM = tuple(f.name for f in fields(Seam))
OF_BACKBONE = ("inner_params", "batch_tokens", "max_length", "token", *OF_SEAM)


class Unedited:
    """The model as it is; no seed changes it."""

    seeded = False

    def settings(self, task: Task) -> dict:
        return {}

    def __call__(self, task: Task) -> Iterator[Edited]:
        for _ in task.batches:
            yield Edited(task.backbone)


@dataclass(frozen=True)
class Engine:
    """A method that our engine runs, with some hparams changed.

    An archive is trained once for each model, data set and seed, and serves every number of edits.
    """

    alg_name: str = "HORSE"
    changes: dict = field(default_factory=dict)
    trained: bool = True
    archive: str | None = None  # the folder of one trained before; None trains one
    seeded = True

    def hparams(self, task: Task) -> HORSEHyperParams:
        made = task.hparams
        if made.alg_name != self.alg_name:
            made = HORSEHyperParams.from_hparams(task.yaml(self.alg_name))
        own = {"dtype": task.hparams.dtype, "half": task.hparams.half, "archive": None}
        own |= asdict(Seam.of(task.hparams))  # edited as the model is measured
        return replace(made, device=task.hparams.device, seed=task.seed, **own | self.changes)

    def settings(self, task: Task) -> dict:
        about = {OLDER.get(k, k): v for k, v in self.hparams(task).to_dict().items()}
        for key in CHANGE_NO_FIGURE:
            del about[key]
        if about["min_edits_per_step"] is None:  # as cells were kept before there was such a key
            del about["min_edits_per_step"]
        about["preserve"] = source_digest(about["preserve"])
        about["trained"] = self.archive or self.trained
        if self.archive and (file := Path(self.archive, ARCHIVE).expanduser()).is_file():
            about["trained"] = source_digest(file)
        if self.trained:
            about |= {"train": records_digest(task.train), "val": records_digest(task.val)}
        return about

    def __call__(self, task: Task) -> Iterator[Edited]:
        hparams, backbone = self.hparams(task), task.backbone
        if any(getattr(hparams, k) != getattr(task.hparams, k) for k in OF_BACKBONE):
            backbone = Backbone.of(backbone.model, backbone.tokenizer, hparams)
        trained = {}
        if self.trained:
            folder, trained = self._archive(task, hparams, backbone)
            hparams = replace(hparams, archive=str(folder))
        editor = HorseEditor.from_backbone(backbone, hparams)
        try:
            for records in task.batches:
                with backbone.trunk_cache.for_a_while(anew=True):  # the figures before it kept some
                    seconds = editor.edit(records).about["seconds"]
                yield Edited(backbone, seconds, **trained)
        finally:
            while editor.history:
                editor.undo()

    def _archive(self, task: Task, hparams, backbone: Backbone) -> tuple[Path, dict]:
        """Return the archive's folder, and what its training took; a stopped run goes on."""
        if self.archive:
            *_, about = read_network(self.archive)
            steps = described(about["step"], canonical(about["hparams"]))
            return Path(self.archive), {"budget": f"before, {steps}"}
        if not task.train or not task.val:
            raise UsageError(f"{self.alg_name} is trained: give training and validation records.")
        name = f"{self.alg_name}-{json_digest(self.settings(task))}"
        folder = task.folder / "archives" / name
        done = folder / "trained.json"
        if done.is_file():
            about = read_json(done, {"train_seconds": Maybe((int, float)), "budget": str})
        else:
            resume = (folder / CHECKPOINT).is_file()
            start = time.perf_counter()
            trainer = HORSETrainer(hparams, task.train, task.val, folder, backbone, resume)
            trainer.run()
            about = {
                "train_seconds": None if resume else time.perf_counter() - start,
                "budget": f"{described(trainer.step, hparams.to_dict())} from {len(task.train):,}",
            }
            write(done, json.dumps(about))
        return folder, about


@dataclass(frozen=True)
class EasyEdit:
    """One of EasyEdit's own methods, with its YAML; see :mod:`horse_plugin.comparison.baselines`.

    A ``trained`` one gets the records and the number of steps that HORSE's hparams ask for;
    ``training`` changes these hparams.
    """

    name: str
    trained: bool = False
    training: dict = field(default_factory=dict)
    seeded = True

    def settings(self, task: Task) -> dict:
        keys = task.keys(self.name)
        if self.trained:
            hp = replace(task.hparams, **self.training)
            steps = [hp.edits_per_step, hp.max_epochs, hp.max_iters]
            steps += [hp.min_edits_per_step] if hp.min_edits_per_step else []  # as above
            return {"yaml": keys, "train": records_digest(task.train), "steps": steps}
        return {"yaml": keys, "corpus": source_digest(task.corpus)}

    def __call__(self, task: Task) -> Iterator[Edited]:
        path = task.yaml(self.name)
        if distributed.world_size() > 1:
            raise UsageError(f"{self.name}: EasyEdit's own methods run in one process only.")
        from horse_plugin.comparison.baselines import methods as baselines  # needs EasyEdit

        task = replace(task, hparams=replace(task.hparams, **self.training))
        yield from baselines.run(self.name, path, task)


Method = Callable[[Task], Iterator[Edited]]

# The paper's Table 1, in its order, after the model itself and before what the paper leaves out.
METHODS: dict[str, Method] = {
    "unedited": Unedited(),
    **{name: EasyEdit(name) for name in ("FT", "LoRA", "MEMIT")},
    "MEND": EasyEdit("MEND", trained=True),
    **{name: EasyEdit(name) for name in ("PMET", "EMMET")},
    **{name: EasyEdit(name) for name in ("ROME", "AlphaEdit", "UltraEdit")},
    "MALMEN": Engine("MALMEN"),
    "HORSE, untrained": Engine(trained=False),
    "HORSE": Engine(),
}

# Keys at the answer tokens of the last six blocks, one step, C̄ = I, and Eq. 7 without weights.
AS_PRINTED = {
    "token": "ans",
    "inner_params": [],
    "min_edits_per_step": None,
    "edit_sweeps": 1,
    "train_sweeps": None,
    "edit_ridge": 1.0,
    "keep_next": False,
    "full_loss": None,
    "normalizer": "feature",
    "residual_cap": None,
    "preserve": "none",
    "keep_coef": 0.0,
    "spread_strength": 1.0,
    "loc_loss": "ce",
    "strength": 0.15,
    "ridge": None,
    "edit_coef": 1.0,
    "gen_coef": 1.0,
    "loc_coef": 1.0,
}

# The paper's Table 2, and below it ours.
ABLATIONS: dict[str, Method] = {
    "HORSE": Engine(),
    "the paper as printed": Engine(changes=AS_PRINTED),
    "w/o orthogonal spread": Engine(changes={"spread": "uniform"}),
    "w/o c_i": Engine(changes={"coefficient": "none"}),
    "w/o c_i in the loss": Engine(changes={"coefficient": "edit_only"}),
    "w/o network training": Engine(trained=False),
    "one sweep": Engine(changes={"edit_sweeps": 1, "train_sweeps": None}),
    "answers without an end": Engine(changes={"keep_next": False}),
    "keys at the answer": Engine(changes={"token": "ans"}),
    "no cap on residuals": Engine(changes={"residual_cap": None}),
    "features standardised": Engine(changes={"normalizer": "feature"}),
    "Eq. 6 as printed": Engine(changes={"spread_strength": 1.0}),
    "Eq. 6 as released": Engine(changes={"spread": "released", "spread_strength": 1.0}),
    "C̄ = I": Engine(changes={"preserve_rho": 1.0}),
    "C̄ = I without KL on text": Engine(changes={"preserve": "none", "keep_coef": 0.0}),
    "C₀ only": Engine(changes={"preserve_mix": 0.0}),
    "no KL on text": Engine(changes={"keep_coef": 0.0}),
    "text by the model": Engine(changes={"preserve": "model"}),
    "MALMEN with our metric": Engine("MALMEN", changes={"preserve": "shipped"}),
    "λ from 0": Engine(changes={"ridge": None}),
    "λ fixed": Engine(changes={"train_lamda": False}),
    "cross-entropy, not KL": Engine(changes={"loc_loss": "ce", "loc_coef": 0.6}),
    "Gram-Schmidt": Engine(changes={"spread": "gram_schmidt"}),
    "decay": Engine(changes={"spread": "decay"}),
}


def choose(names: Sequence[str], table: dict[str, Method]) -> dict[str, Method]:
    """Return the named rows of a table of methods, in the table's order, whatever their case.

    Args:
        names: of rows; one with a comma in it may come in its pieces.

    Raises:
        UsageError: the table has no row of some name.
    """
    known = {tuple(name.lower().split(", ")): name for name in table}
    left = [piece for name in names for piece in name.split(", ")]
    wanted = set()
    while left:
        fitting = [k for k in known if tuple(p.lower() for p in left[: len(k)]) == k]
        if not fitting:
            raise UsageError(f"methods: {left[0]!r} is not one of {'; '.join(table)}.")
        longest = max(fitting, key=len)
        wanted.add(known[longest])
        left = left[len(longest) :]
    return {name: method for name, method in table.items() if name in wanted}
