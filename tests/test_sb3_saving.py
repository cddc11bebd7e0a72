"""What SB3 users rely on with SAC and TD3, here with QVPO: parameters, saving and loading, devices, other environments."""

import io

import numpy as np
import pytest
import torch as th
from helpers import CountdownEnv, recorded_warnings, same_weights, tiny_qvpo, weights_of
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, IdentityEnvBox
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qvpo import QVPO
from sb3_qvpo.common.arguments import parse_schedule

DEVICES = ["auto", "cpu", *(["cuda"] if th.cuda.is_available() else [])]
LAST_WEIGHT = "critic_target.qf1.4.bias"
"""The last tensor of the policy."""


def bandit_qvpo(**kwargs):
    return tiny_qvpo(IdentityEnvBox(-10, 10), **kwargs)


def her_qvpo(n_envs=2, **kwargs):
    env = make_vec_env(BitFlippingEnv, n_envs=n_envs, env_kwargs=dict(n_bits=4, continuous=True))
    return tiny_qvpo(
        env,
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2),
        learning_starts=20,
        gradient_steps=-1,
        **kwargs,
    )


def shake(model):
    """Random weights, the noise schedule apart."""
    for parameter in model.policy.parameters():
        parameter.data.copy_(th.rand_like(parameter))


# Parameters


@pytest.mark.parametrize("exact_match", [True, False])
def test_parameters_of_an_unknown_object_are_refused(exact_match):
    model = bandit_qvpo()
    with pytest.raises(ValueError, match="Key bad_object is an invalid object name"):
        model.set_parameters({**model.get_parameters(), "bad_object": {}}, exact_match=exact_match)


@pytest.mark.parametrize("missing", ["policy", "actor.optimizer", "critic.optimizer"])
def test_all_objects_must_be_there_in_an_exact_match(missing):
    model, other = bandit_qvpo(), bandit_qvpo(seed=1)
    parameters = other.get_parameters()
    del parameters[missing]
    with pytest.raises(ValueError, match=f"Names of parameters do not match .*{missing}.* got"):
        model.set_parameters(parameters, exact_match=True)
    model.set_parameters(parameters, exact_match=False)
    assert same_weights(weights_of(model), weights_of(other)) == (missing != "policy")


def test_all_weights_must_be_there_in_an_exact_match():
    """The message is torch's own, not the one about diffusion steps."""
    model = bandit_qvpo()
    parameters = model.get_parameters()
    del parameters["policy"][LAST_WEIGHT]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{LAST_WEIGHT}"') as error:
        model.set_parameters(parameters, exact_match=True)
    assert "n_diffusion_steps" not in str(error.value)


def test_some_weights_are_enough_without_an_exact_match():
    """What is given changes, what is left out stays."""
    model = bandit_qvpo()
    before = weights_of(model)
    assert list(before)[-1] == LAST_WEIGHT
    model.policy.state_dict()[LAST_WEIGHT].fill_(0.5)
    given = {name: value if "betas" in name else th.rand_like(value) for name, value in before.items() if name != LAST_WEIGHT}
    model.set_parameters({"policy": given}, exact_match=False)
    after = weights_of(model)
    assert after.pop(LAST_WEIGHT).item() == 0.5
    assert same_weights(after, given)
    assert {name for name in given if th.equal(given[name], before[name])} == {name for name in given if "betas" in name}


