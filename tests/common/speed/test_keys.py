"""What a graph of an update is keyed by; ``test_updates.py`` has whole runs with settings that change."""

import numpy as np
import torch as th

from sb3_qvpo.common.speed import keys


def test_values_are_frozen_by_what_they_hold():
    """Equal where an update would do the same, different otherwise; objects equal themselves alone."""
    array = np.zeros(2)
    for value in (1, 1.0, True, None, "qadv", (1, [2.0]), {"a": 1}, th.float32, np.float64(3), len, array):
        assert keys.frozen(value) == keys.frozen(value)
        assert hash(keys.frozen(value)) == hash(keys.frozen(value))
    numbers = [(0, False), (1, 1.0), ("1", 1)]
    for first, second in (*numbers, ([1], (1,)), ({"a": 1}, {"a": 2}), (array, np.ones(2)), (object(), object())):
        assert keys.frozen(first) != keys.frozen(second)
