"""RL Zoo: registration, settings, search space. The commands themselves, in a fresh environment: test_zoo_commands.py."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import torch as th
import yaml
from helpers import TINY, tiny_qvpo
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from run import ALGOS
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qvpo import QVPO, zoo

ROOT = Path(__file__).parents[1]
AUTOLOAD = ROOT / "sb3_qvpo" / "_autoload"
CONFIGS = {
    name: yaml.safe_load((ROOT / "hyperparams" / f"{name}.yml").read_text()) for name in ("qvpo", "qvpo_official", "qvpo_fast")
}
PAPER, OFFICIAL, FAST = CONFIGS.values()


def test_registration_is_automatic_and_idempotent():
    """This test run has imported rl_zoo3 and called nothing."""
    assert rl_zoo3.ALGOS["qvpo"] is zoo.ZooQVPO
    assert HYPERPARAMS_SAMPLER["qvpo"] is zoo.sample_qvpo_params
    assert HYPERPARAMS_CONVERTER["qvpo"] is zoo.convert_qvpo_params
    before = ExperimentManager.__init__
    zoo.register()
    zoo.register()
    assert ExperimentManager.__init__ is before


def run_python(code, tmp_path, **environment):
    """Run code in an interpreter that sees the start-up file, next to whatever else is in ``tmp_path``."""
    for name in ("sb3_qvpo_autoload.pth", "sb3_qvpo_autoload.py"):
        (tmp_path / name).write_text((AUTOLOAD / name).read_text())
    code = f"import site; site.addsitedir({str(tmp_path)!r})\n{code}"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "", **environment}
    return subprocess.run([sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_start_up_file_imports_nothing_and_prints_nothing(tmp_path):
    code = """
