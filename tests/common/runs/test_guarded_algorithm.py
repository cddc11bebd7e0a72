"""After any error or interruption in ``learn()`` the model is intact, and training goes on in memory."""

import io
import sys

import numpy as np
import pytest
from helpers import CONTINUE, CountdownEnv, Interrupt, TwoPartsEnv, normalized, same_weights, scramble, tiny_qvpo, weights_of
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_qvpo import QVPO, ResumableCheckpointCallback

# Numbers that are not finite


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), -1, "10"])
def test_bad_total_timesteps_are_refused(steps):
    with pytest.raises(ValueError, match="total_timesteps must be a number in"):
        tiny_qvpo().learn(steps)


class BreakingEnv(CountdownEnv):
    """Returns a number that is not finite at step ``at``."""

    def __init__(self, what, value, at=12, **kwargs):
        super().__init__(**kwargs)
        self.what, self.value, self.at, self.total = what, value, at, 0

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return (observation + self.value if self.what == "reset" else observation), info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total == self.at:
            observation = observation + self.value if self.what == "observation" else observation
            reward = self.value if self.what == "reward" else reward
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("what", "at", "message"),
    [
        ("reward", 14, "non-finite reward .* at environment step 14"),
        ("observation", 14, "non-finite observation .* at environment step 14"),
        ("observation", 12, "non-finite terminal observation .* at environment step 12"),
        ("reset", 0, "non-finite observation .* at environment step 0"),
    ],
)
@pytest.mark.parametrize("vec_normalize", [False, True])
def test_non_finite_rewards_and_observations_stop_training(what, at, message, value, vec_normalize):
    # VecNormalize clips an infinite terminal observation to a finite number and keeps no original: nothing to refuse
    harmless = vec_normalize and "terminal" in message and np.isinf(value)
    env = DummyVecEnv([lambda: BreakingEnv(what, value, at)])
    model = tiny_qvpo(VecNormalize(env, training=False) if vec_normalize else env)
    if harmless:
        model.learn(50)
    else:
        with pytest.raises(ValueError, match=message):
            model.learn(50)
        assert model.replay_buffer.size() == max(at - 1, 0)
    assert all(bool(value.isfinite().all()) for value in model.policy.state_dict().values())
    assert np.isfinite(model.replay_buffer.observations).all()
    assert np.isfinite(model.replay_buffer.rewards).all()
    model.predict(np.zeros(1, np.float32))


def test_after_a_refused_observation_learning_starts_from_a_reset():
    """Otherwise the next transition would connect the last observation with one that is several steps further."""
    env = BreakingEnv("observation", np.nan, at=14, length=100)
    model = tiny_qvpo(env, learning_starts=1000)
    with pytest.raises(ValueError, match="non-finite observation"):
        model.learn(50)
    model.learn(30, reset_num_timesteps=False)
    buffer = model.replay_buffer
    steps = buffer.next_observations[: buffer.pos] - buffer.observations[: buffer.pos]
    np.testing.assert_allclose(steps, 0.01, atol=1e-6)


class NaNAtReset(CountdownEnv):
    """NaN at its second reset, or at its first if ``at_once``."""

    def __init__(self, at_once=False):
        super().__init__()
        self.resets = int(at_once)

    def reset(self, **kwargs):
        self.resets += 1
        observation, info = super().reset(**kwargs)
        return observation * (np.nan if self.resets == 2 else 1), info


def test_refused_numbers_of_a_dictionary_leave_no_trace():
    env = normalized(lambda: TwoPartsEnv(NaNAtReset()))
    with pytest.raises(ValueError, match=r"non-finite observation\['a'\]"):
        tiny_qvpo(env, policy="MultiInputPolicy").learn(50)
    for part in ("a", "b"):
        assert np.isfinite(env.obs_rms[part].mean).all()
        assert env.obs_rms[part].count == pytest.approx(1e-4 + 4)  # the first observation and three steps


def test_a_first_observation_that_is_refused_leaves_no_trace():
    env = normalized(lambda: NaNAtReset(at_once=True))
    model = tiny_qvpo(env)
    with pytest.raises(ValueError, match="non-finite observation"):
        model.learn(50)
    assert env.obs_rms.count == pytest.approx(1e-4)
    assert np.isfinite(env.obs_rms.mean).all()
    model.learn(8)


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_refused_number_leaves_no_trace_in_the_normalisation(what):
    class Broken(CountdownEnv):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            if self.steps == 17:
                observation, reward = (observation * np.nan, reward) if what == "observation" else (observation, np.inf)
            return observation, reward, *rest

    env = VecNormalize(make_vec_env(lambda: Broken(length=100), n_envs=1))
    model = tiny_qvpo(env)
    with pytest.raises(ValueError, match=f"non-finite {what}"):
        model.learn(50)
    for statistics in (env.obs_rms, env.ret_rms):
        assert np.isfinite(statistics.mean).all()
        assert np.isfinite(statistics.var).all()
    assert env.obs_rms.count == pytest.approx(1e-4 + 17)  # the first observation and 16 steps
    np.testing.assert_allclose(env.obs_rms.mean, 0.08, rtol=1e-4)
    model.learn(5, reset_num_timesteps=False)
    assert np.isfinite(env.returns).all()


