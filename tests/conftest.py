"""Settings of all tests."""

import pytest
import torch as th

from sb3_qvpo.common.speed.settings import settings as speed_settings

# The models here are tiny: a second thread would only wait
th.set_num_threads(1)


# Half a minute or more each, in this order
# fmt: off
LONGEST_FILES = [
    "test_export.py", "test_studies.py", "test_programs.py", "test_checkpoints.py", "test_examples.py", "test_networks.py",
    "test_reports.py", "test_weights.py", "test_report.py", "test_installation.py", "test_files.py", "test_updates.py",
    "test_documentation.py", "test_benchmarks.py", "test_commands.py", "test_qvpo.py", "test_dtql.py", "test_diffusion_ql.py",
]
# fmt: on


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