@pytest.mark.parametrize("exact_match", [True, False])
def test_weights_of_another_noise_schedule_are_refused(exact_match):
    """As many steps, so the shapes fit, but the predictor has learnt to undo another noise. However often it is tried."""

    def model_with(noise_schedule):
        return tiny_qvpo(policy_kwargs=dict(net_arch=[8], noise_schedule=noise_schedule))

    model = model_with("cosine")
    shake(model)
    before = weights_of(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another noise schedule"):
            model.set_parameters(model_with("vp").get_parameters(), exact_match=exact_match)
    assert same_weights(weights_of(model), before)  # nothing was loaded
    schedules = [dict(each.actor.diffusion.named_buffers()) for each in (model, model_with("cosine"))]
    assert same_weights(*schedules)  # all coefficients, those that are not saved among them
    other = model_with("cosine")
    shake(other)
    model.set_parameters(other.get_parameters(), exact_match=exact_match)
    assert same_weights(weights_of(model), weights_of(other))


# Devices


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_a_model_is_built_on_its_device(device):
    model = bandit_qvpo(device=device, seed=None)
    expected = get_device(device).type if device != "meta" else "meta"
    assert {model.device.type, model.policy.device.type, model.actor.device.type} == {expected}
    assert {tensor.device.type for tensor in model.policy.state_dict().values()} == {expected}
    assert {tensor.device.type for tensor in model.actor.diffusion.buffers()} == {expected}


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_loaded_for_its_device(device, tmp_path):
    """Weights, moments of the optimisers and replay buffer; it predicts the same there, and trains."""
    model = bandit_qvpo().learn(12)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = QVPO.load(tmp_path / "model", env=model.get_env(), device=device)
    loaded.load_replay_buffer(tmp_path / "buffer")
    expected = get_device(device).type
    moments = [
        state["exp_avg"] for each in (loaded.actor, loaded.critic) for state in each.optimizer.state_dict()["state"].values()
    ]
    tensors = [*loaded.policy.state_dict().values(), *moments, loaded.replay_buffer.sample(3).observations]
    assert {tensor.device.type for tensor in tensors} == {expected}
    assert {each.device.type for each in (loaded, loaded.policy, loaded.replay_buffer)} == {expected}
    obs = np.linspace(-10, 10, 10, dtype=np.float32).reshape(10, 1)
    actions = [each.predict(obs, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_allclose(*actions, rtol=1e-4, atol=1e-4 if expected != "cpu" else 0)
    assert loaded.learn(10, reset_num_timesteps=False)._n_updates == 7 + 10


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_a_loaded_buffer_moves_to_the_models_device(device, tmp_path):
    model = bandit_qvpo().learn(12)
    model.save_replay_buffer(tmp_path / "buffer")
    model.device = get_device(device) if device != "meta" else th.device("meta")
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer.device == model.device


# Other environments


def test_setting_environments():
    """A reset unless told otherwise; plain environments are wrapped; another number of them is refused."""
    model = bandit_qvpo(train_freq=4).learn(16)
    other = DummyVecEnv([lambda: IdentityEnvBox(-10, 10)])
    model.set_env(other, force_reset=True)
    assert (model._last_obs, model.get_env()) == (None, other)
    assert model.learn(16).num_timesteps == 16
    model.set_env(IdentityEnvBox(-10, 10))
    assert isinstance(model.get_env(), DummyVecEnv)
    assert model.learn(16).num_timesteps == 16
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(IdentityEnvBox, n_envs=2, env_kwargs=dict(low=-10, high=10)))
    last_obs = model._last_obs
    model.set_env(model.get_env(), force_reset=False)
    assert model._last_obs is last_obs
    assert model.learn(16, reset_num_timesteps=False).num_timesteps == 32


def test_loading_with_an_environment(tmp_path):
    """In the middle of its episode or with a reset; the count of steps is kept; the number of environments may change."""
    model = bandit_qvpo().learn(16)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=model.get_env(), force_reset=False)
    np.testing.assert_array_equal(loaded._last_obs, model._last_obs)
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 32
    reset = QVPO.load(tmp_path / "model", env=IdentityEnvBox(-10, 10), force_reset=True)
    assert reset._last_obs is None
    assert reset.learn(16, reset_num_timesteps=False).num_timesteps == 32
    assert reset._n_updates == 2 * model._n_updates  # its empty buffer was filled first
    at_once = QVPO.load(tmp_path / "model", env=IdentityEnvBox(-10, 10), learning_starts=0)
    assert at_once.learn(16, reset_num_timesteps=False)._n_updates == model._n_updates + 16
    two = make_vec_env(IdentityEnvBox, n_envs=2, env_kwargs=dict(low=-10, high=10))
    widened = QVPO.load(tmp_path / "model", env=two, gradient_steps=-1).learn(16)
    assert (widened.n_envs, widened.num_timesteps, widened.replay_buffer.size()) == (2, 16, 8)
    assert widened._n_updates == model._n_updates + 6 * 2  # after steps 6, 8, ... 16


# Saving and loading


def test_excluded_and_included_attributes(tmp_path):
    """``exclude`` leaves out, ``include`` wins; and what is never saved can be included."""
    model = bandit_qvpo(verbose=2)
    model.save(tmp_path / "without", exclude=["verbose"])
    assert QVPO.load(tmp_path / "without").verbose == 0
    model.save(tmp_path / "with", exclude=["verbose"], include=["verbose", "_metric_sums"])
    assert QVPO.load(tmp_path / "with").verbose == 2
    saved = {name: load_from_zip_file(tmp_path / name)[0].keys() for name in ("without", "with")}
    assert saved["with"] - saved["without"] == {"verbose", "_metric_sums"}


def test_replaced_objects_and_system_info(tmp_path, capsys):
    """Known names are replaced, unknown ones do not become attributes; the versions are those of the file and of here."""
    bandit_qvpo().save(tmp_path / "model")
    custom_objects = dict(learning_rate=2e-5, dummy=1.0)
    loaded = QVPO.load(tmp_path / "model", custom_objects=custom_objects, print_system_info=True)
    assert (loaded.learning_rate, loaded.lr_schedule(1.0)) == (2e-5, 2e-5)
    assert loaded.actor.optimizer.param_groups[0]["lr"] != 2e-5  # until the next update
    assert not hasattr(loaded, "dummy")
    output = capsys.readouterr().out
    assert "CURRENT SYSTEM INFO" in output and "SAVED MODEL SYSTEM INFO" in output


def test_arguments_of_load_take_the_place_of_saved_ones(tmp_path):
    """Two environments, hindsight, any weights: these stay; ``verbose`` and ``learning_rate`` are the new ones."""
    model = her_qvpo().learn(30)
    shake(model)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=model.get_env(), verbose=3, learning_rate=2.0, device="cpu")
    assert (loaded.verbose, loaded.learning_rate, loaded.lr_schedule(0.3)) == (3, 2.0, 2.0)
    assert same_weights(weights_of(model), weights_of(loaded))
    obs = model.get_env().reset()
    np.testing.assert_array_equal(*(each.predict(obs, deterministic=True)[0] for each in (model, loaded)))
    loaded.verbose = 0
    assert loaded.learn(30, reset_num_timesteps=False).num_timesteps == 60
    assert [each.optimizer.param_groups[0]["lr"] for each in (loaded.actor, loaded.critic)] == [2.0, 2.0]


