"""What is drawn of a policy: its candidates, their values, its choice, and a chain; during training without a trace in it."""

import numpy as np
import pytest
import torch as th
from helpers import DictEnv, same_weights, tiny_qvpo, tiny_sdac, weights_of
from matplotlib.animation import PillowWriter
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_qvpo import CandidateFigureCallback
from sb3_qvpo.common.figures import Snapshot, candidate_figure, chain_animation, denoise, draw_candidates, snapshot


@pytest.mark.parametrize("critic_type", ["twin", "crossq", "quantile"])
def test_a_snapshot_shows_what_the_policy_draws(critic_type):
    """In the environment's units, valued by the critics; the same noise at every call, and no generator moves."""
    model = tiny_qvpo(critic_type=critic_type).learn(20)
    observations = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    before = th.get_rng_state()
    drawn = snapshot(model.policy, observations, 50, step=7)
    assert th.equal(th.get_rng_state(), before)
    assert drawn.step == 7 and drawn.actions.shape == (3, 50, 1) and drawn.values.shape == (3, 50)
    assert 1.2 < np.abs(drawn.actions).max() <= 2, "Pendulum's actions are in [-2, 2]"
    again, other = snapshot(model.policy, observations, 50), snapshot(model.policy, observations, 50, seed=1)
    np.testing.assert_array_equal(drawn.actions, again.actions)
    assert not np.array_equal(drawn.actions, other.actions)
    model.policy.set_training_mode(False)
    with th.no_grad():
        states = th.as_tensor(observations)
        scores = model.critic.score(model.critic.features(states), th.as_tensor(drawn.actions / 2, dtype=th.float32))
    np.testing.assert_allclose(drawn.values, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_a_chain_goes_from_the_noise_to_the_candidates(sampler):
    model = tiny_sdac(n_diffusion_steps=5, policy_kwargs=dict(net_arch=[8], sampler=sampler))
    observation = np.ones(3, np.float32)
    states = denoise(model.policy, observation, 200)
    assert states.shape == (6, 200, 1)
    assert states[0].std() == pytest.approx(2, rel=0.15), "noise of deviation 1, in [-2, 2]"
    np.testing.assert_allclose(states[-1], snapshot(model.policy, observation[None], 200).actions[0], atol=1e-6)


def test_an_animation_has_a_frame_for_each_state_and_stays_at_the_last(tmp_path):
    """Read back from the file."""
    policy, observation = tiny_qvpo().policy, np.zeros(3, np.float32)
    states = denoise(policy, observation, 20)
    values = snapshot(policy, observation[None], 20).values[0]
    animation = chain_animation(policy, states, values, n_still=2)
    animation.save(tmp_path / "chain.gif", PillowWriter(fps=3))
    times = [frame.info["duration"] for frame in ImageSequence.Iterator(Image.open(tmp_path / "chain.gif"))]
    assert len(times) == len(states), "equal frames are one that stays longer"
    assert set(times[:-1]) == {330} and times[-1] == 3 * 330


def test_observations_must_be_counted():
    with pytest.raises(ValueError, match="observations must have a first dimension"):
        snapshot(tiny_qvpo().policy, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="n_candidates"):
        snapshot(tiny_qvpo().policy, np.zeros((1, 3), np.float32), 0)


def test_the_best_candidate_gets_the_star():
    axis = Figure().subplots()
    actions, values = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), np.array([1.0, 3.0])
    draw_candidates(axis, actions, values, (2, 0))
    points, star = axis.collections
    np.testing.assert_allclose(points.get_offsets(), [[0.3, 0.1], [0.6, 0.4]])
    np.testing.assert_allclose(star.get_offsets(), [[0.6, 0.4]])
    assert tuple(star.get_facecolor()[0]) == to_rgba("C3")
    draw_candidates(axis, actions[:, :1], values)
    np.testing.assert_allclose(axis.collections[2].get_offsets(), [[0.1, 1], [0.4, 3]], err_msg="the value is the height")


