"""Finding a model's transformer blocks and, in them, its edit modules. No architecture by name."""

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from horse_plugin.errors import UsageError

_EVERY_TOKEN = (
    "HORSE edits what every token passes: a dense MLP or a shared expert, or else the attention's "
    "output projections, if inner_params names them."
)


def find_blocks(model) -> tuple[str, nn.ModuleList]:
    """Return the transformer blocks and their name.

    They are the longest list as long as the model is deep: that of the language model, where a
    model for images has one, too.

    Raises:
        UsageError: the model has no such list.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    fitting = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList)
        and (len(m) == depth or (depth is None and len({type(b) for b in m}) == 1))
    ]
    if not fitting:
        raise UsageError(f"{type(model).__name__}: no list of transformer blocks found in it.")
    return max(fitting, key=lambda item: (item[1] in inside, len(item[1])))


def find_edit_modules(model, inner_params: Sequence[str], token: str) -> dict[str, nn.Module]:
    """Return name → edit module, in the order in which the model holds and runs them.

    Args:
        inner_params: their names, with or without ``.weight``. If empty, they are the second MLP
            projections of the last six blocks (Sec. 2.1), or of three blocks at three quarters to
            seven eighths of the depth if keys are read at the subject.
        token: where keys are read, ``ans`` or ``subject``.

    Raises:
        UsageError: a name is given twice, is missing in the model, or names no linear map whose
            weight can be edited; the message says what to do.
    """
    names = _edit_names(model, inner_params, token)
    if len(set(names)) < len(names):
        raise UsageError("inner_params: a module is named twice.")
    modules = {n: _linear(model, n) for n in names}
    for name, module in modules.items():
        if _is_routed(name):
            raise UsageError(f"inner_params: {name!r} belongs to an expert. {_EVERY_TOKEN}")
        _check_weight(name, module)
    _check_apart(modules)
    return {n: modules[n] for n, _ in model.named_modules() if n in modules}


def first_edited_block(model, inner_params: Sequence[str], token: str) -> int:
    """Return the index of the lowest edited block; its weights may be anywhere, or meta.

    Args:
        inner_params, token: as in :func:`find_edit_modules`.
    """
    prefix, _ = find_blocks(model)
    return min(block_index(n, prefix) for n in _edit_names(model, inner_params, token))


def find_last_mlp(model) -> str | None:
    """Return the name of the last block's MLP: its part that holds the second projection.

    A block that has no part for it gives None.
    """
    prefix, blocks = find_blocks(model)
    block = f"{prefix}.{len(blocks) - 1}"
    part, *inside = (_second_projection(model, block) or "").split(".")
    return f"{block}.{part}" if inside else None


def _edit_names(model, inner_params: Sequence[str], token: str) -> list[str]:
    names = [_of_base(model, n.removesuffix(".weight")) for n in inner_params]
    return names or _second_projections(model, token)


def block_index(name: str, prefix: str) -> int:
    """Return the index of the block, of those called ``prefix``, that the module lies in."""
    head, _, rest = name.partition(f"{prefix}.")
    index = rest.partition(".")[0]
    if head or not index.isdigit():
        raise UsageError(f"inner_params: {name!r} does not lie in a block of {prefix!r}.")
    return int(index)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (d, d'), the widths of a linear map's input and of its output."""
    shape = tuple(module.weight.shape)
    return shape if isinstance(module, Conv1D) else shape[::-1]


def _second_projections(model, token: str) -> list[str]:
    """Return the second MLP projections of the blocks that are edited by default."""
    prefix, blocks = find_blocks(model)
    found = {i: _second_projection(model, f"{prefix}.{i}") for i in range(len(blocks))}
    found = {i: name for i, name in found.items() if name}  # others have experts or no MLP
    n = len(blocks)
    if not found:
        kind = type(model).__name__
        if _has_experts(blocks):
            raise UsageError(f"{kind}: a mixture of experts without a shared one. {_EVERY_TOKEN}")
        raise UsageError(f"{kind}: no MLP projection found; name inner_params in the YAML.")
    if token == "subject":  # where the answer still reads it: below the last block
        lower = [i for i in found if i < n - 1] or list(found)
        nearest = {min(lower, key=lambda i: abs(i - round(n * x))) for x in (0.73, 0.8, 0.87)}
        chosen = sorted(nearest)
    else:
        chosen = sorted(found)[-6:]
    return [f"{prefix}.{i}.{found[i]}" for i in chosen]


