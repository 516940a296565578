"""A caller's model while we work on it: as we need it meanwhile, as it was handed over afterwards.

What a caller may have set reaches into every forward and backward pass: training mode, gradients of
their own fine-tuning, autocast, inference mode. And a forward pass of ours skips blocks, by hooks
and by another ``forward``, so that no two threads may run one model at the same time.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import masking_utils


class _Hold:
    """Who works on one model: a lock that its thread may take again, and how often it was taken."""

    def __init__(self):
        self.lock, self.is_held, self.turn = threading.RLock(), False, 0


# Of torch from 2.9 on, where they say in what precision they multiply float32.
_PRODUCTS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
_holds: weakref.WeakKeyDictionary[nn.Module, _Hold] = weakref.WeakKeyDictionary()
_making_a_hold = threading.Lock()


@contextlib.contextmanager
def guard(model) -> Iterator[int]:
    """Hold a model for the length of a ``with``, and give it back as it was, whatever happens.

    Inside, all modules are in eval mode, no parameter takes a gradient or has one, and autocast,
    inference mode, anomaly mode, products of float32 in TF32 or bf16, and another default dtype or
    device than float32 on the CPU are off. Afterwards all of it is as before. Only weights that
    were written stay written.

    Another thread that wants to hold the model waits, and so does one that calls the model: its
    forward pass goes on when the model is free. A guard inside a guard does nothing.

    Yields:
        A number that is another one whenever the model was free in between.
    """
    embeddings = model.get_input_embeddings()  # an adapter's model and its base share them
    with _making_a_hold:
        hold = _holds.setdefault(embeddings, _Hold())
    with hold.lock:
        if hold.is_held:
            yield hold.turn
            return
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, hold, "is_held", False)
            hold.is_held, hold.turn = True, hold.turn + 1
            stack.enter_context(_others_wait(embeddings, hold.lock))
            parameters = dict(model.named_parameters())
            kinds = {p.device.type for p in parameters.values()}
            stack.enter_context(_plain_arithmetic(kinds))
            stack.enter_context(_quiet_modules(model, parameters))
            yield hold.turn


def guarded(function: Callable) -> Callable:
    """Run a function in the guard of its first argument: a backbone, or what has one."""

    @functools.wraps(function)
    def in_guard(owner, *args, **kwargs):
        with getattr(owner, "backbone", owner).held():
            return function(owner, *args, **kwargs)

    return in_guard


@contextlib.contextmanager
def hooked(register: Callable, hook: Callable, **kwargs) -> Iterator[None]:
    """Have a hook for the length of a ``with``, in this thread only.

    Args:
        register: such as ``module.register_forward_hook``; ``kwargs`` are for it.
    """
    owner = threading.get_ident()

    def in_this_thread(*args):
        return hook(*args) if threading.get_ident() == owner else None

    handle = register(in_this_thread, **kwargs)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def with_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Give a module another ``forward`` for the length of a ``with``, in this thread only.

    Its own may be an instance attribute already, since accelerate wraps it so; it comes back as it
    was.
    """
    owner, had, own = threading.get_ident(), "forward" in module.__dict__, module.forward

    def in_this_thread(*args, **kwargs):
        return (forward if threading.get_ident() == owner else own)(*args, **kwargs)

    try:
        module.forward = in_this_thread
        yield
    finally:
        if had:
            module.forward = own
        else:
            module.__dict__.pop("forward", None)


class _NonePacked(threading.local):
    """Answers for transformers whether a batch holds packed sequences: in our passes, none does.

    Its own answer is a number of the device, for which the host would wait in each forward pass.
    """

    passes, find = 0, staticmethod(masking_utils.find_packed_sequence_indices)

    def __call__(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        return None if self.passes else self.find(position_ids)

    @contextlib.contextmanager
    def in_this_thread(self) -> Iterator[None]:
        self.passes += 1
        try:
            yield
        finally:
            self.passes -= 1


none_packed = masking_utils.find_packed_sequence_indices = _NonePacked()


@contextlib.contextmanager
def _others_wait(embeddings: nn.Module, lock) -> Iterator[None]:
    """Let forward passes of other threads begin when the lock is free."""
    owner = threading.get_ident()

    def wait(module, args):
        if threading.get_ident() != owner:
            with lock:
                pass

    handle = embeddings.register_forward_pre_hook(wait)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _plain_arithmetic(device_types: set[str]) -> Iterator[None]:
    """Switch off what a caller may have switched on around us, as far as it is on."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for kind in device_types - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
                stack.callback(torch.clear_autocast_cache)  # it holds weights from before
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if (dtype := torch.get_default_dtype()) is not torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for products in _PRODUCTS:
            if getattr(products, "fp32_precision", "none") not in ("none", "ieee"):
                stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "ieee"
        yield


@contextlib.contextmanager
def _quiet_modules(model, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Put modules into eval mode, and take parameters' gradients away for a while."""
    modes = [(m, m.training) for m in model.modules()]
    # By name, since accelerate puts other parameters in the place of those that it offloads.
    kept = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    try:
        for module, _ in modes:  # the flags alone: some adapters merge themselves in ``eval()``
            module.training = False
        for p in parameters.values():
            p.requires_grad_(False).grad = None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, p in model.named_parameters():
            requires_grad, p.grad = kept[name]
            p.requires_grad_(requires_grad)
