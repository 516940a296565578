"""The weights of the edit modules: adding shifts, restoring them bit for bit, their gradients."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from horse_plugin.errors import HALF_PRECISION_HINT, HorseError
from horse_plugin.method.finite import all_finite
from horse_plugin.model.modules import shape_of
from horse_plugin.storage.digest import weight_digest

Tensors = dict[str, torch.Tensor]


@contextlib.contextmanager
def copied_to_host(tensors: Tensors) -> Iterator[Tensors]:
    """Yield tensors on the CPU, those of GPUs as copies that are whole when the ``with`` ends.

    A GPU copies them into pinned memory in a stream of its own, beside its work in the ``with``,
    which must not change them.
    """
    streams, found = {}, {}
    try:
        for name, t in tensors.items():
            if t.device.type != "cuda":
                found[name] = t.cpu()
                continue
            if t.device not in streams:
                streams[t.device] = torch.cuda.Stream(t.device)
                streams[t.device].wait_stream(torch.cuda.current_stream(t.device))
            found[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            with torch.cuda.stream(streams[t.device]):
                found[name].copy_(t, non_blocking=True)
        yield found
    finally:
        for stream in streams.values():
            stream.synchronize()


class EditWeights:
    """The weights of a model's edit modules.

    Args:
        modules: name → edit module, from the lowest to the highest.
        dtype: the precision of shifts and gradients.
    """

    def __init__(self, modules: dict[str, nn.Module], dtype: torch.dtype):
        self.modules, self.dtype = modules, dtype

    def add(self, shifts: Mapping[str, torch.Tensor]) -> Tensors:
        """Add shifts to the weights, and return the weights as they were.

        Should anything fail half-way, every weight is put back before the exception goes on.

        Args:
            shifts: module name → ΔW, d×d'.

        Raises:
            HorseError: as :meth:`move`.
        """
        with self.all_or_nothing() as before:
            self.move(shifts)
        return before

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[Tensors]:
        """Yield copies of the weights, which are put back if the ``with`` raises an exception."""
        before = self.clones()
        try:
            yield before
        except BaseException:
            self.restore(before)
            raise

    @torch.no_grad()
    def move(self, shifts: Mapping[str, torch.Tensor]):
        """Add shifts to the weights. Use it inside :meth:`all_or_nothing`.

        The sum is computed in ``dtype`` and rounded once.

        Args:
            shifts: module name → ΔW, d×d'.

        Raises:
            HorseError: a shift has another shape than its weight, or the sum is not finite; the
                message names the module. Some weights may have moved.
        """
        for name, shift in shifts.items():
            module = self.modules[name]
            weight = module.weight
            shift = shift if isinstance(module, Conv1D) else shift.T
            if shift.shape != weight.shape:
                raise HorseError(
                    f"{name}: the shift is {tuple(shift.shape)}, the weight {tuple(weight.shape)}."
                )
            weight.copy_(weight.to(self.dtype) + shift.to(weight.device, self.dtype))
            if not all_finite(weight):
                raise HorseError(f"{name}: the edited weight is not finite. {HALF_PRECISION_HINT}")
            del shift  # the next one may be made just now

    def clones(self) -> Tensors:
        """Return copies of the weights as they are now, for :meth:`restore`."""
        return {name: module.weight.detach().clone() for name, module in self.modules.items()}

    @torch.no_grad()
    def restore(self, weights: Tensors):
        """Put weights that :meth:`add` or :meth:`clones` returned back, bit for bit."""
        for name, weight in weights.items():
            self.modules[name].weight.copy_(weight)

    @contextlib.contextmanager
    def shifted(self, shifts: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Add the shifts for the length of a ``with``."""
        before = self.add(shifts)
        try:
            yield
        finally:
            self.restore(before)

    def digests(self) -> dict[str, str]:
        """Return a digest of every weight as it is now, to the bit."""
        return {name: weight_digest(module.weight) for name, module in self.modules.items()}

    @contextlib.contextmanager
    def gradients(self, device: torch.device) -> Iterator[tuple[Tensors, Callable[[], None]]]:
        """Collect ∂L/∂W over several backward passes.

        Yields:
            name → ∂L/∂W, d×d', summed over the passes, on the device; and a function to call after
            each backward pass. That function takes the gradients out of the model at once, so that
            sums in half precision never lose small terms.
        """
        where = {"device": device, "dtype": self.dtype}
        total = {name: torch.zeros(shape_of(m), **where) for name, m in self.modules.items()}

        def collect():
            for name, module in self.modules.items():
                grad = module.weight.grad
                total[name] += (grad if isinstance(module, Conv1D) else grad.T).to(**where)
                module.weight.grad = None

        weights = [m.weight.requires_grad_() for m in self.modules.values()]
        try:
            yield total, collect
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None
