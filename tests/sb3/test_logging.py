"""What SB3's loggers get: TensorBoard's folders, speed, success rates."""

import time

import pytest
from helpers import CountdownEnv, Recorder, tiny_qvpo
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class RecordHyperparameters(BaseCallback):
    """Hands SB3's logger a table of hyperparameters, as its documentation recommends."""

    def _on_training_start(self):
        values = {"gamma": self.model.gamma, "learning_rate": self.model.learning_rate}
        self.logger.record("hparams", HParam(values, {"train/critic_loss": 0.0}), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self):
        return True


def test_tensorboard_folders_and_contents(tmp_path):
    """Training that continues writes on in the same folder; a new run, also under a name of its own, counts up."""
    model = tiny_qvpo(CountdownEnv(), tensorboard_log=str(tmp_path))
    model.learn(20, callback=RecordHyperparameters(), log_interval=1).learn(4, reset_num_timesteps=False)
    for _ in range(2):
        model.learn(4, tb_log_name="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["QVPO_1", "mine_1", "mine_2"]
    events = EventAccumulator(str(tmp_path / "QVPO_1")).Reload()
    assert {"train/actor_loss", "train/critic_loss", "rollout/ep_rew_mean"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("rollout/ep_rew_mean")][:5] == [4.0] * 5
    assert "_hparams_/session_start_info" in events.summary_metadata


def recorded_qvpo(env, **kwargs):
    model, recorder = tiny_qvpo(env, **kwargs), Recorder()
    model.set_logger(Logger(folder=None, output_formats=[recorder]))
    return model, recorder


def test_steps_per_second_count_from_each_learn(monkeypatch):
    """The clock stands still, then 2 seconds have passed since the second ``learn()`` and its 10 steps: 5 a second."""
    model, recorder = recorded_qvpo(CountdownEnv())
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    model.learn(20, log_interval=1)  # no division by zero
    model.learn(10, reset_num_timesteps=False)
    monkeypatch.setattr(time, "time_ns", lambda: 3 * 10**9)
    model.dump_logs()
    assert recorder.rows[-1]["time/fps"] == 5
    assert recorder.rows[-1]["time/total_timesteps"] == 30


class SometimesSuccessfulEnv(CountdownEnv):
    """The first two episodes fail, all others succeed."""

    episodes = 0

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        self.episodes += terminated
        return observation, reward, terminated, truncated, {"is_success": self.episodes > 2}


@pytest.mark.parametrize(("stats_window_size", "rate"), [(1, 1.0), (4, 0.75), (42, 0.6)])
def test_the_success_rate_covers_the_last_episodes(stats_window_size, rate):
    model, recorder = recorded_qvpo(SometimesSuccessfulEnv(), stats_window_size=stats_window_size)
    model.learn(20)
    assert (model.ep_success_buffer.maxlen, model.ep_info_buffer.maxlen) == (stats_window_size, stats_window_size)
    model.dump_logs()
    assert recorder.rows[-1]["rollout/success_rate"] == rate
