"""Settings of all tests."""

import pytest
import torch as th

from sb3_qvpo.common.speed.settings import settings as speed_settings

# The models here are tiny: a second thread would only wait
th.set_num_threads(1)


# Minutes each, in this order
LONGEST_FILES = ["test_zoo_commands.py", "test_benchmarks.py", "test_examples.py", "test_resume.py", "test_export.py"]


def pytest_collection_modifyitems(items):
    """The longest files first: of two processes one would otherwise wait for the other at the end."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST_FILES)))


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    th.manual_seed(0)


@pytest.fixture
def settings():
    """The settings of this process, put back afterwards."""
    before = vars(speed_settings).copy()
    yield speed_settings
    vars(speed_settings).update(before)
