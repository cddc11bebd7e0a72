"""What all algorithms share: settings that change, learning rates, metrics, what is saved, parameters that are set."""

import io
import warnings
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch as th
from helpers import (
    TINY,
    CountdownEnv,
    bandit_qvpo,
    changed_names,
    differ,
    ent_coef_of,
    metric_sums,
    same_weights,
    sampled_observations,
    shake,
    tiny_qvpo,
    tiny_sdac,
    trained_weights,
    weighting_in_use,
    weights_of,
)
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.sac.policies import SACPolicy

from sb3_qvpo import QVPO, DiffusionPolicy

# Settings


def test_the_noise_of_deterministic_predictions_can_be_changed_on_a_loaded_model(tmp_path):
    tiny_qvpo().save(tmp_path / "model")
    at_load, later = QVPO.load(tmp_path / "model", eval_noise_scale=0.5), QVPO.load(tmp_path / "model")
    obs = sampled_observations(later.observation_space, 40)
    before = later.predict(obs, deterministic=True)[0]
    later.eval_noise_scale = 0.5
    after = later.predict(obs, deterministic=True)[0]
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, at_load.predict(obs, deterministic=True)[0])
    later.save(tmp_path / "again")
    later.policy.save(tmp_path / "policy")
    for other in (QVPO.load(tmp_path / "again"), DiffusionPolicy.load(tmp_path / "policy")):
        np.testing.assert_array_equal(after, other.predict(obs, deterministic=True)[0])
    later.policy.eval_noise_scale = 1  # the policy's own scale is the model's
    np.testing.assert_array_equal(before, later.predict(obs, deterministic=True)[0])
    assert later.eval_noise_scale == 1
    with pytest.raises(ValueError, match=r"eval_noise_scale must be a number in \[0, inf\), got -1"):
        later.eval_noise_scale = -1


def test_candidate_counts_can_be_changed_on_a_loaded_model(tmp_path):
    tiny_qvpo().save(tmp_path / "model")
    at_load = QVPO.load(tmp_path / "model", n_eval_candidates=9, n_behavior_candidates=2)
    later = QVPO.load(tmp_path / "model")
    obs = sampled_observations(later.observation_space, 40)
    before = later.predict(obs, deterministic=True)[0]
    later.n_eval_candidates, later.n_behavior_candidates = 9, 2
    for model in (at_load, later):
        assert (model.policy.n_eval_candidates, model.policy.n_behavior_candidates) == (9, 2)
        model.save(tmp_path / "again")
        assert QVPO.load(tmp_path / "again").n_eval_candidates == 9
        model.policy.save(tmp_path / "policy")
        assert DiffusionPolicy.load(tmp_path / "policy").n_eval_candidates == 9
        model.policy.n_eval_candidates = 5  # the policy's own count is the model's
        assert model.n_eval_candidates == 5
        model.save(tmp_path / "again")
        assert QVPO.load(tmp_path / "again").n_eval_candidates == 5
        model.n_eval_candidates = 9
    after = later.predict(obs, deterministic=True)[0]
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, at_load.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="n_eval_candidates must be a whole number of at least 1, got 0"):
        later.n_eval_candidates = 0
    with pytest.raises(ValueError, match="n_behavior_candidates must be a whole number of at least 1, got 0"):
        QVPO.load(tmp_path / "model", n_behavior_candidates=0)
    with pytest.raises(ValueError, match="n_behavior_candidates must be a whole number of at least 1, got -3"):
        later.policy.n_behavior_candidates = -3


def test_settings_may_change_between_two_calls_of_learn():
    """They count from the next call on, and are checked at its start as on construction."""
    model = tiny_qvpo(learning_starts=0).learn(5)
    model.ent_coef, model.q_weighting = "lin_0.5", "qcut"
    model.learn(5)
    assert ent_coef_of(model)(1.0) == 0.5
    assert weighting_in_use(model) is not weighting_in_use(tiny_qvpo())
    model.q_weighting, model.n_train_candidates = "qadv", 1
    with pytest.raises(ValueError, match="n_train_candidates must be a whole number of at least 2"):
        model.learn(5)
    model.n_train_candidates, model.gradient_steps = 4, "3"
    with pytest.raises(ValueError, match="gradient_steps must be a whole number of at least -1, got '3'"):
        model.learn(5)


def test_user_dictionaries_are_left_alone():
    policy_kwargs, replay_buffer_kwargs = dict(net_arch=[8]), dict(handle_timeout_termination=False)
    tiny_qvpo(policy_kwargs=policy_kwargs, replay_buffer_kwargs=replay_buffer_kwargs, n_steps=3)
    assert policy_kwargs == dict(net_arch=[8])
    assert replay_buffer_kwargs == dict(handle_timeout_termination=False)


