"""HORSE as one of EasyEdit's methods.

    hook      registers HORSE as soon as EasyEdit is imported, by whomever; it loads nothing itself
    apply     what EasyEdit calls to edit
    patches   HORSE in its tables and classes

This package and ``comparison/baselines`` are the only ones that import EasyEdit. It imports
``training`` and what stands above it.
"""
