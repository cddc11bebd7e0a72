"""More of what users report in public, tried here: loggers, boundaries of episodes, frozen networks, the warm-up."""

import gc
import weakref

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import BanditEnv, CountdownEnv, Recorder, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

from sb3_qvpo import QVPO
from sb3_qvpo.zoo import ZooQVPO

CONTINUE = dict(reset_num_timesteps=False)


# Loggers are the user's


def test_output_formats_are_those_that_were_asked_for(tmp_path):
    """As in SB3: none, or TensorBoard's first, or a sequence of one's own."""
    assert tiny_qvpo().learn(4).logger.output_formats == []
    model = tiny_qvpo(tensorboard_log=str(tmp_path)).learn(4)
    assert [type(each) for each in model.logger.output_formats] == [TensorBoardOutputFormat]
    kept, model = Recorder(), tiny_qvpo(CountdownEnv())
    model.set_logger(Logger(None, (kept,)))
    model.learn(20, log_interval=1)
    assert {"train/critic_loss", "train/actor_loss"} <= kept.rows[-1].keys()


def test_models_that_share_a_logger_log_their_own_losses():
    """The first one's losses are in the millions. It is freed, too, although the logger lives."""
    kept = Recorder()
    logger = Logger(None, [kept])
    first = tiny_qvpo(BanditEnv(lambda action: 5_000.0))
    second = tiny_qvpo(BanditEnv(lambda action: 0.1))
    third = SAC("MlpPolicy", BanditEnv(lambda action: 0.1), learning_starts=5, batch_size=8, device="cpu", seed=0)
    for model in (first, second, third):
        model.set_logger(logger)
        n_before = len(kept.rows)
        model.learn(23, log_interval=5)
        losses = [dump["train/critic_loss"] for dump in kept.rows[n_before:] if "train/critic_loss" in dump]
        # The first entry may hold what the model before recorded and did not write, as with SB3's own algorithms
        assert len(losses) >= 2 and all((loss > 1e5) == (model is first) for loss in losses[1:])
    assert not {"train/weight", "train/candidate_std"} & kept.rows[-1].keys(), "SAC has no such metrics"
    reference = weakref.ref(first)
    del first, model
    gc.collect()
    assert reference() is None


class OwnLogger(Logger):
    """Has nothing of SB3's."""

    def __init__(self):
        self.seen = {}

    def record(self, key, value, exclude=None):
        self.seen[key] = value

    def dump(self, step=0):
        self.seen = {}


class Delegating(Logger):
    """Hands on to another, as imitation's does."""

    def __init__(self, inner):
        super().__init__(None, [])
        self.inner = inner

    def record(self, key, value, exclude=None):
        self.inner.record(key, value, exclude)

    def dump(self, step=0):
        self.inner.dump(step)


def test_loggers_of_other_classes():
    own, kept = OwnLogger(), Recorder()
    for logger in (own, Delegating(Logger(None, [kept]))):
        model = tiny_qvpo(CountdownEnv())
        model.set_logger(logger)
        model.learn(22, log_interval=1)
    assert own.seen["train/critic_loss"] > 0 and "train/critic_loss" in kept.rows[-1]


def test_losses_can_be_read_in_a_callback():
    """The recipe of SB3's maintainers. What is read there is what the log shows, on every device."""
    seen = []
    model = tiny_qvpo(CountdownEnv())

    def look(local, _):
        seen.append(model.logger.name_to_value.get("train/critic_loss", 0.0))
        return True

    model.learn(20, ConvertCallback(look))
    assert len([loss for loss in seen if loss > 0]) >= 10


# Where an environment is reset, an episode ends in the buffer, too


class NumberedEnv(gym.Env):
    """Observations are the number of the episode and the step in it. A time limit after 50 steps."""

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        NumberedEnv.episode += 1
        self.step_number = 0
        return np.array([NumberedEnv.episode, 0], np.float32), {}

    def step(self, action):
        self.step_number += 1
        observation = np.array([NumberedEnv.episode, self.step_number], np.float32)
        return observation, 1.0, False, self.step_number >= 50, {}


def false_transitions(buffer):
    """How many sampled transitions lead into another episode and are bootstrapped."""
    samples = buffer._get_samples(np.arange(buffer.size() - 1))
    leads_on = (samples.observations[:, 0] != samples.next_observations[:, 0]) & (samples.dones[:, 0] == 0)
    return int(leads_on.sum())