@pytest.mark.parametrize("build", [tiny_qvpo, tiny_sdac])
def test_updates_take_the_noise_that_the_schedule_says(build):
    """With deviation 0.3 from the first update on, a schedule is the number; from the middle on 0, it is something else."""
    number, constant, until_middle = (
        trained_weights(build(training_action_noise=noise))
        for noise in (0.3, lambda progress: 0.3, lambda progress: 0.3 * (progress > 0.5))
    )
    assert not differ(number, constant)
    assert differ(number, until_middle)


def test_schedules_act_during_training():
    """Critic and actor rates, the entropy weight and the noise on trained actions follow their own schedules."""
    seen = []
    model = tiny_qvpo(
        learning_rate="lin_1e-3",
        qf_learning_rate=1e-2,
        ent_coef="lin_0.02_0.002_0.9",
        training_action_noise="cos_0.2_0.1",
        learning_starts=0,
    )

    def record(local_variables, _):
        if model._n_updates:
            rates = [model.actor.optimizer.param_groups[0]["lr"], model.critic.optimizer.param_groups[0]["lr"]]
            logged = [model.logger.name_to_value[f"train/{name}"] for name in ("ent_coef", "training_action_noise")]
            seen.append((*rates, *logged))
        return True

    model.learn(21, callback=record)
    actor_rates, critic_rates, ent_coefs, noise_stds = zip(*seen, strict=True)
    np.testing.assert_allclose(actor_rates, [1e-3 * (1 - i / 21) for i in range(1, 21)])
    assert set(critic_rates) == {1e-2}
    np.testing.assert_allclose(ent_coefs, [max(0.02 - 0.018 * i / 21 / 0.9, 0.002) for i in range(1, 21)])
    np.testing.assert_allclose(noise_stds, [0.15 + 0.05 * np.cos(np.pi * i / 21) for i in range(1, 21)])
    without = tiny_qvpo(learning_rate="lin_1e-3", learning_starts=0).learn(11)
    assert without.critic.optimizer.param_groups[0]["lr"] == without.actor.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("qf_learning_rate", [None, 1e-2])
def test_a_replaced_learning_rate_schedule_acts_on_actor_and_critic(qf_learning_rate):
    """Rate 0: only the targets still move, towards what is online; the critic moves on if it has a rate of its own."""
    model = tiny_qvpo(qf_learning_rate=qf_learning_rate).learn(10)
    model.lr_schedule = lambda _: 0.0
    before = weights_of(model)
    model.train(1, batch_size=8)
    changed = {name.split(".")[0] for name in changed_names(before, weights_of(model))}
    assert changed == {"actor_target", "critic_target"} | ({"critic"} if qf_learning_rate else set())
    rates = [each.optimizer.param_groups[0]["lr"] for each in (model.actor, model.critic)]
    assert rates == [0.0, qf_learning_rate or 0.0]


def test_tau_zero_leaves_the_targets_alone():
    model = tiny_qvpo().learn(10)
    model.tau = 0.0
    before = weights_of(model)
    model.train(1, batch_size=8)
    changed = changed_names(before, weights_of(model))
    assert changed == {name for name, _ in model.policy.named_parameters() if name.startswith(("actor.", "critic."))}


