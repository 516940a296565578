"""Edits: making one, saving it, chaining several, taking them back, exporting them. Imports:
everything from errors to evaluation.
"""