def test_a_figure_has_a_row_for_each_observation_and_a_column_for_each_moment():
    policy = tiny_qvpo("Reacher-v5").policy
    rng = np.random.default_rng(0)
    moments = [Snapshot(step, rng.normal(size=(3, 9, 2)), rng.normal(size=(3, 9))) for step in range(7)]
    axes = candidate_figure(policy, moments, n_columns=4).axes
    assert len(axes) == 12
    assert [axis.get_title().split("\n")[0] for axis in axes[:4]] == ["0 steps", "2 steps", "4 steps", "6 steps"]
    assert axes[0].get_xlim() == axes[0].get_ylim() == pytest.approx((-1.1, 1.1))
    assert len(candidate_figure(policy, moments[:1]).axes) == 3
    for dimensions in ((0, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match=r"dimensions must be two of 0 \.\.\. 1"):
            candidate_figure(policy, moments, dimensions)
    with pytest.raises(ValueError, match="at least one"):
        candidate_figure(policy, [])


def test_training_with_figures_is_the_same_training(tmp_path):
    plain = tiny_qvpo().learn(40)
    callback = CandidateFigureCallback(10, tmp_path / "figures" / "candidates.png", n_observations=2, n_candidates=5)
    drawn = tiny_qvpo(tensorboard_log=str(tmp_path)).learn(40, callback)
    assert same_weights(weights_of(plain), weights_of(drawn))
    assert [moment.step for moment in callback.snapshots] == [10, 20, 30, 40]
    held, new = callback.observations, drawn.replay_buffer.next_observations
    np.testing.assert_array_equal(held, [new[0, 0], new[4, 0]])
    picture = (tmp_path / "figures" / "candidates.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 5_000
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["candidates.png"]


def test_figures_reach_tensorboard(tmp_path):
    model = tiny_qvpo()
    model.set_logger(configure(str(tmp_path), ["tensorboard", "csv", "json"]))
    model.learn(400, CandidateFigureCallback(100, n_candidates=4), log_interval=1)
    log = EventAccumulator(str(tmp_path)).Reload()
    assert log.Tags()["images"] == ["candidates"]
    assert len(log.Images("candidates")) >= 2


def test_dictionaries_normalised_observations_and_given_ones():
    callback = CandidateFigureCallback(5, n_observations=3, n_candidates=4)
    tiny_qvpo(DictEnv(), "MultiInputPolicy").learn(12, callback)
    assert {len(value) for value in callback.observations.values()} == {3}
    assert [moment.step for moment in callback.snapshots] == [5, 10, 12], "and once at the end"

    env = VecNormalize(DummyVecEnv([DictEnv]), norm_obs_keys=["a"])
    callback = CandidateFigureCallback(5, n_candidates=4)
    tiny_qvpo(env, "MultiInputPolicy").learn(12, callback)
    assert not np.allclose(callback.observations["a"], 2 * callback.observations["b"]), "as the policy sees them"

    given = np.full((2, 3), 0.5, np.float32)
    callback = CandidateFigureCallback(10, observations=given, n_candidates=4)
    tiny_qvpo().learn(20, callback)
    assert callback.observations is given and callback.snapshots[0].actions.shape == (2, 4, 1)


def test_a_run_shorter_than_the_first_draw_is_drawn_at_its_end():
    callback = CandidateFigureCallback(1_000, n_candidates=4)
    tiny_qvpo().learn(15, callback)
    assert [moment.step for moment in callback.snapshots] == [15]
    assert len(callback.observations) == 1


def test_bad_arguments_of_the_callback(tmp_path):
    for name in ("draw_freq", "n_observations", "n_candidates", "n_columns"):
        with pytest.raises(ValueError, match=name):
            CandidateFigureCallback(**{"draw_freq": 10, name: 0})
    with pytest.raises(ValueError, match="must be a DiffusionPolicy, got SACPolicy"):
        SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[4])).learn(5, CandidateFigureCallback(2))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        tiny_qvpo().learn(5, CandidateFigureCallback(2, tmp_path / "file" / "candidates.png"))


def test_every_observation_of_a_snapshot_has_the_noise_of_its_chain():
    """So values of a snapshot belong to the candidates at the end of a chain, whichever observation it is."""
    policy = tiny_qvpo("Reacher-v5").policy
    observations = np.random.default_rng(0).normal(size=(3, *policy.observation_space.shape)).astype(np.float32)
    drawn = snapshot(policy, observations, 7)
    for observation, actions in zip(observations, drawn.actions, strict=True):
        np.testing.assert_allclose(denoise(policy, observation, 7)[-1], actions, atol=1e-5)


def test_what_cannot_be_drawn_is_refused_when_training_starts():
    for arguments, message in ((dict(dimensions=(0, 5)), "dimensions"), (dict(observations=np.zeros((2, 7))), "shape")):
        model = tiny_qvpo("Reacher-v5")
        with pytest.raises(ValueError, match=message):
            model.learn(20, CandidateFigureCallback(10_000, **arguments))
        assert model.num_timesteps == 0


def test_many_environments_give_as_many_observations():
    callback = CandidateFigureCallback(3, n_observations=3, n_candidates=4)
    model = tiny_qvpo(make_vec_env("Pendulum-v1", n_envs=5)).learn(10, callback)
    new = model.replay_buffer.next_observations
    np.testing.assert_array_equal(callback.observations, new[0, :3])