# Environments that raise, and interruptions by hand


class FailingEnv(CountdownEnv):
    """Raises at one step."""

    def __init__(self, at=13, **kwargs):
        super().__init__(**kwargs)
        self.at, self.total = at, 0

    def step(self, action):
        self.total += 1
        if self.total == self.at:
            raise ConnectionError("the robot does not answer")
        return super().step(action)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_an_environment_that_raises(n_steps):
    model = tiny_qvpo(FailingEnv(length=5), n_steps=n_steps)
    with pytest.raises(ConnectionError, match="the robot does not answer") as raised:
        model.learn(30)
    if sys.version_info >= (3, 11):
        (note,) = raised.value.__notes__
        assert "Training stopped after 12 environment steps. Weights and replay buffer are intact" in note
    assert (model.replay_buffer.size(), model._n_updates) == (12, 7)
    before = weights_of(model)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (22, 17)
    assert not same_weights(before, weights_of(model))
    assert model.replay_buffer.observations[12, 0, 0] == 0  # a reset
    assert bool(model.replay_buffer.timeouts[11, 0])


def test_after_an_interruption_by_hand_training_goes_on_in_memory():
    model = tiny_qvpo(CountdownEnv(length=100), n_steps=3)
    with pytest.raises(KeyboardInterrupt):
        model.learn(50, Interrupt(30))
    stored = model.replay_buffer.pos
    model.learn(model.remaining_timesteps, **CONTINUE)
    assert model.num_timesteps == 50
    assert model.replay_buffer.observations[stored, 0, 0] == 0  # a new episode
    assert bool(model.replay_buffer.timeouts[stored - 1, 0])


def test_environments_in_processes_that_die():
    model = tiny_qvpo(SubprocVecEnv([FailingEnv]))
    with pytest.raises((EOFError, ConnectionResetError)) as raised:
        model.learn(30)
    if sys.version_info >= (3, 11):
        assert "one of these is dead: set_env() new ones first" in raised.value.__notes__[0]
    model.set_env(make_vec_env(CountdownEnv))
    model.learn(model.remaining_timesteps, **CONTINUE)
    assert model.num_timesteps == 30


def test_nothing_is_said_of_training_that_never_started():
    model = QVPO.load(saved(tiny_qvpo()))
    with pytest.raises(AssertionError, match="You must set the environment") as raised:
        model.learn(5)
    assert not hasattr(raised.value, "__notes__")


# Counting on


def saved(model):
    """A file in memory."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def test_a_buffer_that_was_being_refilled_goes_on_being_refilled(tmp_path):
    model = tiny_qvpo(CountdownEnv(), learning_starts=40).learn(60)
    loaded = QVPO.load(saved(model), env=CountdownEnv(), device="cpu")  # without its buffer: filled again up to step 100
    with pytest.raises(KeyboardInterrupt):
        loaded.learn(60, CallbackList([ResumableCheckpointCallback(10, tmp_path / "run"), Interrupt(75)]), **CONTINUE)
    for model in (loaded, QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")):
        assert model._n_updates == 20
        model.learn(100 - model.num_timesteps, **CONTINUE)
        assert model._n_updates == 20
        model.learn(1, **CONTINUE)
        assert model._n_updates == 21


def test_learning_continues():
    model = tiny_qvpo().learn(20)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (30, 25)
    model.learn(10)
    assert model.num_timesteps == 10


def test_no_second_warm_up_and_the_schedule_goes_on(tmp_path):
    model = tiny_qvpo(CountdownEnv(), learning_starts=20, ent_coef="lin_1.0")
    callback = ResumableCheckpointCallback(10, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, CallbackList([callback, Interrupt(51)]))
    model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
    assert (model.num_timesteps, model.remaining_timesteps, model._n_updates) == (50, 50, 30)
    assert model.replay_buffer.size() == 50
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 31
    model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
    model.learn(model.remaining_timesteps, reset_num_timesteps=False)
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.0, abs=1e-6)
    assert (model._n_updates, model.remaining_timesteps) == (80, 0)


def test_saving_and_seeding_between_resume_and_learn(tmp_path):
    tiny_qvpo(CountdownEnv()).learn(20).save_checkpoint(tmp_path / "run")
    results = []
    for change in ("nothing", "saved again", "seeded"):
        scramble()
        model = QVPO.resume(tmp_path / "run", CountdownEnv(), device="cpu")
        if change == "saved again":
            model.save_checkpoint(tmp_path / "again")
            scramble()
            model = QVPO.resume(tmp_path / "again", CountdownEnv(), device="cpu")
        if change == "seeded":
            model.set_random_seed(5)
        results.append(weights_of(model.learn(20, **CONTINUE)))
    assert same_weights(results[0], results[1])
    assert not same_weights(results[0], results[2])
