"""The language model: its edit modules, and its own forward pass cut in two.

Blocks below the lowest edited one (the trunk) never change, so their output is computed once and
the edited blocks (the top) run on it as often as needed. Both halves are the model's own forward
with three taps: leave at the first edited block, enter there, and keep only the answer positions
before the output head. No architecture is written out here.
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from .default_model import resolve
from .errors import UsageError
from .prompts import Batch, Prompt, batches, tokenize
from .records import Query


class _TrunkDone(Exception):
    """Carries the hidden states out of a forward pass at the first edited block."""

    def __init__(self, states):
        self.states = states


class Backbone:
    """A causal language model seen as trunk, edited blocks and head.

    Args:
        model: a Hugging Face causal language model; put into eval mode, gradients off.
        tokenizer: its tokenizer.
        inner_params: names of the edit modules, with or without ``.weight``; found when empty.
        trunk_cache_gb: memory for trunk states kept from one call to the next.

    Attributes:
        modules: name → edit module, from the lowest block to the highest.
        device: where token ids go in.
        progress: show a bar while prompts run through; off by default.

    Raises:
        UsageError: a named module is missing, or none can be found.
    """

    def __init__(self, model, tokenizer, inner_params: Sequence[str] = (), trunk_cache_gb=0.0):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.device = model.get_input_embeddings().weight.device
        self._head = model.get_output_embeddings()
        prefix, self._blocks = _find_blocks(model)
        width = model.get_input_embeddings().weight.shape[1]
        names = [n.removesuffix(".weight") for n in inner_params]
        names = names or _find_modules(prefix, self._blocks, width)
        modules = {n: _get_module(model, n) for n in names}
        self.modules = {n: modules[n] for n in _in_order(model, names)}
        self._first = min(_block_index(n, prefix) for n in self.modules)
        self.progress = False
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}
        self._room = int(trunk_cache_gb * 1e9)
        self._trunk_weights = [
            *model.get_input_embeddings().parameters(),
            *(p for block in self._blocks[: self._first] for p in block.parameters()),
        ]
        self._trunk_versions = [p._version for p in self._trunk_weights]
        self._tuple_output = False  # whether blocks return a tuple; the first trunk run tells

    @classmethod
    def load(cls, hparams) -> "Backbone":
        """Load the model that the hparams name, in the dtype and on the device they ask for."""
        name = resolve(hparams.model_name)
        device = resolve_device(hparams.device)
        kwargs = {"trust_remote_code": hparams.trust_remote_code}
        with quiet_transformers():
            tokenizer = _load(
                transformers.AutoTokenizer,
                resolve(hparams.tokenizer_name) if hparams.tokenizer_name else name,
                "tokenizer_name" if hparams.tokenizer_name else "model_name",
                **kwargs,
            )
            model, found = _load(
                transformers.AutoModelForCausalLM,
                name,
                "model_name",
                dtype=_dtype(hparams, device),
                device_map="auto" if hparams.model_parallel else None,
                output_loading_info=True,
                **kwargs,
            )
        if missing := sorted(found["missing_keys"]):
            raise UsageError(
                f"model_name: {hparams.model_name!r} lacks {len(missing)} weights that its config "
                f"asks for, such as {missing[0]}. Is it a causal language model, and whole?"
            )
        if not hparams.model_parallel:
            model.to(device)
        return cls(model, tokenizer, hparams.inner_params, hparams.trunk_cache_gb)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d, d') of each edit module: width of its input and of its output."""
        return [_shape(m) for m in self.modules.values()]

    @property
    def edit_device(self) -> torch.device:
        """Where keys, gradients and the hypernetwork live: with the lowest edit module."""
        return next(iter(self.modules.values())).weight.device

    @property
    def edit_dtype(self) -> torch.dtype:
        """The precision of everything that decides an edit: float32, or float64 for such models."""
        return torch.promote_types(self.model.dtype, torch.float32)

    def fingerprint(self) -> dict:
        """What tells this model from others: names, sizes, and norms of a few embedding rows.

        Edits leave it alone, and so does loading the same weights in another dtype.
        """
        rows = self.model.get_input_embeddings().weight
        step = max(1, len(rows) // 16)
        return {
            "name": Path(str(self.model.config.name_or_path)).name,
            "architecture": type(self.model).__name__,
            "n_blocks": len(self._blocks),
            "hidden_size": rows.shape[1],
            "vocab_size": len(rows),
            "embedding_norms": rows[::step][:16].detach().float().norm(dim=-1).tolist(),
        }

    def tokenize(self, queries: Sequence[Query], max_length: int | None = None) -> list[Prompt]:
        """Queries as prompts, no longer than ``max_length`` and what the model can read."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = [n for n in (max_length, limit) if n is not None]
        return tokenize(self.tokenizer, queries, min(limits, default=None))

    def batches(self, prompts: Sequence[Prompt], max_tokens: int, doing: str) -> Iterable[Batch]:
        """Batches on the model's device, with a progress bar where ``progress`` is set."""
        made = list(batches(prompts, max_tokens, self.device))
        return tqdm(made, desc=doing, unit="batch", leave=False, disable=not self.progress)

    def logits(self, batch: Batch) -> torch.Tensor:
        """n×vocabulary logits at the batch's answer positions."""
        return self.top(batch, self.trunk(batch))

    @torch.no_grad()
    def trunk(self, batch: Batch) -> torch.Tensor:
        """B×L×d hidden states entering the first edited block; padded positions hold anything.

        States that :meth:`keep` holds are taken from there, the others computed.
        """
        self._drop_stale()
        kept = [self._kept.get(p.inputs) for p in batch.prompts]
        missing = [i for i, states in enumerate(kept) if states is None]
        if len(missing) == len(kept):
            return self._run_trunk(batch.ids)
        if missing:
            computed = self._run_trunk(batch.ids[missing])
            for i, states in zip(missing, computed, strict=True):
                kept[i] = states[: len(batch.prompts[i].inputs)]
        return nn.utils.rnn.pad_sequence(kept, batch_first=True)

    @torch.no_grad()
    def keep(self, prompts: Sequence[Prompt], max_tokens: int):
        """Compute these prompts' trunk states now and hold them, as far as memory is allowed.

        Only this fills the memory, so what a state was computed in, and hence its last bits,
        follows from the calls of ``keep`` and nothing else.
        """
        self._drop_stale()
        new = [p for p in dict.fromkeys(prompts) if p.inputs not in self._kept]
        for batch in self.batches(new, max_tokens, "trunk"):
            if self._room <= 0:
                break
            for p, states in zip(batch.prompts, self._run_trunk(batch.ids), strict=True):
                states = states[: len(p.inputs)].clone()
                self._room -= states.nbytes
                self._kept[p.inputs] = states

    def _run_trunk(self, ids: torch.Tensor) -> torch.Tensor:
        def leave(block, args, kwargs):
            raise _TrunkDone(args[0] if args else kwargs["hidden_states"])

        def note(block, args, output):
            self._tuple_output = isinstance(output, tuple)

        with contextlib.ExitStack() as stack:
            for hook in (
                self._blocks[0].register_forward_hook(note),
                self._blocks[self._first].register_forward_pre_hook(leave, with_kwargs=True),
            ):
                stack.callback(hook.remove)
            try:
                self._forward(ids)
            except _TrunkDone as done:
                return done.states

    def _drop_stale(self):
        """Forget kept states once a weight that they came from has been written to."""
        versions = [p._version for p in self._trunk_weights]
        if versions != self._trunk_versions:
            self._room += sum(t.nbytes for t in self._kept.values())
            self._kept.clear()
            self._trunk_versions = versions

    def _forward(self, ids: torch.Tensor):
        """The model's own forward pass; whatever its config would add to the output is left out."""
        self.model.eval()
        return self.model(
            input_ids=ids,
            use_cache=False,
            return_dict=True,
            output_hidden_states=False,
            output_attentions=False,
        )

    def top(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """n×vocabulary logits at the answer positions, from the trunk's states."""

        def enter(block, args, kwargs):
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        def at_answers(head, args):
            return (args[0][batch.rows.to(args[0].device), batch.cols.to(args[0].device)],)

        with contextlib.ExitStack() as stack:
            for block in self._blocks[: self._first]:
                stack.enter_context(_skipped(block, self._tuple_output))
            first = self._blocks[self._first]
            for hook in (
                first.register_forward_pre_hook(enter, with_kwargs=True),
                self._head.register_forward_pre_hook(at_answers),
            ):
                stack.callback(hook.remove)
            if torch.is_grad_enabled() and self.device.type == "cpu":
                # The fused CPU attention is slow backwards on short sequences.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            return self._forward(batch.ids).logits

    @torch.no_grad()
    def add(self, shifts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add d×d' shifts ΔW to the named edit modules; returns the weights as they were.

        The sum is rounded once, from ``edit_dtype``. Should anything fail half-way, every
        weight is put back before the exception goes on.
        """
        before = {}
        try:
            for name, shift in shifts.items():
                module = self.modules[name]
                weight = module.weight
                before[name] = weight.detach().clone()
                shift = shift if isinstance(module, Conv1D) else shift.T
                weight.copy_(weight.to(self.edit_dtype) + shift.to(weight.device, self.edit_dtype))
        except BaseException:
            self.restore(before)
            raise
        return before

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor]):
        """Put weights that :meth:`add` returned back, bit for bit."""
        for name, weight in weights.items():
            self.modules[name].weight.copy_(weight)

    @contextlib.contextmanager
    def shifted(self, shifts: dict[str, torch.Tensor]):
        """The model with the shifts added, for the length of a ``with``."""
        before = self.add(shifts)
        try:
            yield
        finally:
            self.restore(before)

    @contextlib.contextmanager
    def weight_gradients(self):
        """Let backward passes fill a dict: name → ∂L/∂W, d×d', summed over the passes.

        Call the yielded function after each backward pass; it takes the gradients out of the
        model at once, so that half-precision sums never lose small terms.
        """
        total: dict[str, torch.Tensor] = {}

        def collect():
            for name, module in self.modules.items():
                grad = module.weight.grad.to(self.edit_device, self.edit_dtype)
                grad = grad if isinstance(module, Conv1D) else grad.T
                total[name] = total[name] + grad if name in total else grad
                module.weight.grad = None

        weights = [m.weight.requires_grad_() for m in self.modules.values()]
        try:
            yield total, collect
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None


def _load(auto_class, name: str, key: str, **kwargs):
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except Exception as error:  # whatever transformers and its file formats raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{key}: {name!r} not loaded: {reason}") from None


@contextlib.contextmanager
def _skipped(block: nn.Module, tuple_output: bool):
    """The block passes its input on. Its own ``forward`` may be an instance attribute already
    (accelerate wraps it so), and comes back as it was."""

    def identity(hidden_states, *args, **kwargs):
        return (hidden_states, None) if tuple_output else hidden_states

    had, before = "forward" in block.__dict__, block.forward
    block.forward = identity
    try:
        yield
    finally:
        if had:
            block.forward = before
        else:
            del block.forward


def _find_blocks(model) -> tuple[str, nn.ModuleList]:
    """The transformer blocks and their name: the longest list of modules of one class."""
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


def _find_modules(prefix: str, blocks: nn.ModuleList, width: int) -> list[str]:
    """The second MLP projection of the last six blocks (Sec. 2.1): in each block, the last linear
    map outside attention that leads back to the model's width."""
    names = []
    for i in range(max(0, len(blocks) - 6), len(blocks)):
        linear = [
            name
            for name, m in blocks[i].named_modules()
            if isinstance(m, (nn.Linear, Conv1D))
            and "att" not in name.lower()
            and _shape(m)[1] == width
        ]
        if not linear:
            raise UsageError(
                f"{prefix}.{i}: no MLP projection found; name inner_params in the YAML."
            )
        names.append(f"{prefix}.{i}.{linear[-1]}")
    return names


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d, d'): width of a linear map's input and of its output."""
    shape = tuple(module.weight.shape)
    return shape if isinstance(module, Conv1D) else shape[::-1]


def _get_module(model, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"inner_params: the model has no module {name!r}.") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UsageError(f"inner_params: {name!r} is a {type(module).__name__}, not a linear map.")
    return module


def _block_index(name: str, prefix: str) -> int:
    head, _, rest = name.partition(f"{prefix}.")
    index = rest.partition(".")[0]
    if head or not index.isdigit():
        raise UsageError(f"inner_params: {name!r} does not lie in a block of {prefix!r}.")
    return int(index)


def _in_order(model, names: Sequence[str]) -> list[str]:
    """The names in the order in which the model holds, and runs, its modules."""
    if len(set(names)) < len(names):
        raise UsageError("inner_params: a module is named twice.")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=order.__getitem__)


def resolve_device(device) -> torch.device:
    """What EasyEdit takes for a device: 0, "0", "cuda:0", "cpu", "auto"; None is the best one."""
    if device in (None, "", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{device}" if str(device).isdigit() else str(device)
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device: {device!r} is none; try 0, cuda:0 or cpu.") from None
    if device.type == "meta":
        raise UsageError("device: 'meta' holds no weights; try 0, cuda:0 or cpu.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: no CUDA GPU here; leave `device` out or set it to cpu.")
    return device


def _dtype(hparams, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it faster than fp32, unless the hparams say otherwise."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if hparams.dtype:
        return named[hparams.dtype]
    half = hparams.half
    if half is None:
        half = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if half else torch.float32


def _cpu_has_bf16() -> bool:
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


@contextlib.contextmanager
def quiet_transformers():
    """Keep transformers' own progress bars and warnings out of the command line's output."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