MEMORY_SAVING = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated")
@pytest.mark.parametrize("how", ["twice", "new environment", "loaded", "continued by RL Zoo"])
@pytest.mark.parametrize("kwargs", [MEMORY_SAVING, dict(n_steps=3)], ids=["memory-saving", "n-step"])
def test_no_transition_leads_into_another_episode(how, kwargs, tmp_path):
    model = tiny_qvpo(NumberedEnv(), **kwargs).learn(20)
    if how in ("loaded", "continued by RL Zoo"):
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        model = (QVPO if how == "loaded" else ZooQVPO).load(tmp_path / "model", env=NumberedEnv())
        model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
        model.learn(10, reset_num_timesteps=how != "loaded")
    else:
        if how == "new environment":
            model.set_env(NumberedEnv())
        model.learn(10, reset_num_timesteps=how == "twice")
    assert model.replay_buffer.size() == 30 and false_transitions(model.replay_buffer) == 0


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated")
@pytest.mark.parametrize("how", ["twice", "new environment"])
def test_hindsight_takes_no_goals_of_another_episode(how):
    def make_env():
        return BitFlippingEnv(n_bits=5, max_steps=7, continuous=True)

    model = tiny_qvpo(make_env(), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer).learn(31)
    if how == "new environment":
        model.set_env(make_env())
    model.learn(31, reset_num_timesteps=how == "twice")
    assert 0 < model.replay_buffer.ep_length.max() <= 7


# Frozen networks


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_a_frozen_network_stays_and_the_other_learns(name):
    """To warm up critics behind a cloned policy, say; and it learns again when it is thawed."""
    model = tiny_qvpo().learn(10)
    frozen, before = getattr(model, name), weights_of(model)
    frozen.requires_grad_(False)
    model.learn(10, **CONTINUE)
    between = weights_of(model)
    changed = {weight.split(".")[0] for weight in before if not th.equal(before[weight], between[weight])}
    assert name not in changed and len(changed - {"actor_target", "critic_target"}) == 1
    frozen.requires_grad_(True)
    model.learn(10, **CONTINUE)
    after = weights_of(model)
    assert any(not th.equal(between[weight], after[weight]) for weight in between if weight.startswith(f"{name}."))


# The warm-up


def test_a_refill_goes_on_in_the_next_learn(tmp_path):
    """A model that was loaded without its buffer: thirty steps in one piece or in six, or stopped by a callback."""
    tiny_qvpo(learning_starts=20).learn(60).save(tmp_path / "model")
    updates = []
    for pieces in ([30], [5] * 6, [7, 23]):
        model = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
        n_before = model._n_updates
        for n_steps in pieces:
            model.learn(n_steps, **CONTINUE)
            assert model.learning_starts == 20
        updates.append(model._n_updates - n_before)
    assert updates == [10, 10, 10]
    model = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    n_before = model._n_updates
    model.learn(30, ConvertCallback(lambda local, _: model.num_timesteps < 70), **CONTINUE)
    model.learn(20, **CONTINUE)
    assert (model.num_timesteps, model._n_updates - n_before) == (90, 10)


def test_a_refill_goes_on_after_resuming(tmp_path):
    tiny_qvpo(CountdownEnv(), learning_starts=20).learn(60).save(tmp_path / "model")
    model = QVPO.load(tmp_path / "model", env=CountdownEnv())
    model.learn(8, **CONTINUE)
    model.save_checkpoint(tmp_path / "run")
    model = QVPO.resume(tmp_path / "run", CountdownEnv())
    n_before = model._n_updates
    model.learn(22, **CONTINUE)
    assert model._n_updates - n_before == 10


def test_learning_starts_can_be_set_between_and_inside():
    """Whoever sets it means it: random actions and no updates until that step, as in SB3."""
    model = tiny_qvpo(learning_starts=5).learn(60)
    n_before = model._n_updates
    model.learning_starts = 90
    assert model.learning_starts == 90
    model.learn(40, **CONTINUE)
    assert model._n_updates - n_before == 10
    seen, n_before = [], model._n_updates

    def later(local, _):
        if not seen:
            model.learning_starts = 130
        seen.append(model.learning_starts)
        return True

    model.learn(40, ConvertCallback(later), **CONTINUE)
    assert seen[0] == 130 and model._n_updates - n_before in (10, 11)
    # Counting from 0 again there is no second warm-up, unless it is asked for
    n_before = model._n_updates
    model.learn(10)
    assert model._n_updates - n_before == 10
    model.learning_starts = 6
    n_before = model._n_updates
    model.learn(10)
    assert model._n_updates - n_before == 4


# Predictions


@pytest.mark.parametrize("convert", [list, th.as_tensor, np.asarray], ids=["list", "tensor", "array"])
def test_observations_that_are_not_finite_are_named_in_any_form(convert):
    model = tiny_qvpo(BanditEnv())
    assert model.predict(convert([0.0, 0.5]))[0].shape == (1,)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="observation must be finite"):
            model.predict(convert([0.0, value]))


def test_updates_are_the_same_however_often_losses_are_read():
    """Reading the numbers of each call of ``train()`` changes nothing of a run."""
    results = []
    for log_interval in (1, 1000):
        results.append(weights_of(tiny_qvpo(CountdownEnv()).learn(20, log_interval=log_interval)))
    assert same_weights(*results)
