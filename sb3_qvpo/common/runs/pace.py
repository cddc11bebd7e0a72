"""How long the rest of a run takes, said once: on a CPU the paper's settings take days, and nobody should find out late."""

FIRST, LAST = 10, 60
"""Updates between which a run is timed. The first ones compile and allocate."""
LONG = 3600.0
"""Seconds that are worth a line."""


class Pace:
    """
    Times the updates of one ``learn()``.

    :param is_told: Whether an earlier ``learn()`` of the model has found that it takes long. Once is enough.
    """

    def __init__(self, is_told: bool = False) -> None:
        self.is_told = is_told
        self._start: tuple[int, int, float] | None = None
        self._began: float | None = None
        self._in_updates = 0.0
        self.share_of_updates = 1.0
        """How much of the time was spent in updates, once the pace is known."""
        self._first_update: int | None = None
        self._is_done = False

    def begin(self, now: float) -> None:
        """
        Call it before updates.

        :param now: Seconds of a clock.
        """
        self._began = now

    def seconds_left(self, n_updates: int, n_steps: int, n_left: int, now: float) -> float | None:
        """
        The time that the remaining steps take at the pace of some 50 updates. Call it after updates.

        :param n_updates: Updates of the model so far.
        :param n_steps: Environment steps so far.
        :param n_left: Environment steps that remain.
        :param now: Seconds of the same clock.
        :return: Seconds, once. None before, afterwards, and for a rest below an hour.
        """
        if self._first_update is None:
            self._first_update = n_updates
        n_seen = n_updates - self._first_update
        if self.is_told or self._is_done or n_seen < FIRST:
            return None
        if self._start is None:
            self._start = (n_seen, n_steps, now)
        elif self._began is not None:
            self._in_updates += now - self._began
        n_before, steps_before, before = self._start
        if n_seen < n_before + LAST - FIRST or n_steps == steps_before:
            return None
        self._is_done = True
        seconds = (now - before) / (n_steps - steps_before) * n_left
        self.share_of_updates = min(1.0, self._in_updates / (now - before)) if now > before else 1.0
        self.is_told = seconds > LONG
        return seconds if self.is_told else None


def in_words(seconds: float) -> str:
    """
    A duration that can be read at a glance.

    :param seconds: Said as a minute where it is less.
    :return: In minutes below two hours, in hours below two days, or in days.
    """
    for unit, length in (("days", 86_400), ("hours", 3_600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1.0, seconds / 60):.0f} minutes"


def step_cost(chain_rows: float, batch_size: int) -> float:
    """
    Roughly what an update costs.

    :param chain_rows: Rows that pass through the noise predictor to draw actions.
    :param batch_size: Transitions in an update.
    :return: Milliseconds on one core of Zen 3 with networks of 256 units; only ratios are used.
    """
    return 10 + 0.137 * batch_size + 2.5e-3 * chain_rows


def told(seconds: float, n_left: int, preset: str, share: float, share_of_updates: float) -> str:
    """
    One line about a long rest. A preset is named if it needs less than two thirds of the time.

    :param seconds: What it takes.
    :param n_left: Environment steps that remain.
    :param preset: Name of a preset, or nothing.
    :param share: What an update of the preset costs, as a part of what one costs now.
    :param share_of_updates: How much of the time are updates; the environment takes the rest.
    :return: The line.
    """
    line = f"At this pace the remaining {n_left:,} steps take {in_words(seconds)} on this CPU."
    shorter = 1 - share_of_updates * (1 - share)
    if preset and shorter < 2 / 3:
        line += f" With sb3_qvpo.presets.{preset} they would take about {in_words(shorter * seconds)}."
    return line
