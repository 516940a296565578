"""Two devices that no machine needs to have: tensors that say ``cpu:1`` or ``cpu:2``.

Each wraps a tensor of the CPU, which does the work. As on GPUs, an operation on tensors of two
devices is an error, and whatever makes the host wait for a device is counted.
"""

import accelerate
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

HOST, FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1), torch.device("cpu", 2)
COPIES = {"aten::_to_copy", "aten::copy_"}
# What a GPU can only do once the host has read a number of it, and what hands a number over.
READ = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
READ |= {"aten::_unique2", "aten::repeat_interleave"}
INDEXED = {"aten::index", "aten::index_put_", "aten::index_put"}


class Placed(torch.Tensor):
    """A tensor of a device that is not there."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.shape,
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=device,
        )
        made.on_host = on_host
        return made

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: used outside of Places")


class Places(TorchDispatchMode):
    """Runs what tensors of the two devices ask for.

    Attributes:
        waits: what made the host wait for a device, in order.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __enter__(self):
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # of other types, too
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        # As in torch, single numbers go along; ``torch.tensor`` knows no device that is not there,
        # with which transformers makes an empty cache.
        devices = {t.device for t in tensors if (t.dim() and t.numel()) or t.device != HOST}
        to = next((d for d in devices if d != HOST), HOST)
        if kwargs.get("device"):
            to = torch.device(kwargs["device"])
        elif name in COPIES:
            to = args[0].device
        elif name in INDEXED:
            to = args[0].device
            devices.discard(HOST)
        if name not in COPIES and len(devices) > 1:
            raise RuntimeError(f"{name}: tensors of {devices}")
        if self._waits(name, args, kwargs, tensors, to):
            self.waits.append(name)
        plain_args, plain = tree_map_only(Placed, lambda t: t.on_host, (args, kwargs))
        if "device" in plain:
            plain["device"] = HOST
        made = func(*plain_args, **plain)
        if to == HOST:
            return made
        if name == "aten::_to_copy" and made is plain_args[0]:
            made = made.clone()
        made = tree_map_only(torch.Tensor, lambda t: Placed(t, to), made)
        return return_and_correct_aliasing(func, args, kwargs, made)

    def _waits(self, name: str, args, kwargs, tensors, to: torch.device) -> bool:
        """Return whether a GPU's driver would make the host wait here."""
        places = {t.device for t in tensors} | {to}
        if places == {HOST}:
            return False
        if name in COPIES:
            given = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return HOST in places and len(places) > 1 and not given
        if name in INDEXED:
            indices = [t for t in args[1] if t is not None]
            return any(t.dtype == torch.bool or t.device == HOST for t in indices)
        return name in READ


def spread(model) -> torch.nn.Module:
    """Put a model of eight blocks on both devices, as ``device_map`` does on two GPUs."""
    places = {f"model.layers.{i}": FIRST if i < 4 else SECOND for i in range(8)}
    places |= {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST}
    places |= {"model.norm": SECOND, "lm_head": SECOND}
    return accelerate.dispatch_model(model, places, main_device=FIRST, force_hooks=True)