def test_few_updates_for_many_environments_are_warned_of_once():
    def messages(n_envs, gradient_steps):
        model = tiny_qvpo(make_vec_env(CountdownEnv, n_envs=n_envs), gradient_steps=gradient_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(8).learn(8)
        return [str(each.message) for each in caught if each.category is UserWarning]

    (message,) = messages(n_envs=2, gradient_steps=1)
    assert "gradient_steps=1 with 2 environments" in message
    assert messages(n_envs=2, gradient_steps=-1) == messages(n_envs=1, gradient_steps=1) == []


# Metrics


TRAIN_METRICS = {
    *("actor_loss", "entropy_loss", "critic_loss", "q_value", "weight", "critic_contrast", "candidate_std"),
    *("ent_coef", "training_action_noise", "learning_rate", "learning_rate_qf", "n_updates"),
}


def test_log():
    model = tiny_qvpo(CountdownEnv(), verbose=1)
    with redirect_stdout(io.StringIO()) as output:
        model.learn(40, log_interval=1)
    table = output.getvalue()
    for metric in TRAIN_METRICS:
        assert f" {metric} " in table, metric
    for metric in ("ep_rew_mean", "fps", "total_timesteps", "episodes"):
        assert f" {metric} " in table, metric


def test_logged_numbers_are_means_since_the_last_dump():
    model = tiny_qvpo().learn(6)
    metric_sums(model).clear()
    values = []
    for _ in range(3):
        count = metric_sums(model).get("critic_loss", (0.0, 0))
        model.train(1, batch_size=8)
        values.append(float(metric_sums(model)["critic_loss"][0]) - float(count[0]))
        assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(np.mean(values), rel=1e-5)
    model.dump_logs()
    assert not metric_sums(model)
    assert set(key.removeprefix("train/") for key in model.logger.name_to_value) == set()
    model.train(1, batch_size=8)
    assert {k.removeprefix("train/") for k in model.logger.name_to_value if k.startswith("train/")} == TRAIN_METRICS


def test_metrics_start_afresh_with_each_learn():
    model = tiny_qvpo().learn(30)
    assert metric_sums(model)["critic_loss"][1] == 25
    model.learn(5, reset_num_timesteps=False)
    assert metric_sums(model)["critic_loss"][1] == 5


# Files


def test_the_file_holds_no_networks_twice_and_nothing_of_the_process(tmp_path):
    model = tiny_qvpo(policy_kwargs=dict(TINY["policy_kwargs"])).learn(10)
    model.save(tmp_path / "model")
    data, parameters, _ = load_from_zip_file(tmp_path / "model")
    assert set(parameters) == {"policy", "actor.optimizer", "critic.optimizer", "policy.fixed"}
    forbidden = {"actor", "critic", "actor_target", "critic_target", "device", "_finite_guard", "_metric_sums", "_q_weighting"}
    assert not forbidden & set(data)
    assert data["policy_kwargs"] == TINY["policy_kwargs"]  # as the user gave them


@pytest.mark.filterwarnings("error")
def test_a_loaded_n_step_model_keeps_and_can_change_its_returns(tmp_path):
    tiny_qvpo(n_steps=3, gamma=0.9).save(tmp_path / "model")

    def settings(**kwargs):
        model = QVPO.load(tmp_path / "model", **kwargs)
        return type(model.replay_buffer).__name__, getattr(model.replay_buffer, "n_steps", 1), model.gamma

    assert settings() == ("NStepReplayBuffer", 3, 0.9)
    assert settings(gamma=0.5) == ("NStepReplayBuffer", 3, 0.5)
    assert QVPO.load(tmp_path / "model", gamma=0.5).replay_buffer.gamma == 0.5
    assert settings(n_steps=1) == ("ReplayBuffer", 1, 0.9)


def test_a_model_does_not_load_with_another_number_of_diffusion_steps(tmp_path):
    tiny_qvpo().save(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"n_diffusion_steps is 7 .* other than in the saved policy; it is fixed"):
        QVPO.load(tmp_path / "model", n_diffusion_steps=7)
    model = QVPO.load(tmp_path / "model", n_diffusion_steps=3)
    with pytest.raises(ValueError, match="n_diffusion_steps is fixed by the policy, 3, got 7"):
        model.n_diffusion_steps = 7


def test_models_and_policies_of_other_algorithms_are_refused(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(tmp_path / "sac")
    with pytest.raises(
        ValueError, match=r"policy must be .* subclass of DiffusionPolicy, got SACPolicy: .* saved model\) of another"
    ):
        QVPO.load(tmp_path / "sac")
    with pytest.raises(ValueError, match=r"policy must be .* subclass of DiffusionPolicy, got SACPolicy"):
        QVPO(SACPolicy, "Pendulum-v1")
    tiny_qvpo().save(tmp_path / "model")
    with pytest.raises(ValueError, match="The environment is of type <class 'str'>"):
        QVPO.load(tmp_path / "model", env="Pendulum-v1")


# Parameters


LAST_WEIGHT = "critic_target.qf1.4.bias"
"""The last tensor of the policy."""


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


def test_set_parameters_and_custom_objects(tmp_path):
    model = tiny_qvpo().learn(12)
    model.save(tmp_path / "model")
    other = tiny_qvpo(seed=7)
    assert not same_weights(weights_of(other), weights_of(model))
    other.set_parameters(tmp_path / "model")
    assert same_weights(weights_of(other), weights_of(model))
    other.set_parameters(model.get_parameters())
    moments = [each.actor.optimizer.state_dict()["state"][0]["exp_avg"] for each in (model, other)]
    np.testing.assert_array_equal(*moments)
    changed = QVPO.load(tmp_path / "model", custom_objects=dict(learning_rate=0.5, n_uniform_actions=3))
    assert (changed.lr_schedule(1.0), changed.n_uniform_actions) == (0.5, 3)
    with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
        QVPO.load(tmp_path / "model", policy_kwargs=dict(net_arch=[3]))
