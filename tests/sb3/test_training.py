"""Runs of ``learn()``: how many steps and updates, the same again with the same seed, action noise, something learnt."""

import numpy as np
import pytest
from helpers import CountdownEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise


@pytest.mark.parametrize("progress_bar", [False, True])
def test_a_float_number_of_steps(progress_bar):
    model = tiny_qvpo().learn(2e1, progress_bar=progress_bar)
    assert model.num_timesteps == 20
    assert isinstance(model._total_timesteps, int)


@pytest.mark.parametrize(
    ("kwargs", "n_updates"),
    [
        (dict(), 15),  # learning starts after 5 of 20 steps
        (dict(train_freq=4), 4),  # after steps 8, 12, 16, 20
        (dict(train_freq=(4, "step"), gradient_steps=3), 12),
        (dict(train_freq=(4, "step"), gradient_steps=-1), 16),
        (dict(train_freq=(1, "episode"), gradient_steps=-1), 16),  # episodes of 4 steps
        (dict(train_freq=(2, "episode"), gradient_steps=2), 6),  # ends after 8, 16 and 24 steps
        (dict(gradient_steps=0), 0),
        (dict(learning_starts=100), 0),
    ],
)
def test_number_of_updates(kwargs, n_updates):
    model = tiny_qvpo(CountdownEnv(), **kwargs).learn(20)
    assert model._n_updates == n_updates


@pytest.mark.parametrize("env", ["Pendulum-v1", "vectorised"])
def test_same_seed_same_run_bit_for_bit(env):
    def run(seed):
        environment = env if env != "vectorised" else make_vec_env("Pendulum-v1", n_envs=2)
        return weights_of(tiny_qvpo(environment, seed=seed).learn(30))

    first = run(3)
    assert same_weights(first, run(3))
    assert not same_weights(first, run(4))


def test_a_noisy_run_and_the_actions_after_it_repeat():
    """Action noise and stochastic predictions draw from the seeded generators only."""

    def run(seed):
        noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
        model = tiny_qvpo(seed=seed, action_noise=noise, train_freq=4).learn(40)
        env, returned = model.get_env(), []
        obs = env.reset()
        for _ in range(30):
            action, _ = model.predict(obs)
            obs, reward, _, _ = env.step(action)
            returned.append((action.item(), reward.item()))
        return returned

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(noise_class, n_envs):
    noise = noise_class(np.zeros(1), 0.5 * np.ones(1))
    env = make_vec_env("Pendulum-v1", n_envs=n_envs)
    noisy = weights_of(tiny_qvpo(env, action_noise=noise).learn(20))
    assert not same_weights(noisy, weights_of(tiny_qvpo(make_vec_env("Pendulum-v1", n_envs=n_envs)).learn(20)))


def test_arguments_of_gsde_without_gsde_change_nothing():
    kwargs = dict(use_sde=False, sde_sample_freq=4, use_sde_at_warmup=True)
    assert same_weights(weights_of(tiny_qvpo(**kwargs).learn(12)), weights_of(tiny_qvpo().learn(12)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_identity_is_learnt(seed):
    """An action within 0.2 of the observation earns 1; a constant action earns about 20 of 100, a random one less."""
    env = make_vec_env(IdentityEnvBox, env_kwargs=dict(eps=0.2), seed=seed)
    model = tiny_qvpo(
        env,
        seed=seed,
        learning_rate=1e-2,
        train_freq=2,
        gamma=0.5,
        batch_size=64,
        buffer_size=1000,
        learning_starts=100,
        n_behavior_candidates=1,
        n_train_candidates=8,
        n_eval_candidates=16,
        policy_kwargs=dict(net_arch=[32, 32], time_embedding_dim=4),
    )
    assert evaluate_policy(model, env, n_eval_episodes=2)[0] < 50
    model.learn(400)
    assert evaluate_policy(model, env, n_eval_episodes=3)[0] >= 90
    model.n_eval_candidates = 1  # not by the critics' choice alone: the actor has learnt it too
    assert evaluate_policy(model, env, n_eval_episodes=3)[0] >= 80
