"""Tests, in the order of the packages that they test; CONTRIBUTING.md says how to run them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared/data"  # zsRE and CounterFact; tests that need them may skip
