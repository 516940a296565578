"""The most memory that tensors take at one time, counted where they are made."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside a ``with`` that are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {s._cdata for s in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            self._count(storage, given)
        return made

    def _count(self, storage, given):
        key = storage._cdata
        if key in given or key in self.alive:
            return
        n = storage.nbytes()
        self.now += n
        self.most = max(self.most, self.now)
        self.alive[key] = weakref.ref(storage, lambda _: self._gone(key, n))

    def _gone(self, key, n):
        del self.alive[key]
        self.now -= n


def _storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)]
