"""Several numbers of candidates take turns: each episode has one of them, and its actions are the best of so many."""

import numpy as np
import pytest
import reference
import torch as th
from helpers import (
    CountdownEnv,
    actor_to_numpy,
    countdown,
    critics_to_numpy,
    same_weights,
    tiny_dtql,
    tiny_qvpo,
    tiny_sdac,
    weights_of,
)
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qvpo import QVPO, ResumableCheckpointCallback
from sb3_qvpo.common.candidates import only_first
from sb3_qvpo.common.noise_schedules import make_betas


class CountsOfSteps(BaseCallback):
    """The counts with which each action was collected, and where episodes ended."""

    def __init__(self):
        super().__init__()
        self.counts, self.dones = [], []

    def _on_training_start(self):
        score = self.model.policy._best_action

        def recording(observation, noise):
            self.counts.append(self.model.policy.counts_in_use.counts)
            return score(observation, noise)

        self.model.policy._best_action = recording

    def _on_step(self):
        self.dones.append(self.locals["dones"].copy())
        return True


@pytest.mark.parametrize("n_envs", [1, 3])
def test_each_episode_draws_one_count_and_keeps_it(n_envs):
    """While episodes last until their time limit. The first ones have the largest."""
    env = make_vec_env(countdown(truncate=True), n_envs=n_envs)
    callback = CountsOfSteps()
    model = tiny_qvpo(env, n_behavior_candidates=[1, 4, 6], learning_starts=0, gradient_steps=-1).learn(100 * n_envs, callback)
    counts, dones = np.array(callback.counts), np.array(callback.dones)
    assert counts.shape == dones.shape == (100, n_envs)
    changes = counts[1:] != counts[:-1]
    assert not changes[~dones[:-1]].any()
    assert changes.sum() > 5
    assert set(counts.ravel()) == {1, 4, 6}
    assert set(counts[0]) == {6}
    if n_envs > 1:
        assert any(len(set(row)) > 1 for row in counts.tolist())
    assert model.policy.counts_in_use.counts == ()


def test_after_an_episode_that_ended_early_the_next_has_the_largest_count():
    """Two environments: the episodes of one end by its time limit, those of the other before."""
    env = DummyVecEnv([countdown(truncate=True), countdown()])
    callback = CountsOfSteps()
    tiny_qvpo(env, n_behavior_candidates=[1, 4, 6], learning_starts=0, gradient_steps=-1).learn(200, callback)
    at_limit, early = np.array(callback.counts).T
    assert set(at_limit) == {1, 4, 6}
    assert set(early) == {6}


def test_counts_survive_a_checkpoint_and_end_with_a_run(tmp_path):
    """A checkpoint after each episode starts all environments again, and the count that was drawn remains."""
    callback = CountsOfSteps()
    checkpoint = ResumableCheckpointCallback(5, tmp_path / "run", at_episode_end=True)
    env = CountdownEnv(length=5, truncate=True)
    model = tiny_qvpo(env, n_behavior_candidates=[1, 4, 6], learning_starts=0).learn(100, CallbackList([checkpoint, callback]))
    assert {counts for (counts,) in callback.counts} == {1, 4, 6}
    resumed = QVPO.resume(tmp_path / "run", CountdownEnv(length=5, truncate=True), device="cpu")
    assert resumed._episode_draws.drawn == model._episode_draws.drawn
    again = CountsOfSteps()
    model.learn(5, again)  # a new run, in an environment that was reset
    assert {counts for (counts,) in again.counts} == {6}


def test_a_single_count_is_the_policys_own():
    """Nothing is in use, so whatever the policy says holds, as ever."""
    callback = CountsOfSteps()
    model = tiny_qvpo(CountdownEnv(), n_behavior_candidates=(1, 4), learning_starts=0)
    model.n_behavior_candidates = 3
    model.learn(20, callback)
    assert set(callback.counts) == {()}
    assert model._episode_draws.drawn is None


def test_predictions_for_other_states_are_not_restricted():
    """Deterministic ones while collecting, for instance, come row by row."""
    model = tiny_qvpo(n_behavior_candidates=(1, 4))
    observation = th.randn(2, 3)
    with th.no_grad():
        expected = model.policy._predict(observation, deterministic=True)
        with model.policy.counts_in_use.collecting((1, 4)):
            assert th.equal(model.policy._predict(observation, deterministic=True), expected)


