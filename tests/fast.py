"""What `make test-fast` leaves out of a test of many cases."""

from collections.abc import Iterable

import pytest


def fast(cases: Iterable, few: Iterable) -> list:
    """Return all cases, of which `make test-fast` runs these few."""
    few = list(few)
    return [case if case in few else pytest.param(case, marks=pytest.mark.slow) for case in cases]
