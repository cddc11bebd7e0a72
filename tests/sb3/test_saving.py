"""Saving and loading: files, replaced arguments and objects, devices, training that goes on."""

import io

import numpy as np
import pytest
import torch as th
from helpers import (
    SMALL_MODELS,
    CountdownEnv,
    bandit_qvpo,
    bit_flipping_qvpo,
    recorded_warnings,
    same_weights,
    shake,
    tiny_qvpo,
    weights_of,
)
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import get_device

from sb3_qvpo import QVPO


@pytest.mark.parametrize("kind", SMALL_MODELS)
def test_a_saved_model_continues_where_it_stopped(kind, tmp_path):
    """Weights, targets, both optimisers, counters and schedules: the next updates are the same bit for bit."""
    model = SMALL_MODELS[kind](learning_rate="lin_1e-3", ent_coef="lin_0.1").learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = QVPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    assert (loaded._n_updates, loaded.num_timesteps) == (model._n_updates, model.num_timesteps)
    for each in (model, loaded):
        th.manual_seed(3)
        np.random.seed(3)
        each.train(3, batch_size=8)
    assert same_weights(weights_of(model), weights_of(loaded))
    assert vars(loaded).keys() == vars(model).keys()  # nothing forgotten, nothing invented
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps == 30


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
    model = bit_flipping_qvpo().learn(30)
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


def test_networks_of_the_default_size_are_saved(tmp_path):
    model = bandit_qvpo(policy_kwargs=dict(net_arch=None))
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy_kwargs == dict(net_arch=None)
    assert same_weights(weights_of(model), weights_of(loaded))


# Devices


DEVICES = ["auto", "cpu", *(["cuda"] if th.cuda.is_available() else [])]


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
