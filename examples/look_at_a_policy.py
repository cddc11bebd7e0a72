"""
Look at a saved model: the candidates that it draws for a few observations, coloured by value, and one chain while it denoises.

``python examples/look_at_a_policy.py run.zip --env HalfCheetah-v5 --algo QVPO`` draws ``candidates.png`` and ``chain.gif``.
With no file it first trains for a minute on a robot arm, and ``training.png`` shows how its candidates move meanwhile.
"""

import argparse

import gymnasium as gym
from matplotlib.animation import PillowWriter
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_qvpo
from sb3_qvpo.common.figures import candidate_figure, chain_animation, denoise, snapshot, stacked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a file that model.save() or a checkpoint callback wrote")
    parser.add_argument("--env", default="Reacher-v5", help="the task it was trained on")
    parser.add_argument("--algo", default="QVPO", choices=["QVPO", "SDAC", "DiffusionQL"])
    parser.add_argument("--vec-normalize", help="a file of the statistics of its observations")
    parser.add_argument("--timesteps", type=float, default=3_000, help="environment steps, if there is no file")
    parser.add_argument("--dimensions", type=int, nargs=2, default=(0, 1), help="which two of the actions' dimensions")
    arguments = parser.parse_args()
    env, dimensions = gym.make(arguments.env), tuple(arguments.dimensions)
    if arguments.model:
        model = getattr(sb3_qvpo, arguments.algo).load(arguments.model, device="cpu")
    else:
        model = sb3_qvpo.QVPO("MlpPolicy", arguments.env, **sb3_qvpo.presets.small, seed=0, device="cpu")
        model.learn(arguments.timesteps, sb3_qvpo.CandidateFigureCallback(int(arguments.timesteps / 4), "training.png"))

    if model.policy.normalized_observations and not arguments.vec_normalize:
        parser.error("the model was trained on normalised observations: name their statistics by --vec-normalize")
    statistics = arguments.vec_normalize and VecNormalize.load(arguments.vec_normalize, DummyVecEnv([lambda: env]))
    seen = statistics.normalize_obs if statistics else lambda observation: observation

    observations = [seen(env.reset(seed=0)[0])]
    for _ in range(40):
        observations.append(seen(env.step(model.predict(observations[-1], deterministic=True)[0])[0]))
    moment = snapshot(model.policy, stacked(observations[::20]), step=model.num_timesteps)
    candidate_figure(model.policy, [moment], dimensions).savefig("candidates.png", dpi=100)
    print(f"Values of {moment.values.shape[1]} candidates: {moment.values.min():.1f} to {moment.values.max():.1f}")

    states = denoise(model.policy, observations[20])
    chain_animation(model.policy, states, moment.values[1], dimensions).save("chain.gif", PillowWriter(fps=3), dpi=70)


if __name__ == "__main__":
    main()