@pytest.mark.parametrize(("train_freq", "n_updates"), [(4, 2), ((4, "step"), 2), ((1, "episode"), 2)])
def test_the_training_frequency_is_saved_and_can_be_replaced(train_freq, n_updates, tmp_path):
    """Episodes of 4 steps: updates at steps 8 and 12."""
    model = tiny_qvpo(CountdownEnv(), train_freq=train_freq).learn(12)
    assert model._n_updates == n_updates
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=CountdownEnv())
    assert loaded.learn(12)._n_updates == n_updates + 2
    replaced = QVPO.load(tmp_path / "model", env=CountdownEnv(), train_freq=(2, "step"))
    assert replaced.learn(12)._n_updates == n_updates + 4  # at steps 6, 8, 10, 12


def test_schedules_return_plain_numbers(tmp_path):
    """NumPy numbers in optimisers would end up in files that newer versions of torch refuse to load."""
    for value in (np.float32(0.5), "lin_0.5", lambda progress: np.float64(progress)):
        assert type(parse_schedule("learning_rate", value)(0.3)) is float
    model = bandit_qvpo(learning_rate=lambda progress: np.float64(1e-3)).learn(8)
    assert type(model.actor.optimizer.param_groups[0]["lr"]) is float
    assert type(model.critic.optimizer.param_groups[0]["lr"]) is float


def test_networks_of_the_default_size_are_saved(tmp_path):
    model = bandit_qvpo(policy_kwargs=dict(net_arch=None))
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy_kwargs == dict(net_arch=None)
    assert same_weights(weights_of(model), weights_of(loaded))


