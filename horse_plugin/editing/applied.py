"""The edits in a model: put on, taken back, and what the model was without them."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from horse_plugin.data.records import EditRecord
from horse_plugin.editing.archive import check_made_for
from horse_plugin.editing.delta import EditDelta
from horse_plugin.errors import HorseError, UsageError
from horse_plugin.model.backbone import Backbone
from horse_plugin.model.guard import guarded
from horse_plugin.model.weights import copied_to_host
from horse_plugin.storage.digest import matches


@dataclass(frozen=True)
class _State:
    """What was done to a model, remembered in one piece.

    Attributes:
        edits: those in force, oldest first.
        digests: of the weights as the editor left them.
        original_weights: module name → weight before the first edit, on the CPU.
    """

    edits: tuple[EditDelta, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    original_weights: dict[str, torch.Tensor] = field(default_factory=dict)


class AppliedEdits:
    """The edits in a model; each can be taken back, bit for bit.

    The weights are always the original ones plus the edits in :attr:`history`, added in that
    order. Undoing an edit, the last or any other, sets them to the original ones plus the rest.

    What is not guarded here is for callers that hold the model's guard (``model/guard.py``).

    Attributes:
        backbone: the model as :class:`horse_plugin.Backbone`.
        original_weights: module name → weight before the first edit in force, on the CPU.
    """

    backbone: Backbone
    _state = _State()

    @property
    def history(self) -> list[EditDelta]:
        """The edits that are in the model now, oldest first."""
        return list(self._state.edits)

    @property
    def facts_in_force(self) -> list[EditRecord]:
        """The facts of all edits in the model; of several with one prompt, the last one."""
        return list({r.asks: r for delta in self._state.edits for r in delta.records}.values())

    @property
    def original_weights(self) -> dict[str, torch.Tensor]:
        return self._state.original_weights

    def shifts_in_force(self) -> list[torch.Tensor]:
        """Return D of each edit module, the sum of the shifts in the model, d×d'."""
        where = {"device": self.backbone.edit_device, "dtype": self.backbone.edit_dtype}
        total = [torch.zeros(shape, **where) for shape in self.backbone.shapes]
        for delta in self._state.edits:
            for name, shift in zip(self.backbone.modules, total, strict=True):
                shift += delta.shift(name, where["device"])
        return total

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """Put the original weights into the model for the length of a ``with``."""
        before = self.backbone.weights.clones()
        try:
            self.backbone.weights.restore(self.original_weights)
            yield
        finally:
            self.backbone.weights.restore(before)

    def new_name(self) -> str:
        """Return a number that no edit in :attr:`history` has for a name."""
        names = {d.name for d in self._state.edits}
        numbers = (f"{i:03d}" for i in itertools.count(len(names) + 1))
        return next(n for n in numbers if n not in names)

    def apply(self, delta: EditDelta):
        """Add a delta to the model, such as a loaded one.

        It must have been made on the weights as they are now, or as they were before all edits of
        this editor, so that several edits of one model can be combined; one that
        is applied twice counts twice. A model in another dtype will do if its weights round to the
        very weights that the edit was made on, such as a bf16 model that was loaded in fp32.

        Raises:
            UsageError: the delta was made for another model, other modules or other weights.
            HorseError: the weights were changed from outside since this editor's last edit.
        """
        self._apply([delta], "weights")

    def apply_chain(self, deltas: Sequence[EditDelta]):
        """Add deltas that were made one on top of the other, all of them or none.

        The first must have been made on the weights as they are now; undone edits are left out.

        Raises:
            UsageError, HorseError: as :meth:`apply`.
        """
        self._apply(deltas, "original")

    @guarded
    def _apply(self, deltas: Sequence[EditDelta], made_on: str):
        now, done = self.current_digests(), self.history
        known = [now, *(d.about["original"] for d in done[:1])]
        here = [{name: m.weight for name, m in self.backbone.modules.items()}]
        here += [self.original_weights] if done else []
        for delta in deltas:
            check_made_for(delta.name, delta.about, self.backbone)
            wanted = delta.about[made_on]
            if wanted not in known and not any(_differing(w, wanted) is None for w in here):
                module = _differing(here[0], wanted)
                dtype = str(wanted.get(module)).partition(":")[0]
                raise UsageError(
                    f"{delta.name}: made on other {dtype} weights of {module} than this model "
                    "has. Load the model in that dtype, and apply first what it was made on top of."
                )
            known.append(wanted)
        with self.all_or_nothing() as before:
            for i, delta in enumerate(deltas):
                self.put_on(delta, self.backbone.weights.clones() if i else before)

    @property
    @guarded
    def changed(self) -> str | None:
        """The name of an edit module whose weight others changed since the last edit, or None."""
        return self._changed(self.backbone.weights.digests())

    def _changed(self, now: dict[str, str]) -> str | None:
        left = self._state.digests
        return next((m for m in now if left and now[m] != left[m]), None)

    def current_digests(self) -> dict[str, str]:
        """Return the digests of the weights now, which must be as this editor left them.

        Raises:
            HorseError: others changed one since this editor's last edit.
        """
        now = self.backbone.weights.digests()
        if module := self._changed(now):
            raise HorseError(
                f"{module}: its weight was changed by others since this editor's last edit. "
                "undo(force=True) overwrites the change; a new HorseEditor starts from it."
            )
        return now

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield copies of the weights; after an exception weights and history are as before."""
        state = self._state
        try:
            with self.backbone.weights.all_or_nothing() as before:
                yield before
        except BaseException:
            self._state = state
            raise

    def put_on(self, delta: EditDelta, before: dict[str, torch.Tensor]):
        """Put a delta on top, inside :meth:`all_or_nothing`.

        Args:
            before: copies of the weights as they are now.
        """
        edits, weights = self._state.edits, self.backbone.weights
        with copied_to_host({} if edits else before) as originals:
            weights.move(delta.lazy_shifts(self.backbone.edit_device))
            delta.tensors = {name: t.cpu() for name, t in delta.tensors.items()}
            delta.about.setdefault("moved", self._moved(before))
            digests = weights.digests()
        original = self.original_weights if edits else originals
        self._state = _State((*edits, delta), digests, original)

    def _moved(self, before: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return how far each weight moved: ‖W − W before‖/‖W before‖ (Frobenius)."""
        dtype, modules = self.backbone.edit_dtype, self.backbone.modules
        return {
            name: (
                (modules[name].weight.to(dtype) - w.to(dtype)).norm() / w.to(dtype).norm()
            ).item()
            for name, w in before.items()
        }

    @guarded
    def undo(self, which: int | str = -1, force: bool = False) -> EditDelta:
        """Take an edit back.

        Every bit is as if the other edits had been applied to the original model in their order;
        without other edits, as before the first edit.

        Args:
            which: the edit's index in :attr:`history`, or its name; the last one by default.
            force: undo even if others changed the weights meanwhile; their change is lost.

        Returns:
            The delta that was taken back.

        Raises:
            UsageError: there is no such edit.
            HorseError: there is no edit to undo, or the weights were changed from outside since
                this editor's last edit.
        """
        edits = self._state.edits
        if not edits:
            raise HorseError("undo: this editor has made no edit.")
        names = [d.name for d in edits]
        if which in names:
            index = len(names) - 1 - names[::-1].index(which)
        elif isinstance(which, int) and -len(names) <= which < len(names):
            index = which % len(names)
        else:
            raise UsageError(f"undo: no edit {which!r}; there are {', '.join(names)}.")
        if not force:
            self.current_digests()
        with self.all_or_nothing():
            self.backbone.weights.restore(self.original_weights)
            left = (*edits[:index], *edits[index + 1 :])
            for delta in left:
                self.backbone.weights.move(delta.lazy_shifts(self.backbone.edit_device))
            digests = self.backbone.weights.digests()
            self._state = _State(left, digests, self.original_weights) if left else _State()
        return edits[index]

    @staticmethod
    def load_delta(folder) -> EditDelta:
        """Return a delta that :meth:`EditDelta.save` wrote; :meth:`apply` puts it into a model."""
        return EditDelta.load(folder)


def _differing(weights: dict[str, torch.Tensor], digests: dict[str, str]) -> str | None:
    """Return the first module whose weight, rounded to its digest's dtype, has another digest."""
    return next((m for m, w in weights.items() if not matches(w, digests.get(m))), None)
