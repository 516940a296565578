"""Finding a model's transformer blocks and, in them, its edit modules. No architecture by name."""

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from horse_plugin.errors import UsageError


def find_blocks(model) -> tuple[str, nn.ModuleList]:
    """Return the transformer blocks and their name: the longest list of modules of one class.

    Raises:
        UsageError: the model has no such list.
    """
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1
    ]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    fitting = [(name, m) for name, m in lists if depth is None or len(m) == depth]
    if not fitting:
        raise UsageError(f"{type(model).__name__}: no list of transformer blocks found in it.")
    return max(fitting, key=lambda item: len(item[1]))


def find_edit_modules(model, inner_params: Sequence[str], token: str) -> dict[str, nn.Module]:
    """Return name → edit module, in the order in which the model holds and runs them.

    Args:
        inner_params: their names, with or without ``.weight``. If empty, they are the second MLP
            projections of the last six blocks (Sec. 2.1), or of three blocks at three quarters to
            seven eighths of the depth if keys are read at the subject.
        token: where keys are read, ``ans`` or ``subject``.

    Raises:
        UsageError: a name is given twice, is missing in the model, or names no linear map.
    """
    names = [n.removesuffix(".weight") for n in inner_params] or _second_projections(model, token)
    if len(set(names)) < len(names):
        raise UsageError("inner_params: a module is named twice.")
    modules = {n: _linear(model, n) for n in names}
    return {n: modules[n] for n, _ in model.named_modules() if n in modules}


def find_last_mlp(model) -> str | None:
    """Return the name of the last block's MLP: its part that holds the second projection.

    A block that has no part for it gives None.
    """
    prefix, blocks = find_blocks(model)
    block = f"{prefix}.{len(blocks) - 1}"
    try:
        part, *inside = _second_projection(model, block).split(".")
    except UsageError:
        return None
    return f"{block}.{part}" if inside else None


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
    n = len(blocks)
    if token == "subject":  # where the answer still reads it: below the last block
        chosen = sorted({max(0, min(n - 2, round(n * share))) for share in (0.73, 0.8, 0.87)})
    else:
        chosen = range(max(0, n - 6), n)
    return [f"{prefix}.{i}.{_second_projection(model, f'{prefix}.{i}')}" for i in chosen]


def _second_projection(model, block: str) -> str:
    """Return a block's last linear map outside attention that leads back to the model's width."""
    width = model.get_input_embeddings().weight.shape[1]
    linear = [
        name
        for name, m in model.get_submodule(block).named_modules()
        if isinstance(m, (nn.Linear, Conv1D))
        and "att" not in name.lower()
        and shape_of(m)[1] == width
    ]
    if not linear:
        raise UsageError(f"{block}: no MLP projection found; name inner_params in the YAML.")
    return linear[-1]


def _linear(model, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"inner_params: the model has no module {name!r}.") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UsageError(f"inner_params: {name!r} is a {type(module).__name__}, not a linear map.")
    return module
