"""
Train on Hopper-v5 with the paper's settings, save, reload and evaluate.

It needs ``pip install ".[mujoco,progress]"`` in a clone. The default, 1 000 updates, takes three to six minutes on two cores
(``benchmarks/results/*update.csv``). It shows that everything works. Learning to hop takes many times as long.
"""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qvpo import QVPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--timesteps", type=float, default=2_000, help="environment steps; the paper trains for 1e6")
    parser.add_argument("--learning-starts", type=int, default=1_000, help="random steps first; the authors' code: 10 000")
    parser.add_argument("--n-train-candidates", type=int, default=64, help="N_d")
    parser.add_argument("--n-diffusion-steps", type=int, default=20, help="T")
    parser.add_argument("--episodes", type=int, default=5, help="evaluation episodes for each number of candidates")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = QVPO(
        "MlpPolicy",
        arguments.env,
        learning_starts=arguments.learning_starts,
        n_target_candidates=1,  # K_t of Hopper, Table 3; all other defaults are the paper's
        n_train_candidates=arguments.n_train_candidates,
        n_diffusion_steps=arguments.n_diffusion_steps,
        verbose=1,
        seed=arguments.seed,
    )
    model.learn(arguments.timesteps, progress_bar=True)
    model.save("qvpo_mujoco")

    # The zip holds everything for prediction. Further training also needs the replay buffer, see save_replay_buffer
    model = QVPO.load("qvpo_mujoco")
    env = make_vec_env(arguments.env, seed=1_000)
    for n_behavior_candidates in (1, 32):
        model.n_behavior_candidates = n_behavior_candidates
        mean, std = evaluate_policy(model, env, n_eval_episodes=arguments.episodes, deterministic=False)
        print(f"Return, best of {n_behavior_candidates} candidates: {mean:.0f} +- {std:.0f}")


if __name__ == "__main__":
    main()
