"""Datasets in a replay buffer: every layout gives the same transitions, and bad data are refused before anything is stored."""

import tracemalloc
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import IMAGE, DictEnv, GoalEnv, tiny_qvpo
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import save_to_pkl

from sb3_qvpo.offline import SpacesEnv, fill_replay_buffer, normalized_score, npz, reading

LENGTHS = (3, 1, 4)
"""Of the episodes: one ends, one is cut, one is neither, as where recording stopped."""
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32))


def episodes():
    """Numbers that tell where they are from: the observation is (episode, time), the reward 10 * episode + time."""
    made = []
    for number, length in enumerate(LENGTHS):
        time = np.arange(length + 1)
        flags = np.zeros((2, length), bool)
        if number < 2:
            flags[number, -1] = True
        made.append(
            SimpleNamespace(
                observations=np.stack([np.full(length + 1, number), time], axis=1).astype(np.float32),
                actions=np.stack([-2 + time[:-1], time[:-1]], axis=1).astype(np.float32),
                rewards=10.0 * number + time[:-1],
                terminations=flags[0],
                truncations=flags[1],
                infos=None,
            )
        )
    return made


def flat(**changed):
    """The same in D4RL's layout."""
    parts = episodes()
    arrays = {
        "observations": np.concatenate([part.observations[:-1] for part in parts]),
        "next_observations": np.concatenate([part.observations[1:] for part in parts]),
        "actions": np.concatenate([part.actions for part in parts]),
        "rewards": np.concatenate([part.rewards for part in parts]),
        "terminals": np.concatenate([part.terminations for part in parts]),
        "timeouts": np.concatenate([part.truncations for part in parts]),
    }
    return {name: values for name, values in {**arrays, **changed}.items() if values is not None}


def model_for(n_envs=1, **kwargs):
    """A model that is built from spaces alone."""
    env = make_vec_env(lambda: SpacesEnv(OBSERVATIONS, ACTIONS), n_envs=n_envs)
    return tiny_qvpo(env, buffer_size=kwargs.pop("buffer_size", 20 * n_envs), **kwargs)


def stored(buffer):
    """What the buffer holds, environments side by side in time order of the data."""
    n = buffer.size()
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    return {name: getattr(buffer, name)[:n].reshape(n * buffer.n_envs, -1) for name in names}


def assert_is_the_dataset(arrays, n_rows=8, cut=(3, 7)):
    """Its first rows; the task ends in row 2, and the value of what follows counts in all others."""
    whole = flat()
    for name in ("observations", "next_observations", "rewards"):
        np.testing.assert_array_equal(arrays[name], whole[name].reshape(8, -1)[:n_rows], err_msg=name)
    scaled = (whole["actions"] - [0, 2]) / 2
    np.testing.assert_allclose(arrays["actions"], scaled[:n_rows], atol=1e-6)
    ends = arrays["dones"] * (1 - arrays["timeouts"])
    np.testing.assert_array_equal(ends.ravel().nonzero()[0], [2])
    np.testing.assert_array_equal(arrays["timeouts"].ravel().nonzero()[0], cut)


def minari_dataset(tmp_path, monkeypatch):
    """A dataset that Minari has written and reads."""
    minari = pytest.importorskip("minari", reason="make test-oldest installs no Minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    buffers = [
        minari.data_collector.EpisodeBuffer(
            id=i,
            observations=list(part.observations),
            actions=list(part.actions),
            rewards=part.rewards.tolist(),
            terminations=part.terminations.tolist(),
            truncations=part.truncations.tolist(),
            infos=None,
        )
        for i, part in enumerate(episodes())
    ]
    with pytest.warns():
        return minari.create_dataset_from_buffers(
            "test/three-v0", buffers, observation_space=OBSERVATIONS, action_space=ACTIONS
        )


