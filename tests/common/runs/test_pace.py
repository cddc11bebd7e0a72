"""A run that takes hours says so after some 50 updates, once, to whoever watches."""

import itertools
import re

import pytest
import torch as th
from helpers import tiny_qvpo, tiny_sdac

from sb3_qvpo import QVPO, SDAC, presets
from sb3_qvpo.common import off_policy_algorithm
from sb3_qvpo.common.runs.pace import FIRST, LAST, Pace, in_words, told


def test_the_rest_is_told_once_at_the_pace_of_50_updates():
    """The first updates, which compile, do not count. 1000 steps took 50 seconds, so 200 000 take 10 000."""
    pace, clock, told = Pace(), 0.0, []
    for update in range(7, 200):
        clock += 100.0 if update < 7 + FIRST else 1.0
        told.append(pace.seconds_left(update, 20 * update, 200_000, clock))
    assert [(i, seconds) for i, seconds in enumerate(told) if seconds is not None] == [(LAST, pytest.approx(10_000))]


def test_several_updates_at_a_time_are_timed_too():
    pace = Pace()
    assert pace.seconds_left(100, 100, 10**6, 0) is None
    assert pace.seconds_left(200, 200, 10**6, 10) is None
    assert pace.seconds_left(300, 300, 10**6, 20) == pytest.approx(1e5)
    assert pace.seconds_left(400, 400, 10**6, 20) is None


def test_a_short_rest_is_not_worth_a_line():
    pace = Pace()
    assert [pace.seconds_left(n, n, 3_000, n) for n in range(100)] == [None] * 100


def test_time_in_the_environment_stays():
    """A preset shortens updates only: here 1 of 4 seconds."""
    pace, clock = Pace(), 0.0
    for update in range(FIRST + LAST):
        pace.begin(clock + 3)
        clock += 4
        seconds = pace.seconds_left(update, update, 10_000, clock)
        if seconds is not None:
            break
    assert seconds == pytest.approx(40_000) and pace.share_of_updates == pytest.approx(0.25)
    assert told(40_000, 10_000, "fast", 0.1, 0.25).endswith("on this CPU."), "not worth naming"
    assert told(40_000, 10_000, "fast", 0.1, 0.5).endswith("presets.fast they would take about 6 hours.")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "1 minutes"),
        (3_601, "60 minutes"),
        (7_100, "118 minutes"),
        (7_200, "2 hours"),
        (100_000, "28 hours"),
        (345_600, "4 days"),
    ],
)
def test_durations_are_read_at_a_glance(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(("verbose", "progress_bar"), [(0, False), (1, False), (0, True)])
def test_whoever_watches_is_told(verbose, progress_bar, monkeypatch, capsys):
    """A clock that goes ten seconds a step, half of them in the update: 300 000 steps take a month."""
    model = tiny_qvpo(verbose=verbose, n_train_candidates=64, n_diffusion_steps=20, batch_size=256, learning_starts=5)
    monkeypatch.setattr(type(model), "_has_usual_networks", lambda self: True)
    monkeypatch.setattr(off_policy_algorithm.time, "monotonic", itertools.count(0.0, 5.0).__next__)

    def stop(local, _):
        return local["self"].num_timesteps < 100

    model.learn(300_000, callback=stop, progress_bar=progress_bar)
    lines = [line for line in capsys.readouterr().out.splitlines() if "At this pace" in line]
    assert len(lines) == (verbose or progress_bar)
    for line in lines:
        told = re.search(r"remaining ([\d,]+) steps take (\d+) days on this CPU. With sb3_qvpo.presets.fast .* about", line)
        steps, days = (int(number.replace(",", "")) for number in told.groups())
        assert steps > 299_900 and days == 35
    model.learn(300_000, callback=lambda local, _: local["self"].num_timesteps < 100, progress_bar=progress_bar)
    assert "At this pace" not in capsys.readouterr().out, "once, where learn() is called in a loop"


def test_on_a_gpu_nothing_is_said(monkeypatch, capsys):
    model = tiny_qvpo(verbose=1, learning_starts=5)
    monkeypatch.setattr(off_policy_algorithm.time, "monotonic", lambda: 10.0 * model.num_timesteps)
    monkeypatch.setattr(type(model), "_log_updates", lambda self: None)
    model.learn(100)
    model._total_timesteps, model.device = 10**6, th.device("cuda")
    for update in range(100):
        model._n_updates = model.num_timesteps = update
        model._say_how_long_it_takes()
    model.device = th.device("cpu")
    assert "At this pace" not in capsys.readouterr().out


def test_settings_as_fast_as_the_preset_get_no_advice(monkeypatch, capsys):
    model = tiny_qvpo(verbose=1, learning_starts=5)
    monkeypatch.setattr(off_policy_algorithm.time, "monotonic", lambda: 10.0 * model.num_timesteps)
    model.learn(300_000, callback=lambda local, _: local["self"].num_timesteps < 100)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "At this pace" in line]
    assert line.endswith("on this CPU.")


@pytest.mark.parametrize("algorithm", [QVPO, SDAC])
def test_the_work_of_the_preset_is_that_of_the_preset(algorithm):
    name, rows, batch_size = algorithm._preset
    model = algorithm("MlpPolicy", "Pendulum-v1", **getattr(presets, name), buffer_size=10)
    assert model.batch_size == batch_size
    (width, _) = model.policy.actor_kwargs["net_arch"]
    assert round(model._chain_rows() * (width / 256) ** 2) == rows, "in rows of networks of 256 units"


def test_what_an_update_draws():
    """256 states; 20 steps; the targets' candidates, and with every update those of a policy step."""
    default = dict(batch_size=256, buffer_size=10)
    assert QVPO("MlpPolicy", "Pendulum-v1", **default)._chain_rows() == 256 * 20 * (2 + 64)
    assert SDAC("MlpPolicy", "Pendulum-v1", **default)._chain_rows() == 256 * 20 * (32 + 32 / 2)
    assert tiny_sdac(proposal_actions="replay", n_target_candidates=3, batch_size=4)._chain_rows() == 4 * 3 * 3
