"""Backward passes of the positions that need a gradient, and of no others.

In a causal model the gradient at a position comes from that position and those after it. So where
gradients are read from a prompt's first key on, none of the positions before it counts, and the
products of linear maps with gradients, most of a backward pass, leave them out.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from horse_plugin.model.guard import with_forward
from horse_plugin.model.modules import find_plain_maps


@contextlib.contextmanager
def gradients_at(
    blocks: Sequence[nn.Module], positions: torch.Tensor, n_positions: int
) -> Iterator[None]:
    """Let forward passes in a ``with`` have gradients at some positions only.

    At the other positions gradients are wrong afterwards, and weights get none.

    Args:
        blocks: the transformer blocks whose linear maps leave positions out.
        positions: those with a gradient, for each prompt all from one on. They count the positions
            of all prompts in sequence.
        n_positions: how many there are in a pass. A linear map that is given another number of
            rows, as the last block's MLP is, has gradients at all of them.
    """
    on_device = {positions.device: positions}
    with contextlib.ExitStack() as stack:
        for module in find_plain_maps(blocks):
            device = module.weight.device
            if device not in on_device:
                on_device[device] = positions.to(device, non_blocking=True)
            forward = _forward(module, on_device[device], n_positions)
            stack.enter_context(with_forward(module, forward))
        yield


def _forward(module: nn.Module, positions: torch.Tensor, n_positions: int) -> Callable:
    """Return what a linear map runs instead of its own forward pass."""
    own = module.forward

    def forward(*args, **kwargs) -> torch.Tensor:
        if len(args) == 1 and not kwargs:
            (x,) = args
            if x.requires_grad and x.shape[:-1].numel() == n_positions:
                return _Linear.apply(x, own, module, positions)
        return own(*args, **kwargs)

    return forward


class _Linear(torch.autograd.Function):
    """A linear map whose backward pass leaves positions out; forward it is the map itself."""

    @staticmethod
    def forward(ctx, x, own, module, positions):
        ctx.module, ctx.positions = module, positions
        ctx.like = {"size": x.shape, "device": x.device}  # a hook may take x to the weight's device
        return own(x).detach()  # what a view of our making is not: one may write into it

    @staticmethod
    def backward(ctx, grad):
        weight, at = ctx.module.weight, ctx.positions
        weight = weight.T if isinstance(ctx.module, Conv1D) else weight
        found = grad.flatten(0, -2).to(weight.device)[at] @ weight
        whole = grad.new_zeros(**ctx.like)
        whole.flatten(0, -2)[at.to(whole.device)] = found.to(whole.device)
        return whole, None, None, None
