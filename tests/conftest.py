"""Settings of all tests."""

import pytest
import torch as th

# The models here are tiny: a second thread would only wait
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    th.manual_seed(0)
