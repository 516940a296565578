"""A trunk that bitsandbytes quantises as it is loaded; what edits change stays as it is."""

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from horse_plugin.errors import UsageError, not_installed
from horse_plugin.model.modules import find_blocks, first_edited_block


def quantised_trunk(
    model, hparams, device: torch.device, dtype: torch.dtype
) -> transformers.BitsAndBytesConfig:
    """Return what makes transformers quantise the linear maps below the lowest edited block.

    Args:
        model: the model, maybe on the meta device.
        hparams: ``inner_params`` and ``token`` say which blocks are edited.
        device: where the model will be.
        dtype: of the model, and of its products.

    Raises:
        UsageError: bitsandbytes is missing or too old, does not know the device, or there is no
            such block.
    """
    try:
        from bitsandbytes import supported_torch_devices
    except ImportError as error:
        raise not_installed("trunk_bits", error, "quantised") from None
    if device.type not in supported_torch_devices:
        raise UsageError(f"trunk_bits: bitsandbytes does not know the device {device}.")
    first = first_edited_block(model, hparams.inner_params, hparams.token)
    prefix, _ = find_blocks(model)
    if not first:
        raise UsageError("trunk_bits: the lowest block is edited (inner_params), so none is left.")
    trunk = tuple(f"{prefix}.{i}." for i in range(first))
    maps = (name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[name for name in maps if not name.startswith(trunk)],
    )
