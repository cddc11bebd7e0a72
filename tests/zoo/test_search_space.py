"""The search space for Optuna: what is sampled is valid, trains, and stays within a budget."""

import numpy as np
import optuna
import pytest

from sb3_qvpo import DTQL, QVPO, SDAC, DiffusionQL, presets, zoo
from sb3_qvpo.common.arguments import parse_schedule

LOW = dict(
    one_minus_gamma=0.02, learning_rate=1e-3, qf_learning_rate=1e-3, tau=0.01, train_freq=2, ent_coef=0.01, q_weighting="qadv",
    noise_schedule="cosine", net_arch="small", n_uniform_actions=4, n_behavior_candidates_pow=0, target_candidates_shift=0,
    batch_size_pow=7, diffusion_steps_pow=0, draws_pow=12,
)  # fmt: skip
LOW_SOFT = dict(
    one_minus_gamma=0.02, learning_rate=1e-3, qf_learning_rate=1e-3, train_freq=2, temperature=0.2, net_arch="small",
    n_reverse_samples_pow=3, n_target_candidates_pow=0, n_improvement_steps=2, training_action_noise=0.1,
)  # fmt: skip
NO_HER = dict(using_her_replay_buffer=False, her_kwargs={})


def random_trials(n, additional_args, around="paper"):
    """Trials of one of the two halves of the space."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    trials = [(trial, zoo.sample_qvpo_params(trial, 1, 1, dict(additional_args))) for trial in (study.ask() for _ in range(n))]
    chosen = [pair for pair in trials if pair[0].params["around"] == around]
    assert 0.3 * n < len(chosen) < 0.7 * n or n < 50
    return chosen


def estimated_cost(params):
    """Network passes of an update; a step with gradients counts as three; the wider network as 2.5 (measured)."""
    delay, steps = params.get("policy_delay", 1), params.get("n_diffusion_steps", 5)
    policy = (
        steps * params["n_train_candidates"] + 3 * (1 + params["n_uniform_actions"]) + 6 * params.get("n_improvement_steps", 0)
    )
    critics = steps * params["n_target_candidates"] + 3 * 2 * (2 if params.get("critic_type") == "crossq" else 1)
    width = params["policy_kwargs"]["net_arch"][0]
    return params.get("batch_size", 256) * (policy / delay + critics) * (1 if width == 128 else 2.5)


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


def assert_rest_is_of(preset, params, trial):
    """What was not sampled is the preset's. Warm-up and length of returns are left to the settings file."""
    sampled = {name.removesuffix("_pow") for name in trial.params} | {"policy_kwargs"}
    rest = {name: value for name, value in preset.items() if name not in sampled}
    assert rest.keys() - params.keys() == {"learning_starts", "n_steps"}
    assert all(params[name] == rest[name] for name in rest.keys() & params.keys())
    own = {"net_arch", "optimizer_kwargs"}
    expected = {name: value for name, value in preset["policy_kwargs"].items() if name not in own}
    assert {name: value for name, value in params["policy_kwargs"].items() if name not in own} == expected


def test_settings_around_the_preset_are_valid_and_cost_no_more():
    costs, ends = [], []
    for trial, params in random_trials(200, NO_HER, "presets.fast"):
        assert zoo.convert_qvpo_params(trial.params) == params
        assert all(params[name] == value for name, value in trial.user_attrs.items())
        assert_rest_is_of(presets.fast, params, trial)
        assert (params["policy_kwargs"]["optimizer_kwargs"]["betas"][0] == 0.5) == (params["critic_type"] == "crossq")
        schedule = parse_schedule("training_action_noise", params["training_action_noise"])
        assert schedule(1.0) == trial.params["training_action_noise"]
        ends.append(schedule(0.7) / schedule(1.0))
        before_it_was_sampled = {k: v for k, v in trial.params.items() if k != "training_action_noise_falls"}
        assert zoo.convert_qvpo_params(before_it_was_sampled)["training_action_noise"] == schedule(1.0)
        costs.append(estimated_cost(params))
    np.testing.assert_allclose(sorted(set(np.round(ends, 6))), [0.25, 1])
    assert max(costs) < 1.2 * max(estimated_cost(params) for _, params in random_trials(200, NO_HER))


