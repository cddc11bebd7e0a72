"""
The temperature of SDAC: what its argument may be, and the schedule of the authors' code.
"""

import functools
import math
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_qvpo.common.arguments import check_interval, parse_schedule

OFFICIAL_START, OFFICIAL_RATE, OFFICIAL_INTERVAL = 5.0, 7e-3, 250
"""First alpha, its learning rate, and critic updates between two of its steps, in the authors' code."""


@functools.lru_cache(maxsize=1)
def _official_levels(n_steps: int) -> list[float]:
    """alpha after 1 ... n_steps steps of Adam on log alpha. The gradient is A times the added noise's entropy plus 0.9."""
    log_alpha, first, second, levels = math.log(OFFICIAL_START), 0.0, 0.0, []
    for step in range(1, n_steps + 1):
        gradient = 0.5 * math.log(2 * math.pi * math.e * (0.1 * math.exp(log_alpha)) ** 2) + 0.9
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = (first / (1 - 0.9**step), math.sqrt(second / (1 - 0.999**step)))
        log_alpha -= OFFICIAL_RATE * corrected[0] / (corrected[1] + 1e-8)
        levels.append(math.exp(log_alpha))
    return levels


def official_temperature(n_updates: int) -> float:
    """
    The temperature of the authors' code in units of the reward: 5 at the start, 0.984 in the end. Their alpha is learnt, but
    from nothing that depends on the task: from the entropy of the noise that they add to actions, of deviation 0.1 alpha.

    :param n_updates: Updates of the critics so far, the present one included, at least 1.
    :return: The temperature.
    """
    step = (n_updates - 1) // OFFICIAL_INTERVAL
    # Rounded up, so that the whole schedule is worked out a few times in a run and not anew at each step
    return _official_levels(64 * (step // 64 + 1))[step]


def parse_temperature(temperature: float | str | Schedule) -> FloatSchedule | None:
    """
    The schedule of the argument ``temperature``, which is what ``"auto"`` starts from.

    :param temperature: A number, a function of the remaining progress, a string such as ``"lin_1_0.2"``, ``"official"``,
        ``"auto"`` or ``"auto_0.5"``.
    :return: The schedule; None for ``"official"``.
    :raises ValueError: If it has another form, or is not above 0 at the start and at the end.
    """
    if temperature == "official":
        return None
    start: Any = temperature
    if isinstance(start, str) and start.startswith("auto"):
        # A schedule has no place there: what has been learnt is a factor of the start
        start = _float_or_none(start.removeprefix("auto_")) if start != "auto" else 1.0
    try:
        schedule = parse_schedule("temperature", start)
        for progress in (1.0, 0.0):
            check_interval("temperature", schedule(progress), 0, math.inf, low_allowed=False)
    except ValueError as error:
        raise ValueError(
            "temperature must be a number above 0, a schedule that stays above 0, a string such as 'lin_1_0.2', "
            f"'official', 'auto' or 'auto_0.5', got {temperature!r} ({error})"
        ) from error
    return schedule


def _float_or_none(text: str) -> float | None:
    """A number in words; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
