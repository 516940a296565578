"""The language model: loading it, its edit modules, its two halves, their cached states, and the
capture of keys and gradients. Imports: everything from errors to hparams.
"""
