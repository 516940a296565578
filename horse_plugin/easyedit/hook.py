"""Finds EasyEdit when somebody imports it, and lets HORSE join.

EasyEdit takes ten seconds to load and may not be there at all, so ``import horse_plugin`` only
puts :class:`EasyEditFinder` on ``sys.meta_path``. Every later import of ``easyeditor`` goes through
it and ends in ``horse_plugin.easyedit.patches``, which registers our methods.
"""

import builtins
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

from horse_plugin.errors import UsageError

NAME = "easyeditor"
# The part of EasyEdit that needs another transformers than its text editors do.
MULTIMODAL = f"{NAME}.trainer.blip2_models"


def install():
    """Register HORSE with EasyEdit: now if it is loaded, else as soon as it is."""
    if sys.modules.get(NAME):
        _register()
    elif not any(isinstance(finder, EasyEditFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, EasyEditFinder())


def _register():
    importlib.import_module("horse_plugin.easyedit.patches")


class EasyEditFinder(importlib.abc.MetaPathFinder):
    """Finds ``easyeditor`` in ``EASYEDIT_HOME``, or where Python would without it.

    Raises:
        UsageError: ``EASYEDIT_HOME`` names no checkout of EasyEdit.
    """

    def find_spec(self, fullname, path, target=None):
        if fullname != NAME:
            return None
        spec = _spec_at_home() if os.environ.get("EASYEDIT_HOME") else self._spec_elsewhere(target)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                with absent_packages_stand_in():
                    load(module)
                _register()

            spec.loader.exec_module = load_and_register
        return spec

    def _spec_elsewhere(self, target):
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        return next(filter(None, (f.find_spec(NAME, None, target) for f in others)), None)


def _spec_at_home():
    home = Path(os.environ["EASYEDIT_HOME"]).expanduser()
    spec = importlib.machinery.PathFinder.find_spec(NAME, [str(home)])
    if spec is None:
        raise UsageError(f"EASYEDIT_HOME: {home} holds no {NAME} package.")
    return spec


@contextlib.contextmanager
def absent_packages_stand_in():
    """Let EasyEdit's own files import packages that are not installed, as :class:`Absent`.

    EasyEdit imports every method, and the image and video code of some, to edit with any. Only its
    own imports are answered so, and nothing enters ``sys.modules``: transformers and others still
    see that, for example, torchvision is not installed.
    """
    imported = builtins.__import__

    def lenient(name, globals=None, locals=None, fromlist=(), level=0):
        try:
            return imported(name, globals, locals, fromlist, level)
        except ImportError as error:
            importer = (globals or {}).get("__name__", "")
            if _is_absent_package(error, importer) or importer.startswith(MULTIMODAL):
                return Absent(name, error)
            raise

    builtins.__import__ = lenient
    try:
        yield
    finally:
        builtins.__import__ = imported


def _is_absent_package(error: ImportError, importer: str) -> bool:
    """Return whether one of EasyEdit's files lacks a whole package, not a part of one."""
    if not importer.startswith(NAME) or not isinstance(error, ModuleNotFoundError):
        return False
    return "." not in (error.name or ".") and error.name != NAME


class Absent:
    """Stands in for something that could not be imported; a call of it raises the import's error.

    Its attributes, subscripts and subclasses exist, because EasyEdit's files name them while they
    load.
    """

    def __init__(self, name: str, error: ImportError):
        self.__name__, self.__error = name, error

    def __getattr__(self, name: str):
        if name.startswith("__"):  # no __all__, no __path__: there is nothing in it
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}", self.__error)

    def __getitem__(self, key):
        return self

    def __mro_entries__(self, bases):
        return (object,)

    def __instancecheck__(self, instance):
        self()

    def __call__(self, *args, **kwargs):
        raise ImportError(f"{self.__name__} is not there: {self.__error}") from self.__error
