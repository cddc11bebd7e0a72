"""The settings files: their values are the sources', and RL Zoo builds a model from every entry."""

import copy
import inspect
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from helpers import ROOT, tiny_qvpo
from rl_zoo3.exp_manager import ExperimentManager
from run import ALGOS
from stable_baselines3.common.utils import LinearSchedule

from sb3_qvpo import DTQL, QVPO, SDAC, DiffusionQL, presets, zoo

CONFIGS = {
    name: yaml.safe_load((ROOT / "hyperparams" / f"{name}.yml").read_text())
    for name in (
        *("qvpo", "qvpo_official", "qvpo_fast", "sdac", "sdac_official", "diffusion_ql", "dtql"),
        *("diffusion_ql_fast", "dtql_fast"),
    )
}
PAPER, OFFICIAL, FAST, SOFT, SOFT_OFFICIAL, FROM_DATA, TRUSTED, *_ = CONFIGS.values()


def as_written(value):
    """Several counts as YAML has them."""
    return list(value) if isinstance(value, tuple) else value


def test_table_3_and_explicit_values():
    targets = {"Ant": 2, "HalfCheetah": 4, "Hopper": 1, "Humanoid": 2, "Walker2d": 2}
    for task, n_target_candidates in targets.items():
        for version in ("v4", "v5"):
            entry = PAPER[f"{task}-{version}"]
            assert entry["n_target_candidates"] == n_target_candidates
            assert (entry["n_behavior_candidates"], entry["ent_coef"], entry["n_diffusion_steps"]) == (4, 0.01, 20)
            assert OFFICIAL[f"{task}-{version}"]["n_target_candidates"] == 4
    others = ["Swimmer", "Reacher", "Pusher", "InvertedPendulum", "InvertedDoublePendulum"]
    expected = {f"{task}-{version}" for task in [*targets, *others] for version in ("v4", "v5")}
    expected |= {"default", "Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3"}
    assert PAPER.keys() == expected | {"FetchReach-v4", "FetchPush-v4"}
    for name, entry in PAPER.items():
        assert {"n_behavior_candidates", "n_target_candidates", "ent_coef", "n_diffusion_steps"} <= entry.keys(), name


def test_the_four_settings_are_written_out_in_every_entry():
    text = (ROOT / "hyperparams" / "qvpo.yml").read_text()
    blocks = dict(re.findall(r"^([\w-]+):(?! \*)[^\n]*\n((?:  [^\n]*\n)+)", text, flags=re.M))
    aliases = re.findall(r"^([\w-]+): \*", text, flags=re.M)
    assert blocks.keys() | set(aliases) == PAPER.keys()
    for name, block in blocks.items():
        for key in ("n_behavior_candidates", "n_target_candidates", "ent_coef", "n_diffusion_steps"):
            assert re.search(rf"^  {key}: ", block, flags=re.M), (name, key)


def test_every_value_has_its_source():
    texts = [(ROOT / "hyperparams" / f"{name}.yml").read_text() for name in ("qvpo", "sdac", "diffusion_ql", "dtql")]
    for line in "".join(texts).splitlines():
        if re.match(r"  \w+: ", line) and not line.startswith("  policy: "):
            assert re.search(r"# \[(paper|code|zoo|study|guess)\]", line), line


def algorithm_of(name):
    """The class that a settings file or a preset is for."""
    named = {"sdac": SDAC, "diffusion_ql": DiffusionQL, "dtql": DTQL}
    return next((algorithm for prefix, algorithm in named.items() if name.startswith(prefix)), QVPO)