def test_all_counts_are_equally_likely():
    """Among 400 episodes of one step each count is drawn 133 times, give or take 30 (three deviations)."""
    callback = CountsOfSteps()
    env = CountdownEnv(length=1, truncate=True)
    model = tiny_qvpo(env, n_behavior_candidates=(1, 4, 6), learning_starts=0, train_freq=400)
    model.learn(400, callback)
    numbers = np.unique(np.array(callback.counts), return_counts=True)[1]
    assert (abs(numbers - 400 / 3) < 30).all(), numbers


def test_the_action_of_each_environment_is_the_best_of_its_count():
    """Against the float64 reference: chains and critics of each environment, and the best among its first candidates."""
    model = tiny_qvpo(n_behavior_candidates=(1, 3, 5))
    policy = model.policy
    observation = th.as_tensor(np.random.default_rng(0).uniform(-1, 1, (3, 3)).astype(np.float32))
    with th.no_grad():
        noise = policy.draw_noise(3, 5)
        with policy.counts_in_use.collecting((3, 5, 1)):
            assert policy.counts_in_use.to_draw(9) == 5
            actions = policy._best_action(observation, noise)
    actor, critics = actor_to_numpy(policy.actor), critics_to_numpy(policy.critic)
    betas = make_betas("cosine", policy.n_diffusion_steps).numpy()
    for i, count in enumerate((3, 5, 1)):
        state = observation[i].numpy().astype(np.float64)
        candidates = reference.draw_candidates(actor, state, noise[:, i].numpy().astype(np.float64), betas)
        np.testing.assert_allclose(actions[i], reference.best_of_k(critics, state, candidates[:count])[0], atol=1e-5)


def test_only_the_first_candidates_take_part():
    values = th.randn(4, 6)
    restricted = only_first(values, [6, 1, 3, 2])
    for i, count in enumerate((6, 1, 3, 2)):
        assert restricted[i].argmax() == max(range(count), key=lambda k: float(values[i, k]))
        assert th.equal(restricted[i, :count], values[i, :count])


def test_a_softmax_draws_among_the_first_candidates_too():
    model = tiny_dtql(n_behavior_candidates=(1, 5))
    observation = th.zeros(2, 3)
    with th.no_grad(), model.policy.counts_in_use.collecting((1, 5)):
        drawn = []
        for seed in range(40):
            th.manual_seed(seed)
            noise = model.policy.actor.draw_noise(2, 5)
            th.manual_seed(seed)
            first = model.policy.actor.sample_candidates(model.policy.actor.features(observation), noise)[:, 0]
            drawn.append((model.policy._predict(observation) == first).all(dim=1).tolist())
    is_first = np.array(drawn)
    assert is_first[:, 0].all()
    assert 0 < is_first[:, 1].mean() < 1


def test_one_count_among_several_is_that_count():
    """The same actions and weights, bit for bit."""
    models = [
        tiny_qvpo(CountdownEnv(truncate=True), n_behavior_candidates=count, learning_starts=5).learn(30) for count in (3, (3,))
    ]
    np.testing.assert_array_equal(*(model.replay_buffer.actions for model in models))
    assert same_weights(*map(weights_of, models))


def test_several_counts_are_kept_and_can_be_changed(tmp_path):
    model = tiny_sdac(n_behavior_candidates=[2, 7])
    assert (model.n_behavior_candidates, model.policy.n_behavior_candidates) == ((2, 7), 7)
    model = tiny_qvpo(n_behavior_candidates=[2, 7])
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model")
    assert (loaded.n_behavior_candidates, loaded.policy.n_behavior_candidates) == ((2, 7), 7)
    loaded.policy.n_behavior_candidates = 5  # whoever changes the policy's own count means it
    assert loaded.n_behavior_candidates == 5
    loaded.n_behavior_candidates = (1, 3)
    assert (loaded.n_behavior_candidates, loaded.policy.n_behavior_candidates) == ((1, 3), 3)
    for several in ([4, 5], range(4, 6), np.array([4, 5])):
        assert QVPO.load(tmp_path / "model", n_behavior_candidates=several).n_behavior_candidates == (4, 5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), r"n_behavior_candidates must be a whole number of at least 1, or several of them, got \(\)"),
        ([2, 0], "n_behavior_candidates must be a whole number of at least 1, got 0"),
        ((2, 1.5), "n_behavior_candidates must be a whole number of at least 1, got 1.5"),
    ],
)
def test_bad_counts_are_refused(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_qvpo(n_behavior_candidates=value)
    tiny_qvpo().save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        QVPO.load(tmp_path / "model", n_behavior_candidates=value)