@pytest.mark.parametrize("layout", ["minari", "name", "folder", "episodes", "mappings", "generator", "flat", "npz", "hdf5"])
@pytest.mark.filterwarnings("ignore")
def test_every_layout_gives_the_same_transitions(layout, tmp_path, monkeypatch):
    """Three episodes of different lengths; no observation moves from one to the next."""
    if layout in ("minari", "name", "folder"):
        dataset = minari_dataset(tmp_path, monkeypatch)
        dataset = {"minari": dataset, "name": "test/three-v0", "folder": tmp_path / "datasets" / "test" / "three-v0"}[layout]
    elif layout in ("npz", "hdf5"):
        dataset = tmp_path / f"data.{layout}"
        if layout == "npz":
            np.savez(dataset, **flat())
        else:
            h5py = pytest.importorskip("h5py")  # comes with Minari, which the oldest versions leave out
            with h5py.File(dataset, "w") as file:
                for name, values in flat().items():
                    file[name] = values
                file["infos/qpos"] = np.zeros(8)
    else:
        dataset = {
            "episodes": episodes(),
            "mappings": [vars(part) for part in episodes()],
            "generator": iter(episodes()),
            "flat": flat(),
        }[layout]
    model = model_for()
    assert fill_replay_buffer(model, dataset) == 8
    assert model.replay_buffer.pos == 8 and not model.replay_buffer.full
    assert_is_the_dataset(stored(model.replay_buffer))
    batch = model.replay_buffer.sample(100)
    assert set(batch.dones[batch.observations[:, 0] == 0].ravel().tolist()) == {0.0, 1.0}
    assert not batch.dones[batch.observations[:, 0] > 0].any(), "time limits are bootstrapped"