def _second_projection(model, block: str) -> str | None:
    """Return a block's linear map from its widest inner width back to the model's, or None.

    Attention, other maps that mix tokens, norms, adapters and routed experts have none.
    """
    embeddings = model.get_input_embeddings().weight  # narrower than the blocks in some models
    width = getattr(model.config.get_text_config(), "hidden_size", embeddings.shape[1])
    modules = dict(model.get_submodule(block).named_modules())
    found = [
        name
        for name, m in modules.items()
        if isinstance(m, (nn.Linear, Conv1D))
        and shape_of(m)[1] == width
        and shape_of(m)[0] > 1
        and not _is_off_the_path(name, modules)
    ]
    # Of several as wide as each other the last one.
    return max(reversed(found), key=lambda name: shape_of(modules[name])[0], default=None)


def _is_off_the_path(name: str, modules: dict[str, nn.Module]) -> bool:
    """Return whether a block's linear map is no part of what each token passes by itself."""
    path = name.split(".")
    above = [modules[".".join(path[:i])] for i in range(1, len(path))]
    mixes = any(isinstance(m, nn.Conv1d) for parent in above for m in parent.children())
    is_adapter = any(
        hasattr(parent, "base_layer") and path[i + 1] != "base_layer"
        for i, parent in enumerate(above)
    )
    named = any(part in name.lower() for part in ("att", "norm"))
    return named or mixes or is_adapter or _is_routed(name)


def _is_routed(name: str) -> bool:
    """Return whether a router sends only some tokens through a module of that name."""
    return any("expert" in part and "shared" not in part for part in name.split("."))


def _has_experts(blocks: nn.ModuleList) -> bool:
    return any("expert" in name for name, _ in blocks.named_modules())


def _of_base(model, name: str) -> str:
    """Return the name of the map that an adapter wraps, or the name itself."""
    with contextlib.suppress(AttributeError):
        if hasattr(model.get_submodule(name), "base_layer"):
            return f"{name}.base_layer"
    return name


def _linear(model, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"inner_params: the model has no module {name!r}.") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UsageError(f"inner_params: {name!r} is a {type(module).__name__}, not a linear map.")
    return module


def _check_weight(name: str, module: nn.Module):
    """Refuse a weight that no shift can be added to."""
    if parametrize.is_parametrized(module):
        raise UsageError(
            f"{name}: its weight is computed from others. Remove the parametrization first, with "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )
    weight = module.weight
    if type(weight) is torch.Tensor:
        raise UsageError(
            f"{name}: its weight is no parameter, but computed before each pass, as by "
            "torch.nn.utils.weight_norm. Remove that first."
        )
    if weight.is_meta:
        raise UsageError(
            f"{name}: its weight is offloaded to CPU or disk. Load the model where the edit "
            "modules fit, or in a smaller dtype."
        )
    if not is_plain(weight) or weight.dim() != 2:
        kind = type(weight).__name__
        if type(weight) is nn.Parameter:
            kind = str(weight.dtype).removeprefix("torch.")
        raise UsageError(
            f"{name}: its weight is quantised or packed ({kind}). Load the model unquantised, or "
            "edit the full model and put the edit on the quantised one as an adapter "
            "(horse export --lora)."
        )


def is_plain(weight: torch.Tensor) -> bool:
    """Return whether a weight holds its numbers itself: neither quantised, packed nor computed."""
    is_tensor = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    return is_tensor and weight.is_floating_point()


def find_plain_maps(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the linear maps in blocks of which nothing but their weight decides the gradient.

    Those of routed experts, which get tokens in an order of their own, are left out, and so are
    those whose ``forward`` was replaced by others than accelerate.
    """
    return [
        m
        for block in blocks
        for name, m in block.named_modules()
        if type(m) in (nn.Linear, Conv1D)
        and is_plain(m.weight)
        and not m.weight.is_meta
        and not _is_routed(name)
        and ("forward" not in vars(m) or hasattr(m, "_hf_hook"))
    ]


def _check_apart(modules: dict[str, nn.Module]):
    """Refuse two modules whose weights share memory: each would be edited twice."""
    spans = []
    for name, module in modules.items():
        start = module.weight.data_ptr()
        spans.append((str(module.weight.device), start, start + module.weight.nbytes, name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise UsageError(
                f"{name} and {other} share one weight. Name one of them in inner_params."
            )
