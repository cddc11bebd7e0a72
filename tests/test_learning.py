"""Learning, not only running. Minutes each: ``make test-slow``."""

import time

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qvpo import QVPO

PENDULUM = dict(
    learning_rate=1e-3,
    learning_starts=500,
    batch_size=128,
    tau=0.01,
    gamma=0.98,
    n_train_candidates=16,
    n_diffusion_steps=5,
    policy_kwargs=dict(net_arch=[64, 64]),
    device="cpu",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pendulum(seed):
    """Mean return over 20 episodes above -200 within 6 000 steps. Measured: see CHANGELOG.md."""
    start = time.time()
    model = QVPO("MlpPolicy", "Pendulum-v1", seed=seed, **PENDULUM).learn(6_000)
    env = make_vec_env("Pendulum-v1", seed=1_000)
    mean, std = evaluate_policy(model, env, n_eval_episodes=20)
    single, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=1_000), n_eval_episodes=20, deterministic=False)
    minutes = (time.time() - start) / 60
    print(f"\nseed {seed}: {mean:.1f} +- {std:.1f}, behaviour policy {single:.1f}, {minutes:.1f} minutes")
    assert mean > -200