@pytest.mark.parametrize(("critic_type", "falls"), [("twin", False), ("crossq", True), ("quantile", False)])
def test_settings_around_the_preset_train(critic_type, falls):
    shared = ("one_minus_gamma", "learning_rate", "qf_learning_rate", "train_freq", "ent_coef", "net_arch")
    trial = optuna.trial.FixedTrial({
        **{name: LOW[name] for name in (*shared, "n_behavior_candidates_pow")},
        **dict(around="presets.fast", critic_type=critic_type, policy_delay=2, n_improvement_steps=1, improvement_step=0.1),
        **dict(n_train_candidates_pow=1, n_target_candidates_pow=0),
        **dict(training_action_noise=0.2, training_action_noise_falls=falls),
    })  # fmt: skip
    params = zoo.sample_qvpo_params(trial, 1, 1, dict(NO_HER))
    model = QVPO("MlpPolicy", "Pendulum-v1", learning_starts=4, buffer_size=100, device="cpu", **params).learn(8)
    assert model._n_updates == 4 and model.critic_type == critic_type


@pytest.mark.parametrize("changes", [{}, dict(q_weighting="qcut", noise_schedule="vp", net_arch="medium", batch_size_pow=8)])
def test_converted_settings_train(changes):
    params = zoo.convert_qvpo_params({**LOW, **changes})
    model = QVPO("MlpPolicy", "Pendulum-v1", learning_starts=4, buffer_size=100, device="cpu", **params).learn(8)
    assert model._n_updates == 4


def test_the_search_can_be_widened(monkeypatch):
    def reaches_the_paper():
        sizes = {
            (p["batch_size"], p["n_diffusion_steps"], p["n_train_candidates"], *p["policy_kwargs"]["net_arch"])
            for _, p in random_trials(2000, NO_HER)
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
    for trial, params in random_trials(40, her):
        assert params["replay_buffer_kwargs"]["goal_selection_strategy"] in ("final", "episode", "future")
        assert params["replay_buffer_kwargs"]["copy_info_dict"] is True
        from_study = zoo.convert_qvpo_params(trial.params)["replay_buffer_kwargs"]
        assert from_study.items() <= params["replay_buffer_kwargs"].items()
        assert not {"n_sampled_goal", "goal_selection_strategy"} & params.keys()


def test_settings_sampled_for_sdac_are_valid_and_share_a_budget():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    costs = []
    for trial in (study.ask() for _ in range(200)):
        params = zoo.sample_sdac_params(trial, 1, 1, dict(NO_HER))
        assert zoo.convert_sdac_params(trial.params) == params  # what --trial-id does
        assert all(params[name] == value for name, value in trial.user_attrs.items())
        assert_rest_is_of(presets.sdac, params, trial)
        rows = 5 * params["n_target_candidates"] + (2 * params["n_reverse_samples"] + 6) / 2 + 12
        costs.append(rows * (1 if params["policy_kwargs"]["net_arch"] == [128, 128] else 2.5))
    assert 3 < max(costs) / min(costs) < 5
    older = {name: value for name, value in trial.params.items() if name != "n_improvement_steps"}
    assert zoo.convert_sdac_params(older)["n_improvement_steps"] == 0  # as it was trained
    for critic_type in ("twin", "crossq"):
        trial = optuna.trial.FixedTrial({**LOW_SOFT, "critic_type": critic_type})
        params = zoo.sample_sdac_params(trial, 1, 1, dict(NO_HER))
        model = SDAC("MlpPolicy", "Pendulum-v1", learning_starts=4, buffer_size=100, device="cpu", **params).learn(8)
        assert model._n_updates == 4


def test_sdac_is_searched_with_hindsight_too():
    her = dict(using_her_replay_buffer=True, her_kwargs=dict())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    params = zoo.sample_sdac_params(study.ask(), 1, 1, her)
    assert {"n_sampled_goal", "goal_selection_strategy"} <= params["replay_buffer_kwargs"].keys()


@pytest.mark.parametrize(("name", "algorithm"), [("diffusion_ql", DiffusionQL), ("dtql", DTQL)])
def test_settings_sampled_for_data_are_valid(name, algorithm):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    row = zoo.ALGORITHMS[name]
    for i, trial in enumerate(study.ask() for _ in range(12)):
        params = row.sample(trial, 1, 1, dict(NO_HER))
        assert row.convert(trial.params) == params  # what --trial-id does
        assert all(params[key] == value for key, value in trial.user_attrs.items())
        model = algorithm("MlpPolicy", "Pendulum-v1", learning_starts=4, buffer_size=100, device="cpu", **params)
        if i < 3:
            assert model.learn(12)._n_updates > 0
    her = dict(using_her_replay_buffer=True, her_kwargs=dict())
    assert "n_sampled_goal" in row.sample(study.ask(), 1, 1, her)["replay_buffer_kwargs"]
