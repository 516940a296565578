"""Timings and figures; run them from the checkout as ``python -m benchmarks.<name>``.

``reference.py`` is HORSE on one page, written straight from the paper.
"""