def completed(settings, algorithm):
    """With the defaults of the class for all that is not named."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(algorithm).parameters.items()}
    return {name: settings.get(name, default) for name, default in defaults.items()}


OF_PRESETS = [
    ("small", "qvpo", "Pendulum-v1", {"gamma"}),
    *(("fast", "qvpo_fast", name, set()) for name in FAST),
    *(("sdac", "sdac", name, set()) for name in SOFT if name != "Pendulum-v1"),
    *((preset, f"{preset}_fast", name, set()) for preset in ("diffusion_ql", "dtql") for name in CONFIGS[f"{preset}_fast"]),
]


@pytest.mark.parametrize(("preset", "config", "entry", "own"), OF_PRESETS)
def test_a_preset_and_its_file_are_the_same(preset, config, entry, own):
    """The preset says nothing of what belongs to the task."""
    values = {name: value for name, value in CONFIGS[config][entry].items() if name not in {"n_timesteps", "policy", *own}}
    values["policy_kwargs"] = eval(values["policy_kwargs"], {"nn": th.nn})  # RL Zoo's way of writing them
    algorithm = algorithm_of(preset)
    assert completed(values, algorithm) == completed(getattr(presets, preset), algorithm)


PRESETS = [name for name, value in vars(presets).items() if isinstance(value, presets.Preset)]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_models_and_cannot_be_changed(name):
    settings = getattr(presets, name)
    algorithm = algorithm_of(name)
    algorithm("MlpPolicy", "Pendulum-v1", **{**settings, "buffer_size": 50, "learning_starts": 5, "batch_size": 8}).learn(12)
    with pytest.raises(TypeError):
        settings["gamma"] = 0.5
    settings["policy_kwargs"]["net_arch"] = {**settings}["policy_kwargs"]["net_arch"] = [1]
    copied = copy.deepcopy(settings)
    assert copied["policy_kwargs"] == settings["policy_kwargs"] and settings["policy_kwargs"]["net_arch"] != [1]
    assert settings | {"gamma": 0.5} == {**settings, "gamma": 0.5}
    assert repr(settings).startswith("Preset(learning_rate=0.001, ")
    assert (algorithm("MlpPolicy", "Pendulum-v1", **settings, gamma=0.98, buffer_size=10).gamma, "gamma" in settings) == (
        0.98,
        False,
    )


class FakeFetch(gym.Env):
    """A goal environment with the spaces of Fetch, which runs without gymnasium-robotics."""

    def __init__(self, render_mode=None):
        sizes = dict(observation=10, achieved_goal=3, desired_goal=3)
        self.observation_space = gym.spaces.Dict({key: gym.spaces.Box(-10, 10, (n,)) for key, n in sizes.items()})
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        observation = self.observation_space.sample()
        return observation, -1.0, False, False, {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -np.ones(len(achieved_goal))


@pytest.fixture
def stand_ins(monkeypatch):
    """Environments that do not run here: Fetch needs an older MuJoCo, Pusher-v4 too."""
    registry = dict(gym.envs.registry)
    for name in ("FetchReach-v4", "FetchPush-v4"):
        gym.register(name, entry_point=FakeFetch)
    gym.register("Pusher-v4", entry_point="gymnasium.envs.mujoco.pusher_v5:PusherEnv")
    for name in {*FROM_DATA, *TRUSTED} - {*gym.envs.registry, "default"}:  # D4RL's
        gym.register(name, entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=200)
    yield
    gym.envs.registry.clear()
    gym.envs.registry.update(registry)


BUILT = ("default", "antmaze-large-play-v0", "pen-human-v1")

ENTRIES = [
    # Rows of D4RL's tasks, which are in small letters, differ in numbers only: a few of them show that all build
    pytest.param(config, name, marks=[pytest.mark.slow] * (name.islower() and name not in BUILT))
    for config, entries in CONFIGS.items()
    for name in entries
]


def set_up(env_id, folder, config=None, algo="qvpo", **hyperparams):
    """The model that RL Zoo would train; ``buffer_size`` apart, which would take gigabytes."""
    hyperparams = {"buffer_size": 200, **hyperparams}
    arguments = type("Arguments", (), {})()
    manager = ExperimentManager(
        arguments, algo, env_id, str(folder), config=config, eval_freq=-1, verbose=0, hyperparams=hyperparams
    )
    return manager.setup_experiment()[0]


@pytest.mark.parametrize(("config", "name"), ENTRIES)
@pytest.mark.usefixtures("stand_ins")
def test_every_entry_builds_a_model(config, name, tmp_path, monkeypatch):
    """Through RL Zoo itself, up to the model that it would train."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log into the working folder
    env_id = "Acrobot-v1" if name == "default" else name
    if name == "default":
        gym.register("Other-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv")
        env_id = "Other-v0"
    algo = config.removesuffix("_official").removesuffix("_fast")
    config_file = None if config == algo else str(zoo.hyperparams_folder() / f"{config}.yml")
    model = set_up(env_id, tmp_path, config=config_file, algo=algo)
    assert type(model) is zoo.ALGORITHMS[algo].algorithm
    entry = CONFIGS[config][name]
    numbers = ("n_behavior_candidates", "n_target_candidates", "n_train_candidates", "n_diffusion_steps", "policy_delay")
    others = ("eta", "max_q_backup", "alpha", "expectile", "log_prob_coef", "n_pretraining_updates", "reward_transform")
    for key in (*numbers, *others, "ent_coef", "max_grad_norm", "temperature", "n_reverse_samples"):
        if key in entry:
            assert as_written(getattr(model, key)) == entry[key], key
    assert model.policy.n_diffusion_steps == entry.get("n_diffusion_steps", 1)


def test_the_settings_of_the_learning_curves():
    """Those of presets and of the authors."""

    def settings(name):
        return {**ALGOS[name][1], "policy_kwargs": eval(ALGOS[name][1]["policy_kwargs"], {"nn": th.nn})}

    assert settings("preset_fast") == dict(presets.fast) and settings("sdac") == dict(presets.sdac)
    former = dict(n_steps=3, n_behavior_candidates=[2, 8, 16], training_action_noise=0.0, eval_noise_scale=1.0)
    former["policy_kwargs"] = presets.fast["policy_kwargs"] | dict(normalize_features=False)
    assert settings("former") == presets.fast | former
    official = ALGOS["fast_official"][1]
    for name in ("learning_rate", "qf_learning_rate", "max_grad_norm", "n_target_candidates", "ent_coef"):
        assert official[name] == OFFICIAL["HalfCheetah-v5"][name], name


