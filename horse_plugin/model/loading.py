"""Loading the language model that the hparams name: its files, its device and its dtype."""

import contextlib
import os
from copy import deepcopy
from pathlib import Path

import torch
import transformers

from horse_plugin import distributed
from horse_plugin.assets import DEFAULT_MODEL
from horse_plugin.assets.default_model import resolve
from horse_plugin.errors import UsageError, did_you_mean, first_line
from horse_plugin.model.modules import find_blocks, first_edited_block
from horse_plugin.model.quantising import quantised_trunk
from horse_plugin.model.sharding import check_shards, shard


def load_model(hparams):
    """Return the hparams' model and its tokenizer, in the dtype and on the device they ask for.

    Its parameters take no gradient, so that whoever calls the model keeps no graph.

    Raises:
        UsageError: there is no such model or device, or the model lacks weights.
    """
    name = resolve(hparams.model_name)
    device = resolve_device(hparams.device)
    if hparams.model_parallel and distributed.world_size() > 1:
        raise UsageError(
            "model_parallel: spreads the model over the GPUs of one process, but "
            f"{distributed.world_size()} were launched, each with the whole model. Start one "
            "process, or set model_parallel: false."
        )
    if hparams.shard_trunk:
        check_shards(hparams)
    trust = hparams.trust_remote_code
    dtype = dtype_of(hparams, device)
    places = "auto" if hparams.model_parallel else {"": device}  # past the host's memory
    with quiet_transformers():
        tokenizer = _load(
            transformers.AutoTokenizer,
            resolve(hparams.tokenizer_name) if hparams.tokenizer_name else name,
            "tokenizer_name" if hparams.tokenizer_name else "model_name",
            trust,
        )
        auto_class, quantised = _auto_class(name, trust), {}
        if hparams.trunk_bits:
            config = _load(transformers.AutoConfig, name, "model_name", trust)
            with torch.device("meta"):
                shell = auto_class.from_config(config, trust_remote_code=trust)
            quantised["quantization_config"] = quantised_trunk(shell, hparams, device, dtype)
        model, found = _load(
            auto_class,
            name,
            "model_name",
            trust,
            **quantised,
            dtype=dtype,
            device_map={"": "cpu"} if hparams.shard_trunk else places,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise UsageError(
            f"model_name: {hparams.model_name!r} lacks {len(missing)} weights that its config "
            f"asks for, such as {missing[0]}. Is it a causal language model, and whole?"
        )
    model.requires_grad_(False)
    if hparams.shard_trunk:  # out of the pages of its files, which all processes of a host share
        first = first_edited_block(model, hparams.inner_params, hparams.token)
        shard(model, find_blocks(model)[1][:first], device)
    return model, tokenizer


def random_model(config: str, hparams):
    """Return a model of that config with random weights, to time, and a tokenizer.

    The tokenizer is the one that the hparams name, or else the default model's.

    Args:
        config: a folder or a JSON file with a Hugging Face config. A vocabulary smaller than the
            tokenizer's is enlarged to it.

    Raises:
        UsageError: there is no such config or device.
    """
    device = resolve_device(hparams.device)
    trust = hparams.trust_remote_code
    with quiet_transformers():
        name = resolve(hparams.tokenizer_name or DEFAULT_MODEL)
        tokenizer = _load(transformers.AutoTokenizer, name, "tokenizer_name", trust)
        made = _load(transformers.AutoConfig, str(config), "config", trust)
        made.vocab_size = max(made.vocab_size, len(tokenizer))
        with device, own_random_numbers():
            torch.manual_seed(hparams.seed)  # several processes make the same model
            model = transformers.AutoModelForCausalLM.from_config(
                made, dtype=dtype_of(hparams, device), trust_remote_code=trust
            )
    return model, tokenizer


def _auto_class(name: str, trust: bool):
    """Return the class that loads a model of that name as one that writes text."""
    writes, sees = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except Exception:  # an adapter's folder has none; the class that writes says what is wrong
        return writes
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return writes
    has_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return sees if has_images else writes  # which has code of its own, or says what is wrong


def _load(auto_class, name: str, key: str, trust: bool, **kwargs):
    """Load what a key names; code that comes with it runs only if ``trust`` says so, unasked."""
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise UsageError(f"{key}: no such folder: {name}.{_near(name)}")
    try:
        return auto_class.from_pretrained(name, trust_remote_code=trust, **kwargs)
    except Exception as error:  # whatever transformers and its file formats raise
        problem, hint = first_line(error), "" if Path(name).exists() else _near(name)
        if "trust_remote_code" in str(error):
            problem = "it needs code that comes with it. Read it, and set trust_remote_code: true."
            hint = ""
        elif auto_class is transformers.AutoTokenizer and key == "model_name" and not hint:
            hint = " If only its tokenizer is missing, name one with tokenizer_name."
        raise UsageError(f"{key}: {name!r} not loaded: {problem}{hint}") from None


def _near(name: str) -> str:
    """Return a question that names the default model or a folder of a model beside this one."""
    beside = Path(name).expanduser().parent.glob("*/config.json")
    return did_you_mean(name, [DEFAULT_MODEL, *(str(path.parent) for path in beside)])


def resolve_device(device) -> torch.device:
    """Return the device of a name that EasyEdit takes: 0, "0", "cuda:0", "cpu", "auto".

    None is the best device there is. Of several processes each has its own GPU, whichever was
    named.

    Raises:
        UsageError: there is no such device.
    """
    distributed.initialize()
    if device in (None, "", "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{device}" if str(device).isdigit() else str(device)
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device: {device!r} is not a device; try 0, cuda:0 or cpu.") from None
    if device.type == "meta":
        raise UsageError("device: 'meta' holds no weights; try 0, cuda:0 or cpu.")
    if device.type == "mps":
        raise UsageError("device: 'mps' has no float64, which edits are solved in; set it to cpu.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: no CUDA GPU here; leave `device` out or set it to cpu.")
    if device.type == "cuda" and (device.index is None or distributed.world_size() > 1):
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise UsageError(f"device: there is no GPU {device.index}; {n} are here, from 0 on.")
    return device


def dtype_of(hparams, device: torch.device) -> torch.dtype:
    """Return bf16 where the hardware multiplies it faster than fp32, or what the hparams say."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if hparams.dtype:
        return named[hparams.dtype]
    half = hparams.half
    if half is None:
        half = _gpu_has_bf16(device) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if half else torch.float32


def _gpu_has_bf16(device: torch.device) -> bool:
    """Return whether a GPU multiplies bf16 itself; those before Ampere emulate it."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    """Return whether the CPU has bf16, and torch may use it (``ATEN_CPU_CAPABILITY``)."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model to edit.

    Raises:
        UsageError: accelerate spreads the model over devices; the hooks of a copy run the model.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UsageError("copy: a model that accelerate spreads over devices has no copy to edit.")
    return deepcopy(model)


def gpus_in_use() -> list[int]:
    """Return the GPUs of this process: none before it uses one."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def own_random_numbers() -> contextlib.AbstractContextManager:
    """Have random numbers of one's own inside a ``with``; the caller's go on after it."""
    return torch.random.fork_rng(devices=gpus_in_use())


def pad_with_eos(tokenizer, side: str = "left"):
    """Have the tokenizer pad with its EOS token on one side, as EasyEdit does; returns it."""
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    return tokenizer


@contextlib.contextmanager
def quiet_transformers():
    """Keep transformers' own progress bars and warnings out of the command line's output."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