@pytest.mark.parametrize("rows", [2, 3, 8, 100])
def test_parts_of_any_size(rows, monkeypatch):
    monkeypatch.setattr(reading, "ROWS", rows)
    model = model_for()
    assert fill_replay_buffer(model, flat(timeouts=None)) == 8
    arrays = stored(model.replay_buffer)
    np.testing.assert_array_equal(arrays["observations"], flat()["observations"])
    np.testing.assert_array_equal(arrays["dones"].ravel(), flat()["terminals"])


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
def test_without_next_observations_cut_transitions_are_left_out(rows, monkeypatch):
    """The last one of an episode that was cut, and of the data: what followed is not there. The one before is the cut now."""
    monkeypatch.setattr(reading, "ROWS", rows)
    longer = {
        name: np.concatenate([values[:3], values[4:7], values[4:]]) for name, values in flat(next_observations=None).items()
    }
    longer["timeouts"] = np.array([0, 0, 0, 0, 0, 1, 0, 0, 0, 0], bool)
    model = model_for()
    assert fill_replay_buffer(model, longer) == 8
    arrays = stored(model.replay_buffer)
    time = np.array([0, 1, 2, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(arrays["observations"][:, 1], time)
    alive = arrays["dones"].ravel() * (1 - arrays["timeouts"].ravel()) == 0
    np.testing.assert_array_equal(arrays["next_observations"][alive, 1], time[alive] + 1)
    np.testing.assert_array_equal(arrays["timeouts"].ravel(), [0, 0, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(alive, [1, 1, 0, 1, 1, 1, 1, 1])


def test_data_come_behind_what_is_there_and_count():
    model = model_for()
    for _ in range(2):
        fill_replay_buffer(model.replay_buffer, episodes())
    assert model.replay_buffer.pos == 16
    with pytest.raises(
        ValueError, match="buffer_size must hold the dataset beside the 16 transitions there, at least 24, got 20"
    ):
        fill_replay_buffer(model, flat())
    assert model.replay_buffer.pos == 16
    exact = model_for(buffer_size=8)
    fill_replay_buffer(exact, flat())
    assert exact.replay_buffer.full and exact.replay_buffer.pos == 0
    assert_is_the_dataset(stored(exact.replay_buffer))
    with pytest.raises(ValueError, match="beside the 8 transitions"):
        fill_replay_buffer(exact, flat())


def test_several_environments_share_the_data():
    model = model_for(n_envs=3)
    assert fill_replay_buffer(model, episodes()) == 6, "two are left that fill no row"
    assert_is_the_dataset(stored(model.replay_buffer), n_rows=6, cut=(3, 4, 5))


def test_saved_buffers_are_datasets(tmp_path):
    """Of one algorithm for another. Its actions are in the environment's units on the way, and time limits are cuts."""
    source = model_for(n_envs=2)
    fill_replay_buffer(source, [*episodes(), *episodes()])
    save_to_pkl(tmp_path / "buffer.pkl", source.replay_buffer)
    target = SAC("MlpPolicy", SpacesEnv(OBSERVATIONS, ACTIONS), buffer_size=30, policy_kwargs=dict(net_arch=[4]))
    assert fill_replay_buffer(target, tmp_path / "buffer.pkl") == 16
    ours, theirs = stored(target.replay_buffer), source.replay_buffer
    by_env = {name: np.concatenate([getattr(theirs, name)[:8, env].reshape(8, -1) for env in range(2)]) for name in ours}
    for name in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_allclose(ours[name], by_env[name], atol=1e-6, err_msg=name)
    ends = by_env["dones"] * (1 - by_env["timeouts"])
    np.testing.assert_array_equal(ours["dones"] * (1 - ours["timeouts"]), ends)
    wrapped = model_for(buffer_size=6)
    for row in range(8):  # the first two are overwritten
        one = {name: values[row : row + 1] for name, values in flat().items()}
        space = wrapped.action_space
        action = 2 * (one["actions"] - space.low) / (space.high - space.low) - 1
        infos = [{"TimeLimit.truncated": bool(one["timeouts"][0])}]
        done = one["terminals"] | one["timeouts"]
        wrapped.replay_buffer.add(one["observations"], one["next_observations"], action, one["rewards"], done, infos)
    again = model_for()
    assert fill_replay_buffer(again, wrapped.replay_buffer) == 6
    np.testing.assert_array_equal(again.replay_buffer.rewards[:6, 0], flat()["rewards"][2:])


def test_dictionaries_images_and_hindsight():
    model = tiny_qvpo(DictEnv(), "MultiInputPolicy", buffer_size=50)
    shape = model.observation_space["a"].shape
    rng = np.random.default_rng(0)
    part = SimpleNamespace(
        observations={key: rng.normal(size=(5, *shape)).astype(np.float32) for key in "ab"},
        actions=np.zeros((4, *model.action_space.shape), np.float32),
        rewards=np.zeros(4),
        terminations=np.zeros(4, bool),
        truncations=np.zeros(4, bool),
    )
    assert fill_replay_buffer(model, [part]) == 4
    np.testing.assert_array_equal(model.replay_buffer.observations["b"][:4, 0], part.observations["b"][:4])
    np.testing.assert_array_equal(model.replay_buffer.next_observations["a"][:4, 0], part.observations["a"][1:])
    model.learn_offline(gradient_steps=2)

    channels_last = rng.integers(0, 256, size=(5, 36, 36, 3)).astype(np.uint8)
    images = tiny_qvpo(SpacesEnv(IMAGE, ACTIONS), "CnnPolicy", buffer_size=10)
    part = SimpleNamespace(**{**vars(part), "observations": channels_last, "actions": np.zeros((4, 2), np.float32)})
    fill_replay_buffer(images, [part])
    np.testing.assert_array_equal(images.replay_buffer.observations[0, 0], np.moveaxis(channels_last[0], -1, 0))

    her = tiny_qvpo(GoalEnv(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, buffer_size=100, learning_starts=5)
    keys = her.observation_space.spaces
    part = SimpleNamespace(
        observations={key: np.zeros((5, *space.shape), np.float32) for key, space in keys.items()},
        actions=np.zeros((4, *her.action_space.shape), np.float32),
        **{name: value for name, value in vars(part).items() if name in ("rewards", "terminations", "truncations")},
    )
    assert fill_replay_buffer(her, [part]) == 4
    her.learn_offline(gradient_steps=2)


def test_n_step_returns_stop_where_episodes_do():
    model = model_for(n_steps=3, gamma=0.5)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    fill_replay_buffer(model, episodes())
    batch = model.replay_buffer._get_samples(np.array([0, 1, 3, 4, 7]))
    np.testing.assert_allclose(batch.rewards.ravel(), [0 + 0.5 * 1 + 0.25 * 2, 1 + 0.5 * 2, 10, 20 + 0.5 * 21 + 0.25 * 22, 23])
    with pytest.raises(ValueError, match="n_steps must be 1 to fill a buffer of several environments"):
        fill_replay_buffer(model_for(n_envs=2, n_steps=3), episodes())


def test_memory_saving_buffers_are_filled_in_time_order():
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
    model = model_for(**kwargs)
    fill_replay_buffer(model, episodes())
    batch = model.replay_buffer._get_samples(np.array([0, 1]))
    np.testing.assert_array_equal(batch.next_observations[:, 1], [1, 2])
    with pytest.raises(ValueError, match="both ends of each transition"):
        fill_replay_buffer(model_for(), model.replay_buffer)


def with_change(name, change):
    """Flat arrays of which one is changed in place."""
    arrays = flat()
    arrays[name] = arrays[name].astype(float)
    change(arrays[name])
    return arrays


def without(name, arrays):
    """All but one."""
    return {other: values for other, values in arrays.items() if other != name}


def set_to(row, value):
    def change(array):
        array[row] = value

    return change


def broken(number, **changed):
    """Episodes of which one is changed."""
    parts = episodes()
    parts[number] = SimpleNamespace(**{**vars(parts[number]), **changed})
    return parts


BAD = {
    "NaN reward": (lambda: with_change("rewards", set_to(5, np.nan)), r"rewards must be finite, got nan in row 5"),
    "NaN observation": (
        lambda: with_change("observations", set_to(6, np.inf)),
        r"observations must be finite, got \[inf, inf\] in row 6",
    ),
    "NaN in an episode": (
        lambda: broken(2, observations=np.array([[0, 0], [0, np.nan], [0, 0], [0, 0], [0, 0]], np.float32)),
        r"observations must be finite, got \[0.0, nan\] in episode 2, row 1",
    ),
    "NaN action": (lambda: with_change("actions", set_to((2, 1), np.nan)), r"actions must be finite, got .* in row 2"),
    "action out of bounds": (
        lambda: with_change("actions", set_to((3, 0), 2.1)),
        r"actions must be within .*, got \[2.1, .*\] in row 3; clip_actions=True clips them",
    ),
    "reward beyond float32": (lambda: with_change("rewards", set_to(5, 1e39)), r"rewards must be finite, got 1e\+39 in row 5"),
    "NaN flag": (lambda: with_change("terminals", set_to(4, np.nan)), r"terminals must be 0 or 1, got nan in row 4"),
    "other flag": (lambda: with_change("timeouts", set_to(6, 2)), r"timeouts must be 0 or 1, got 2.0 in row 6"),
    "two flags a row": (lambda: flat(terminals=np.zeros((8, 2))), r"terminals must be one flag a row, got shape \(3, 2\)"),
    "flag of an episode": (
        lambda: broken(2, truncations=np.array([0, 0, 0, 0.5])),
        r"truncations of episode 2 must be 0 or 1, got 0.5 in episode 2, row 3",
    ),
    "behind a row that is left out": (
        lambda: without("next_observations", with_change("actions", set_to((5, 0), 2.1))),
        r"got \[2.1, .*\] in row 5",
    ),
    "no timeouts": (lambda: flat(timeouts=None, next_observations=None), "the field 'timeouts' or 'next_observations'"),
    "no rewards": (lambda: flat(rewards=None), "must have the field 'rewards', got"),
    "other lengths": (lambda: flat(rewards=np.zeros(7)), "rewards must have as many rows as observations, 8, got 7"),
    "two rewards a row": (lambda: flat(rewards=np.zeros((8, 2))), r"rewards must be one number a row, got shape \(3, 2\)"),
    "another task's observations": (
        lambda: flat(observations=np.zeros((8, 3)), next_observations=np.zeros((8, 3))),
        r"observations must have the shape of the model's observation space, \(2,\), got \(3,\)",
    ),
    "another task's actions": (lambda: flat(actions=np.zeros((8, 3))), r"actions must have the shape .*, \(2,\), got \(3,\)"),
    "keys": (
        lambda: flat(observations={"a": np.zeros((8, 2))}, next_observations={"a": np.zeros((8, 2))}),
        "observations must be an array, .* got keys",
    ),
    "one transition": (
        lambda: {name: values[:1] for name, values in flat().items()},
        "dataset must hold at least 2 transitions, got 1",
    ),
    "nothing": (lambda: [], "dataset must hold at least 2 transitions, got 0"),
    "empty episode": (
        lambda: broken(1, actions=np.zeros((0, 2)), observations=np.zeros((1, 2))),
        "episode 1 must have at least one action",
    ),
    "T observations": (
        lambda: broken(2, observations=np.zeros((4, 2))),
        "observations of episode 2 must be one more than its 4 actions, got 4",
    ),
    "too few flags": (lambda: broken(0, terminations=np.zeros(2, bool)), "terminations of episode 0 must be as many as its 3"),
    "field of an episode": (lambda: broken(0, truncations=None), "episode 0 must have the field 'truncations'"),
    "number": (lambda: 3, "dataset must be a Minari dataset, .* got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_refused_and_nothing_is_stored(name, monkeypatch):
    """Also where the fault is in a later part."""
    monkeypatch.setattr(reading, "ROWS", 3)
    make, message = BAD[name]
    model = model_for()
    fill_replay_buffer(model, episodes())
    before = {key: values.copy() for key, values in stored(model.replay_buffer).items()}
    with pytest.raises(ValueError, match=message):
        fill_replay_buffer(model, make())
    assert model.replay_buffer.pos == 8
    for key, values in stored(model.replay_buffer).items():
        np.testing.assert_array_equal(values, before[key])
    assert not model.replay_buffer.dones[8:].any() and not model.replay_buffer.timeouts[8:].any()


def test_spaces_are_compared():
    class Named(list):
        observation_space, action_space = OBSERVATIONS, spaces.Box(-1, 1, (2,), np.float32)

    with pytest.raises(ValueError, match=r"dataset must have the model's action_space, .* got Box"):
        fill_replay_buffer(model_for(), Named(episodes()))
    Named.action_space, Named.observation_space = ACTIONS, spaces.Box(-1, 1, (3,), np.float32)
    with pytest.raises(ValueError, match="dataset must have the model's observation_space"):
        fill_replay_buffer(model_for(), Named(episodes()))
    Named.observation_space = OBSERVATIONS
    assert fill_replay_buffer(model_for(), Named(episodes())) == 8


def test_clipping_and_rewards():
    model = model_for()
    arrays = with_change("actions", set_to((3, 0), 9))
    fill_replay_buffer(model, arrays, reward_transform=lambda rewards: rewards - 1, clip_actions=True)
    assert model.replay_buffer.actions[3, 0, 0] == 1
    np.testing.assert_array_equal(model.replay_buffer.rewards[:8, 0], flat()["rewards"] - 1)
    with pytest.raises(ValueError, match=r"reward_transform must return shape \(8,\)"):
        fill_replay_buffer(model_for(), flat(), reward_transform=lambda rewards: rewards[:2])
    with pytest.raises(ValueError, match="reward_transform of rewards must be finite"):
        fill_replay_buffer(model_for(), flat(), reward_transform=lambda rewards: rewards * np.nan)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_columns_of_a_file_are_the_arrays_in_it(save, tmp_path, monkeypatch):
    """Read forward, backward and with gaps, in whatever order the bytes are."""
    monkeypatch.setattr(npz, "PIECE", 40)
    arrays = {
        "vectors": np.arange(200.0).reshape(50, 4),
        "flags": np.arange(50) % 3 == 0,
        "images": np.arange(50 * 6, dtype=np.uint8).reshape(50, 1, 2, 3),
        "columns": np.asfortranarray(np.arange(100.0).reshape(50, 2)),
        "swapped": np.arange(50).astype(">i4"),
        "nothing": np.zeros((50, 0)),
        "about": np.array("text"),
        "infos": np.array([{}, None], object),
    }
    save(tmp_path / "data.npz", **arrays)
    with npz.columns(tmp_path / "data.npz") as columns:
        assert set(columns) == set(arrays)
        for name in list(arrays)[:6]:
            assert len(columns[name]) == 50
            for start, stop in ((0, 7), (1, 8), (7, 14), (8, 15), (30, 33), (33, 60), (49, 50), (0, 50), (3, 3)):
                np.testing.assert_array_equal(columns[name][start:stop], arrays[name][start:stop], err_msg=name)
        for name in ("about", "infos"):
            with pytest.raises(ValueError, match=f"{name}.npy must be numbers with a first dimension that counts rows"):
                len(columns[name])


def test_a_file_is_read_in_parts(tmp_path):
    """Of 64 MB at most a fifth is in memory at a time."""
    rows = 1_000_000
    np.savez(tmp_path / "data.npz", observations=np.zeros((rows, 8), np.float64))
    tracemalloc.start()
    with npz.columns(tmp_path / "data.npz") as columns:
        total = sum(len(columns["observations"][start : start + 20_000]) for start in range(0, rows, 20_000))
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == rows and peak < 13e6


def test_a_path_that_is_none(tmp_path):
    """A file of another kind is no name of Minari's; one that is not there is not found."""
    (tmp_path / "data.csv").write_text("1,2")
    for name in ("data.csv", "other.parquet"):
        with pytest.raises(ValueError, match=rf"a path that ends in .hdf5, .h5, .npz or .pkl, .* got '.*{name}'"):
            fill_replay_buffer(model_for(), tmp_path / name)
    for name in ("none.npz", "none.hdf5", "none.pkl"):
        with pytest.raises(FileNotFoundError, match=name):
            fill_replay_buffer(model_for(), tmp_path / name)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"a file that numpy.savez\(\) wrote, got '.*data.npz'"):
        fill_replay_buffer(model_for(), tmp_path / "data.npz")


def test_images_in_other_units_are_refused():
    """In [0, 1] they would all be black."""
    model = tiny_qvpo(make_vec_env(lambda: SpacesEnv(IMAGE, ACTIONS)), "CnnPolicy", buffer_size=20, policy_kwargs={})
    images = np.full((8, *IMAGE.shape), 255.0)
    arrays = flat(observations=images, next_observations=images)
    assert fill_replay_buffer(model, arrays) == 8
    arrays["next_observations"] = images.copy()
    arrays["next_observations"][6, 0, 0, 0] = 0.5
    with pytest.raises(ValueError, match="next_observations must be whole numbers from 0 to 255, got others in row 6"):
        fill_replay_buffer(model, arrays)


def test_memory_is_that_of_the_buffer_and_one_part():
    """Rows are asked for in parts, never all at once."""
    asked = []

    class Lazy:
        def __init__(self, values):
            self.values = values

        def __len__(self):
            return len(self.values)

        def __getitem__(self, rows):
            asked.append(rows.stop - rows.start)
            return self.values[rows]

    n_rows = 200_000
    whole = {
        "observations": np.zeros((n_rows, 2), np.float32),
        "actions": np.full((n_rows, 2), 1.0, np.float32),
        "rewards": np.zeros(n_rows, np.float32),
        "terminals": np.zeros(n_rows, bool),
        "timeouts": np.zeros(n_rows, bool),
    }
    model = model_for(buffer_size=n_rows)
    assert fill_replay_buffer(model, {name: Lazy(values) for name, values in whole.items()}, progress_bar=True) == n_rows - 1
    assert max(asked) <= reading.ROWS


def test_a_model_without_an_environment_cannot_collect():
    model = model_for()
    with pytest.raises(RuntimeError, match="SpacesEnv has no dynamics"):
        model.learn(5)
    assert gym.spaces.utils.flatdim(model.observation_space) == 2


def test_scores_of_papers():
    np.testing.assert_allclose(normalized_score(np.array([-20.0, 3234.0, 1607.0]), -20, 3234), [0, 1, 0.5])


def test_buffers_are_needed():
    model = model_for()
    model.replay_buffer = None
    with pytest.raises(ValueError, match="must have a replay buffer"):
        fill_replay_buffer(model, flat())
    assert isinstance(ReplayBuffer, type)
