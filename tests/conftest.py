"""Settings of all tests."""

import pytest
import torch as th

from sb3_qvpo.common import fast

# The models here are tiny: a second thread would only wait
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    th.manual_seed(0)


@pytest.fixture
def settings():
    """The settings of this process, put back afterwards."""
    before = vars(fast.settings).copy()
    yield fast.settings
    vars(fast.settings).update(before)
