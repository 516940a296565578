import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horse_plugin.method.finite import all_finite

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@given(at=st.integers(0, 34))
def test_one_entry_that_is_not_finite_is_found_wherever_it_is(dtype, bad, at):
    x = torch.randn(7, 5).to(dtype)
    x[0, 0] = torch.finfo(dtype).max  # a sum of two such would not be finite
    x[6, 4] = torch.finfo(dtype).max
    assert all_finite(x) and all_finite(x.T) and all_finite(x[:0])
    x.view(-1)[at] = bad
    assert not all_finite(x) and not all_finite(x.T)