@pytest.mark.parametrize("name", [name for name, (algo, _) in ALGOS.items() if algo == "qvpo"])
def test_the_settings_of_the_learning_curves_build_a_model(name, tmp_path):
    """Some are RL Zoo's own, such as the kind of action noise."""
    settings = ALGOS[name][1]
    model = set_up("Pendulum-v1", tmp_path, **{"n_diffusion_steps": 20, **settings})  # as on MuJoCo
    assert (model.action_noise is not None) == ("noise_type" in settings)
    for key in {"n_behavior_candidates", "n_train_candidates", "policy_delay", "q_weighting"} & settings.keys():
        assert as_written(getattr(model, key)) == settings[key], key


def test_the_official_settings_are_the_authors():
    entry = OFFICIAL["Hopper-v5"]
    theirs = LinearSchedule(0.02, 0.002, 0.9)
    ours = tiny_qvpo(ent_coef=entry["ent_coef"])._ent_coef_schedule
    assert [ours(p / 10) for p in range(11)] == pytest.approx([theirs(p / 10) for p in range(11)])
    assert (entry["learning_rate"], entry["qf_learning_rate"], entry["max_grad_norm"]) == (1e-4, 3e-4, 2.0)
    assert (entry["n_target_candidates"], entry["learning_starts"]) == (4, 10_000)
    assert "net_arch=[256, 256, 256]" in entry["policy_kwargs"]
    assert all(other == entry for other in OFFICIAL.values())


def test_the_official_settings_of_sdac_are_the_authors(tmp_path):
    assert all(entry == SOFT_OFFICIAL["default"] for entry in SOFT_OFFICIAL.values())
    model = set_up("Hopper-v5", tmp_path, config=str(zoo.hyperparams_folder() / "sdac_official.yml"), algo="sdac")
    diffusion = model.actor.diffusion
    bars = diffusion.sqrt_alpha_bars.double() ** 2
    expected = [0.99992, 0.6374, 0.1094, 0.00314, 5.27e-6]
    np.testing.assert_allclose(bars[[0, 4, 9, 14, 19]], expected, rtol=2e-3)
    assert (model.n_envs, model.learning_starts, model.temperature, model.box) == (5, 30_000, "official", "clip")


def test_the_papers_settings_are_the_default():
    """Tables 2 and 3 of the paper; 10 000 random steps are the authors' code's."""
    k_t = {"Hopper": 1, "Walker2d": 2, "Ant": 2, "HalfCheetah": 4, "Humanoid": 2}
    for task, n_target_candidates in k_t.items():
        entry = PAPER[f"{task}-v5"]
        assert (entry["n_target_candidates"], entry["learning_starts"]) == (n_target_candidates, 10_000), task
        assert entry["n_behavior_candidates"] == 4
        assert not {"learning_rate", "qf_learning_rate", "max_grad_norm", "policy_kwargs"} & entry.keys()
    model = QVPO("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    assert (model.learning_rate, model.qf_learning_rate, model.max_grad_norm, model.ent_coef) == (3e-4, None, None, 0.01)
    assert model.learning_starts == 100
    assert [layer.out_features for layer in model.critic.qf0 if isinstance(layer, th.nn.Linear)] == [256, 256, 1]


def test_the_rows_of_diffusion_ql_and_dtql():
    """A few of each table, by hand."""
    row = FROM_DATA["antmaze-large-play-v0"]
    assert (row["learning_rate"], row["eta"], row["max_q_backup"], row["max_grad_norm"]) == (3e-4, 4.5, True, 10.0)
    assert eval(row["reward_transform"])(np.array([0.0, 1.0])).tolist() == [-2.0, 2.0]
    assert (FROM_DATA["kitchen-complete-v0"]["n_timesteps"], FROM_DATA["pen-cloned-v1"]["eta"]) == (250_000, 0.1)
    row = TRUSTED["antmaze-large-diverse-v0"]
    assert (row["alpha"], row["expectile"], row["batch_size"], row["log_prob_coef"]) == (0.5, 0.9, 2048, 1.0)
    assert (TRUSTED["halfcheetah-medium-expert-v2"]["alpha"], TRUSTED["pen-human-v1"]["alpha"]) == (50.0, 1500.0)
    decaying = {name for name, entry in TRUSTED.items() if isinstance(entry["learning_rate"], str)}
    assert len(decaying) == 9 and "hopper-medium-v2" in decaying and "pen-cloned-v1" not in decaying
    assert len(FROM_DATA.keys() & TRUSTED.keys()) == 26