def test_files_are_paths_names_or_open_files(tmp_path):
    """Models and buffers; open files stay open, all others are closed."""
    model = bandit_qvpo().learn(12)
    with recorded_warnings() as caught, (tmp_path / "model.file").open("w+b") as on_disk:
        for file in (tmp_path / "path", str(tmp_path / "name"), io.BytesIO(), on_disk):
            for save, load in (
                (model.save, lambda each: QVPO.load(each).policy.state_dict()),
                (model.save_replay_buffer, model.load_replay_buffer),
            ):
                save(file)
                if not isinstance(file, (type(tmp_path), str)):
                    assert not file.closed
                    file.seek(0)
                result = load(file)
                assert result is None or same_weights(result, model.policy.state_dict())
                assert model.replay_buffer.size() == 12
                if not isinstance(file, (type(tmp_path), str)):
                    assert not file.closed
                    file.seek(0)
                    file.truncate()
    assert not [each for each in caught if issubclass(each.category, ResourceWarning)]
    assert {path.name for path in tmp_path.iterdir()} == {"path.zip", "path.pkl", "name.zip", "name.pkl", "model.file"}


# Replay buffers


def test_a_loaded_buffer_has_the_same_contents(tmp_path):
    """Time limits among them, which make the difference between ``dones`` and ends of the task."""
    model = tiny_qvpo(CountdownEnv(truncate=True)).learn(30)
    saved = model.replay_buffer
    model.save_replay_buffer(tmp_path / "buffer")
    model.replay_buffer = None
    model.load_replay_buffer(tmp_path / "buffer")
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(model.replay_buffer, name), getattr(saved, name), err_msg=name)
    assert (model.replay_buffer.pos, model.replay_buffer.full) == (30, False)
    assert saved.timeouts.sum() == 7


@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_loaded_hindsight_buffer_has_the_same_contents(n_envs, tmp_path):
    model = her_qvpo(n_envs).learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = her_qvpo(n_envs)
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    old, new, rows = model.replay_buffer, loaded.replay_buffer, slice(30 // n_envs)
    for key in ("observation", "achieved_goal", "desired_goal"):
        np.testing.assert_array_equal(old.observations[key][rows], new.observations[key][rows])
        np.testing.assert_array_equal(old.next_observations[key][rows], new.next_observations[key][rows])
    for name in ("actions", "rewards", "dones", "ep_start", "ep_length"):
        np.testing.assert_array_equal(getattr(old, name)[rows], getattr(new, name)[rows], err_msg=name)
    assert loaded.learn(30, reset_num_timesteps=False).replay_buffer.size() == 60 // n_envs


@pytest.mark.parametrize("truncate_last_traj", [True, False])
def test_cutting_an_unfinished_hindsight_episode_is_warned_of(truncate_last_traj, tmp_path):
    """Continuing in another environment would join two episodes; in the same one nothing is cut and nothing said."""
    model = her_qvpo().learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    unfinished = (model.replay_buffer.pos - model.replay_buffer._current_ep_start).tolist()
    assert all(unfinished)
    with recorded_warnings() as caught:
        model.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=truncate_last_traj)
    messages = [str(each.message) for each in caught if "truncated" in str(each.message)]
    assert len(messages) == truncate_last_traj
    cut = model.replay_buffer.ep_length[model.replay_buffer.pos - 1] != 0
    assert cut.tolist() == [truncate_last_traj] * 2


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_the_memory_saving_buffer_warns_when_an_episode_is_broken_off(optimize_memory_usage):
    """Not while training continues; once at a reset, where its next row would belong to another episode."""
    replay_buffer_kwargs = dict(handle_timeout_termination=not optimize_memory_usage)
    model = bandit_qvpo(buffer_size=20, optimize_memory_usage=optimize_memory_usage, replay_buffer_kwargs=replay_buffer_kwargs)
    with recorded_warnings() as caught:
        model.learn(25).learn(25, reset_num_timesteps=False)
        assert not caught
        model.learn(25)
    assert len(caught) == optimize_memory_usage
    assert all("truncated" in str(each.message) and each.category is UserWarning for each in caught)