import sys
assert any(type(finder).__name__ == "ZooFinder" for finder in sys.meta_path)
assert not {"torch", "numpy", "rl_zoo3", "sb3_qvpo", "importlib.util"} & set(sys.modules) - before, sys.modules
"""
    result = run_python("import sys; before = set(sys.modules)" + code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("raise RuntimeError('rl_zoo3 is broken')", "RuntimeError: rl_zoo3 is broken"),
        ("", ""),  # a zoo without tables
        (None, "ModuleNotFoundError: No module named 'rl_zoo3'"),
    ],
)
def test_a_broken_or_missing_zoo_breaks_nothing_else(tmp_path, package, expected):
    if package is not None:
        (tmp_path / "rl_zoo3").mkdir()
        (tmp_path / "rl_zoo3" / "__init__.py").write_text(package)
    hide_installed = f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path)!r}]\n"
    assert run_python("print('works')", tmp_path).stdout == "works\n"
    result = run_python(hide_installed + "import rl_zoo3; print('imported')", tmp_path)
    if expected:
        assert expected in result.stderr
    else:  # there is no sb3_qvpo on this path either: one warning, and the zoo is imported
        assert result.stdout == "imported\n"
        assert "sb3_qvpo could not add QVPO to rl_zoo3" in result.stderr


@pytest.mark.parametrize("value", ["0", "false", "NO"])
def test_an_environment_variable_switches_it_off(value):
    command = [sys.executable, "-c", "import rl_zoo3; print('qvpo' in rl_zoo3.ALGOS)"]
    outputs = [
        subprocess.run(command, env={"SB3_QVPO_ZOO": setting}, capture_output=True, text=True, check=True).stdout
        for setting in (value, "1")
    ]
    assert outputs == ["False\n", "True\n"]


def test_importing_the_zoo_alone_does_not_import_optuna():
    code = "import rl_zoo3, sys; assert 'qvpo' in rl_zoo3.ALGOS and 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explicit_registration_and_command():
    command = [sys.executable, "-m", "sb3_qvpo.zoo"]
    off = {"SB3_QVPO_ZOO": "0"}
    result = subprocess.run([*command, "train", "--help"], env=off, capture_output=True, text=True, check=True)
    assert re.search(r"--algo \{[^}]*\bqvpo\b", result.stdout)
    folder = subprocess.run([*command, "hyperparams"], env=off, capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(folder) / "qvpo_official.yml").is_file()
    for arguments in ([], ["trian"]):
        result = subprocess.run([*command, *arguments], env=off, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert "usage: python -m sb3_qvpo.zoo {train,enjoy" in result.stderr


# Settings


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
    for line in (ROOT / "hyperparams" / "qvpo.yml").read_text().splitlines():
        if re.match(r"  \w+: ", line) and not line.startswith("  policy: "):
            assert re.search(r"# \[(paper|code|zoo|study|guess)\]", line), line


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
    yield
    gym.envs.registry.clear()
    gym.envs.registry.update(registry)


ENTRIES = [(config, name) for config, entries in CONFIGS.items() for name in entries]


def set_up(env_id, folder, config=None, **hyperparams):
    """The model that RL Zoo would train; ``buffer_size`` apart, which would take gigabytes."""
    hyperparams = {"buffer_size": 200, **hyperparams}
    arguments = type("Arguments", (), {})()
    manager = ExperimentManager(
        arguments, "qvpo", env_id, str(folder), config=config, eval_freq=-1, verbose=0, hyperparams=hyperparams
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
    config_file = None if config == "qvpo" else str(zoo.hyperparams_folder() / f"{config}.yml")
    model = set_up(env_id, tmp_path, config=config_file)
    assert type(model) is zoo.ZooQVPO
    entry = CONFIGS[config][name]
    numbers = ("n_behavior_candidates", "n_target_candidates", "n_train_candidates", "n_diffusion_steps", "policy_delay")
    for key in (*numbers, "ent_coef", "max_grad_norm"):
        if key in entry:
            assert getattr(model, key) == entry[key], key
    assert model.policy.n_diffusion_steps == entry["n_diffusion_steps"]


def test_the_fast_settings_change_the_cost_only():
    """And are those of the learning curves."""
    changed = dict(n_train_candidates=8, policy_delay=2, policy_kwargs="dict(n_sampling_steps=5)")
    changed |= dict(n_uniform_actions=2, ent_coef=0.05)  # a fifth as many, of five times the weight
    for name, entry in FAST.items():
        assert entry == {**PAPER[name], **changed}, name
    assert ALGOS["qvpo_ddpm5_nd8_delay2"] == ("qvpo", {**changed, "policy_kwargs": dict(n_sampling_steps=5, sampling_eta=1.0)})
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
        assert getattr(model, key) == settings[key], key


def test_the_official_settings_are_the_authors():
    entry = OFFICIAL["Hopper-v5"]
    theirs = LinearSchedule(0.02, 0.002, 0.9)
    ours = tiny_qvpo(ent_coef=entry["ent_coef"])._ent_coef_schedule
    assert [ours(p / 10) for p in range(11)] == pytest.approx([theirs(p / 10) for p in range(11)])
    assert (entry["learning_rate"], entry["qf_learning_rate"], entry["max_grad_norm"]) == (1e-4, 3e-4, 2.0)
    assert (entry["n_target_candidates"], entry["learning_starts"]) == (4, 10_000)
    assert "net_arch=[256, 256, 256]" in entry["policy_kwargs"]
    assert all(other == entry for other in OFFICIAL.values())


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


# Tuning

LOW = dict(
    one_minus_gamma=0.02, learning_rate=1e-3, qf_learning_rate=1e-3, tau=0.01, train_freq=2, ent_coef=0.01, q_weighting="qadv",
    noise_schedule="cosine", net_arch="small", n_uniform_actions=4, n_behavior_candidates_pow=0, target_candidates_shift=0,
    batch_size_pow=7, diffusion_steps_pow=0, draws_pow=12,
)  # fmt: skip
NO_HER = dict(using_her_replay_buffer=False, her_kwargs={})


def random_trials(n, additional_args):
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    return [(trial, zoo.sample_qvpo_params(trial, 1, 1, dict(additional_args))) for trial in (study.ask() for _ in range(n))]


def estimated_cost(params):
    """Network passes of an update; a step with gradients counts as three; the wider network as 2.5 (measured)."""
    draws = params["n_diffusion_steps"] * (params["n_train_candidates"] + params["n_target_candidates"])
    steps = 3 * (1 + params["n_uniform_actions"]) + 3 * 2
    width = params["policy_kwargs"]["net_arch"][0]
    return params["batch_size"] * (draws + steps) * (1 if width == 128 else 2.5)


def test_sampled_settings_are_valid_and_share_a_budget():
    costs = []
    for trial, params in random_trials(200, NO_HER):
        assert params["n_target_candidates"] <= params["n_behavior_candidates"]
        assert params["n_train_candidates"] in (2, 4, 8, 16, 32, 64)
        assert params["gradient_steps"] == params["train_freq"]
        for name, value in trial.user_attrs.items():
            assert params[name] == value
        assert zoo.convert_qvpo_params(trial.params) == params  # what --trial-id does
        costs.append(estimated_cost(params))
    assert 3 < max(costs) / min(costs) <= 4
    sampled = {name: {str(params[name]) for _, params in random_trials(200, NO_HER)} for name in ("q_weighting", "train_freq")}
    assert sampled["q_weighting"] == {"qadv", "qcut"}
    assert len(sampled["train_freq"]) == 10


@pytest.mark.parametrize("changes", [{}, dict(q_weighting="qcut", noise_schedule="vp", net_arch="medium", batch_size_pow=8)])
def test_converted_settings_train(changes):
    params = zoo.convert_qvpo_params({**LOW, **changes})
    model = QVPO("MlpPolicy", "Pendulum-v1", learning_starts=4, buffer_size=100, device="cpu", **params).learn(8)
    assert model._n_updates == 4


def test_the_search_can_be_widened(monkeypatch):
    def reaches_the_paper():
        sizes = {
            (p["batch_size"], p["n_diffusion_steps"], p["n_train_candidates"], *p["policy_kwargs"]["net_arch"])
            for _, p in random_trials(1000, NO_HER)
        }
        return (256, 20, 64, 256, 256) in sizes

    assert not reaches_the_paper()
    monkeypatch.setenv("SB3_QVPO_SEARCH_COST", "16")
    assert reaches_the_paper()
    for bad in ("0.5", "much", "nan"):
        monkeypatch.setenv("SB3_QVPO_SEARCH_COST", bad)
        with pytest.raises(ValueError, match=f"SB3_QVPO_SEARCH_COST must be a factor of at least 1, got '{bad}'"):
            random_trials(1, NO_HER)


def test_her_is_sampled_too():
    her = dict(using_her_replay_buffer=True, her_kwargs=dict(n_sampled_goal=4, copy_info_dict=True))
    for trial, params in random_trials(20, her):
        assert params["replay_buffer_kwargs"]["goal_selection_strategy"] in ("final", "episode", "future")
        assert params["replay_buffer_kwargs"]["copy_info_dict"] is True
        from_study = zoo.convert_qvpo_params(trial.params)["replay_buffer_kwargs"]
        assert from_study.items() <= params["replay_buffer_kwargs"].items()
        assert not {"n_sampled_goal", "goal_selection_strategy"} & params.keys()


# Playing and continuing


def test_playing_allocates_no_full_size_buffer(tmp_path):
    tiny_qvpo(buffer_size=1_000_000).save(tmp_path / "model")
    as_enjoy_does = dict(custom_objects={"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}, seed=0)
    as_push_to_hub_does = dict(custom_objects={}, env=gym.make("Pendulum-v1"), seed=0)
    for arguments in (as_enjoy_does, as_push_to_hub_does):
        assert zoo.ZooQVPO.load(tmp_path / "model", **arguments).replay_buffer.buffer_size == 1
    assert rl_zoo3.ALGOS["qvpo"].__name__ == "QVPO"  # in model cards
    assert zoo.ZooQVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1")).replay_buffer.buffer_size == 1_000_000


def test_continuing_skips_the_warm_up_and_keeps_the_schedule(tmp_path):
    model = tiny_qvpo(learning_starts=10, ent_coef="lin_1.0").learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    with_buffer = zoo.ZooQVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    with_buffer.load_replay_buffer(tmp_path / "buffer")
    random_actions = []
    with_buffer.action_space.sample = lambda: random_actions.append(1)
    ent_coefs, starts = [], []

    def record(*_):
        ent_coefs.append(with_buffer._ent_coef_schedule(with_buffer._current_progress_remaining))
        starts.append(with_buffer.learning_starts)
        with_buffer.save(tmp_path / "during")
        return True

    with_buffer.learn(20, callback=record)
    assert (with_buffer.num_timesteps, with_buffer._n_updates) == (40, 30)
    assert not random_actions
    assert set(starts) == {0}
    assert with_buffer.learning_starts == QVPO.load(tmp_path / "during").learning_starts == 10
    assert ent_coefs[1] == pytest.approx(1 - 21 / 40)  # the second half of 40 steps, not a second 1.0

    again = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").learn(15)
    assert (again.num_timesteps, again._n_updates) == (15, 10 + 5)  # an empty buffer: warm-up as in SB3


def test_a_checkpoint_is_resumed(tmp_path):
    """Given to ``-i``: with its buffer, counters, normalisation and random states, as by ``resume()``."""

    def env(**settings):
        return VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), **settings)

    model = zoo.ZooQVPO("MlpPolicy", env(), **{**TINY, "learning_starts": 10, "seed": 0}).learn(20)
    model.save_checkpoint(tmp_path / "run")
    as_training_does = dict(env=env(), seed=5, device="cpu", learning_starts=10, n_diffusion_steps=TINY["n_diffusion_steps"])
    resumed = zoo.ZooQVPO.load(str(tmp_path / "run.zip"), **as_training_does)
    assert (resumed.num_timesteps, resumed._n_updates, resumed.replay_buffer.size()) == (20, 10, 20)
    np.testing.assert_array_equal(resumed.get_vec_normalize_env().obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    resumed.learn(5)
    by_hand = QVPO.resume(tmp_path / "run", env(), device="cpu").learn(5, reset_num_timesteps=False)
    assert (resumed.num_timesteps, resumed._n_updates) == (25, 15)
    for one, other in zip(resumed.policy.parameters(), by_hand.policy.parameters(), strict=True):
        assert th.equal(one, other)
    # RL Zoo loads any buffer that it finds beside the file: not over the checkpoint's own
    model.save_replay_buffer(tmp_path / "replay_buffer")
    again = zoo.ZooQVPO.load(str(tmp_path / "run.zip"), **{**as_training_does, "env": env()})
    buffer = again.replay_buffer
    with pytest.warns(UserWarning, match="the checkpoint has its own replay buffer"):
        again.load_replay_buffer(tmp_path / "replay_buffer")
    assert again.replay_buffer is buffer
    again.save(tmp_path / "saved")
    later = zoo.ZooQVPO.load(tmp_path / "saved", env=env(), device="cpu")
    later.load_replay_buffer(tmp_path / "replay_buffer")
    assert later.replay_buffer.size() == 20
    played = zoo.ZooQVPO.load(str(tmp_path / "run.zip"), custom_objects={})
    assert (played.num_timesteps, played.replay_buffer.buffer_size) == (20, 1)


@pytest.mark.parametrize("cls", [QVPO, zoo.ZooQVPO])
def test_continuing_without_a_buffer_fills_it_first(cls, tmp_path):
    tiny_qvpo(learning_starts=10).learn(20).save(tmp_path / "model")
    model = cls.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    sizes = []
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda *args, **kwargs: (sizes.append(model.replay_buffer.size()), sample(*args, **kwargs))[1]
    model.learn(15, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (35, 10 + 5)
    assert sizes == [11, 12, 13, 14, 15]


def test_continuing_with_her_without_a_buffer(tmp_path):
    def env():
        return BitFlippingEnv(n_bits=3, continuous=True)

    her = dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=10)
    tiny_qvpo(env(), **her).learn(30).save(tmp_path / "model")
    model = zoo.ZooQVPO.load(tmp_path / "model", env=env(), device="cpu").learn(20)
    assert model.num_timesteps == 50
    assert model._n_updates == 20 + 10


def test_continuing_keeps_the_number_of_diffusion_steps(tmp_path):
    """RL Zoo passes all settings of the task to load(), but the policy is the model's."""
    tiny_qvpo(n_diffusion_steps=3).learn(10).save(tmp_path / "model")
    settings = dict(n_diffusion_steps=20, ent_coef=0.5, env=gym.make("Pendulum-v1"), device="cpu")
    with pytest.warns(UserWarning, match="n_diffusion_steps stays 3, as in the saved model; 20 was asked for"):
        model = zoo.ZooQVPO.load(tmp_path / "model", **settings).learn(10)
    assert (model.policy.n_diffusion_steps, model.ent_coef) == (3, 0.5)


def test_continuing_writes_its_own_tensorboard_folder(tmp_path):
    def train(**kwargs):
        return zoo.ZooQVPO("MlpPolicy", "Pendulum-v1", **{**TINY, "tensorboard_log": str(tmp_path / "tb")}).learn(8)

    train().save(tmp_path / "model")
    train()  # another run
    model = zoo.ZooQVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu").learn(8)
    assert model.num_timesteps == 16
    files = sorted(path.parent.name for path in (tmp_path / "tb").glob("*/*tfevents*"))
    assert files == ["QVPO_1", "QVPO_2", "QVPO_3"]
