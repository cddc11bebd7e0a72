"""What a policy promises: its predictions, its targets, its modes, its features extractors and its arguments."""

import copy
import inspect

import numpy as np
import pytest
import reference
import torch as th
from gymnasium import spaces
from helpers import (
    SMALL_MODELS,
    TINY,
    TOLERANCE,
    CountdownEnv,
    DictEnv,
    actor_to_numpy,
    changed_names,
    critics_to_numpy,
    differ,
    prediction,
    random_policy,
    same_weights,
    sampled_observations,
    tiny_diffusion_ql,
    tiny_dtql,
    tiny_qvpo,
    tiny_sdac,
    trained_weights,
    weights_of,
)
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_qvpo import QVPO, DiffusionPolicy
from sb3_qvpo.common import policies
from sb3_qvpo.common.candidates import best_candidate
from sb3_qvpo.common.critics import CRITIC_OPTIONS
from sb3_qvpo.common.noise_schedules import make_betas
from sb3_qvpo.common.speed.networks import FastActor


def row(obs, i):
    return {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]


@pytest.mark.parametrize("kind", SMALL_MODELS)
def test_deterministic_predictions_depend_on_weights_and_observation_only(kind, tmp_path):
    """Alone or anywhere in a batch, now or later, before and after saving: bit for bit the same action."""
    model = SMALL_MODELS[kind]()
    for parameter in model.policy.parameters():
        parameter.data.add_(0.1 * th.randn_like(parameter))
    n = 40 if kind == "vector" else 6
    obs = sampled_observations(model.observation_space, n)
    batch, _ = model.predict(obs, deterministic=True)
    assert len(np.unique(batch)) > 1
    th.manual_seed(123)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pth")
    others = {
        "itself": model,
        "loaded model": QVPO.load(tmp_path / "model"),
        "loaded policy": type(model.policy).load(tmp_path / "policy.pth"),
        "copy": copy.deepcopy(model.policy),
    }
    for name, other in others.items():
        for i in range(n):
            alone, _ = other.predict(row(obs, i), deterministic=True)
            np.testing.assert_array_equal(alone, batch[i], err_msg=name)
    reverse = {key: value[::-1].copy() for key, value in obs.items()} if isinstance(obs, dict) else obs[::-1].copy()
    np.testing.assert_array_equal(model.predict(reverse, deterministic=True)[0][::-1], batch)


def test_stochastic_predictions_are_the_behaviour_policy():
    """Fresh noise at each call, best of n_behavior_candidates; repeatable through torch's seed."""
    model = tiny_qvpo(n_behavior_candidates=3)
    obs = sampled_observations(model.observation_space, 40)
    draws = []
    for seed in (1, 2, 1):
        th.manual_seed(seed)
        draws.append(model.predict(obs)[0])
    assert np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0], draws[1])
    th.manual_seed(1)
    with th.no_grad():
        _, candidates, q_values = model.policy.score_candidates(th.as_tensor(obs), 3)
    np.testing.assert_allclose(draws[0], 2 * best_candidate(candidates, q_values), atol=1e-6)  # Pendulum: torque in [-2, 2]


def test_more_candidates_have_higher_values():
    """The K-efficient policy: the expected value of the chosen action grows with K."""
    model = tiny_qvpo()
    obs = th.as_tensor(sampled_observations(model.observation_space, 200))
    with th.no_grad():
        values = [model.policy.score_candidates(obs, k).scores.max(dim=1).values.mean().item() for k in (1, 2, 8, 64)]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_the_noise_of_deterministic_predictions_can_be_smaller():
    """Nothing else changes. Without noise all candidates are alike: the middle of the policy."""
    models = {scale: tiny_qvpo(eval_noise_scale=scale, n_eval_candidates=5).learn(12) for scale in (1, 0.5, 0)}
    banks = {scale: model.policy.noise_bank(5) for scale, model in models.items()}
    assert th.equal(banks[0.5], 0.5 * banks[1]) and not banks[0].any()
    weights = {scale: weights_of(model) for scale, model in models.items()}
    assert same_weights(weights[1], weights[0.5]) and same_weights(weights[1], weights[0])
    observation, actions = np.full((1, 3), 0.3, np.float32), []
    for model in models.values():
        th.manual_seed(0)
        actions.append(float(model.predict(observation)[0].item()))
    assert len(set(actions)) == 1
    assert len({float(model.predict(observation, deterministic=True)[0].item()) for model in models.values()}) == 3
    policy = models[0].policy
    with th.no_grad():
        candidates = policy.score_candidates(th.as_tensor(observation), policy.noise_bank(5)).candidates
    # Equal rows of a batch may differ in their last bit, because the last few take another path of the kernel
    th.testing.assert_close(candidates, candidates[:, :1].expand_as(candidates), rtol=0, atol=1e-6)


def test_the_noise_bank_grows_without_changing():
    policy, other = tiny_qvpo().policy, tiny_qvpo(seed=5).policy
    small = policy.noise_bank(3).clone()
    large = policy.noise_bank(100)
    assert large.shape == (3, 1, 100, 1)
    assert th.equal(large[:, :, :3], small)
    assert th.equal(policy.noise_bank(3), small)
    assert th.equal(other.noise_bank(3), small)  # from its own seed, not from the run's
    assert abs(float(policy.noise_bank(4000).mean())) < 0.05
    assert float(policy.noise_bank(4000).std()) == pytest.approx(1, abs=0.05)


def test_actions_stay_within_tiny_and_uneven_bounds():
    env = CountdownEnv()
    low, high = np.array([-0.4, 0.1, -0.7], np.float32), np.array([0.4, 0.3, 0.1], np.float32)
    assert (low + 0.5 * (np.float32(1) + 1.0) * (high - low) > high).any()  # where SB3's formula goes beyond a bound
    env.action_space = spaces.Box(low, high)
    model = tiny_qvpo(env).learn(12)
    obs = sampled_observations(model.observation_space, 100)
    for deterministic in (True, False):
        actions, _ = model.predict(obs, deterministic=deterministic)
        assert actions.shape == (100, 3)
        assert all(env.action_space.contains(action) for action in actions)
    edges = np.array([[-1.0] * 3, [1.0] * 3], dtype=np.float32)
    np.testing.assert_array_equal(model.policy.unscale_action(edges), [env.action_space.low, env.action_space.high])


def test_actions_of_any_shape():
    env = CountdownEnv()
    env.action_space = spaces.Box(-1, 1, (2, 3), np.float32)
    model = tiny_qvpo(env).learn(12)
    assert model.predict(np.zeros(1, np.float32))[0].shape == (2, 3)
    assert model.predict(np.zeros((5, 1), np.float32), deterministic=True)[0].shape == (5, 2, 3)


def test_a_policy_with_a_schedule_that_cannot_be_pickled_is_saved_alone(tmp_path):
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[8], noise_schedule=lambda n: th.linspace(0.1, 0.7, n)))
    model.policy.save(tmp_path / "policy")
    loaded = DiffusionPolicy.load(tmp_path / "policy")
    obs = sampled_observations(model.observation_space, 40)
    for policy in (loaded, copy.deepcopy(loaded)):
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="n_diffusion_steps must be 3, the length of the saved schedule, got 4"):
        loaded._get_constructor_parameters()["noise_schedule"](4)


# Targets


def test_target_networks_rank_target_candidates():
    policy, observation, noise = random_policy(1)
    with th.no_grad():
        _, candidates, q_values = policy.score_candidates(observation, noise, of="target")
        _, online_candidates, _ = policy.score_candidates(observation, noise)
    assert not th.allclose(candidates, online_candidates)
    actor, critics = actor_to_numpy(policy.actor_target), critics_to_numpy(policy.critic_target)
    betas = make_betas("cosine", policy.n_diffusion_steps).numpy()
    for i, state in enumerate(observation.numpy().astype(np.float64)):
        expected = reference.draw_candidates(actor, state, noise[:, i].numpy().astype(np.float64), betas)
        np.testing.assert_allclose(candidates[i], expected, **TOLERANCE)
        _, best_value = reference.best_of_k(critics, state, expected)
        np.testing.assert_allclose(q_values[i].max(), best_value, **TOLERANCE)


def test_polyak_step():
    policy, _, _ = random_policy(3)
    online = [parameter.detach().numpy().astype(np.float64) for parameter in policy.actor.parameters()]
    online += [parameter.detach().numpy().astype(np.float64) for parameter in policy.critic.parameters()]
    targets = [*policy.actor_target.parameters(), *policy.critic_target.parameters()]
    expected = [parameter.detach().numpy().astype(np.float64) for parameter in targets]
    reference.polyak(expected, online, 0.3)
    policy.update_targets(0.3)
    for parameter, value in zip(targets, expected, strict=True):
        np.testing.assert_allclose(parameter.detach(), value, **TOLERANCE)


def test_targets_start_as_copies():
    for share in (False, True):
        env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)
        policy_kwargs = dict(net_arch=[8], share_features_extractor=share)
        model = tiny_qvpo(env, policy="CnnPolicy", policy_kwargs=policy_kwargs, buffer_size=10)
        for online, target in ((model.actor, model.actor_target), (model.critic, model.critic_target)):
            assert same_weights(online.state_dict(), target.state_dict())
            assert not {id(parameter) for parameter in online.parameters()} & {id(each) for each in target.parameters()}
        assert (model.actor_target.features_extractor is model.critic_target.features_extractor) == share


# Features extractors, and the mode of networks


class CountingExtractor(BaseFeaturesExtractor):
    """Batch norm and dropout, and a record of the rows it was given."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=6)
        self.layers = th.nn.Sequential(
            th.nn.Flatten(), th.nn.Linear(3, 6), th.nn.BatchNorm1d(6, momentum=0.5), th.nn.Dropout(0.5)
        )
        self.rows = []

    def forward(self, observation):
        self.rows.append((len(observation), self.training))
        return self.layers(observation)


def counting_model(gradient_steps=1, **policy_kwargs):
    policy_kwargs = dict(net_arch=[8], features_extractor_class=CountingExtractor, **policy_kwargs)
    return tiny_qvpo(policy_kwargs=policy_kwargs, n_behavior_candidates=7, gradient_steps=gradient_steps)


def test_each_state_is_encoded_once_for_all_its_candidates():
    model = counting_model()
    with th.no_grad():
        model.policy.score_candidates(th.zeros(5, 3), 50)
    for network in (model.actor, model.critic):
        assert network.features_extractor.rows == [(5, False)]
    model = counting_model(share_features_extractor=True)
    with th.no_grad():
        model.policy.score_candidates(th.zeros(5, 3), 50)
    assert model.actor.features_extractor is model.critic.features_extractor
    assert model.actor.features_extractor.rows == [(5, False)]


def test_an_update_encodes_each_state_once_for_each_purpose():
    model = counting_model().learn(10)
    networks = (model.actor, model.critic, model.actor_target, model.critic_target)
    for network in networks:
        network.features_extractor.rows.clear()
    model.train(1, batch_size=8)
    rows = [network.features_extractor.rows for network in networks]
    # Actor: drawing candidates (evaluation mode), then the loss. Critic: its loss, then valuing the candidates.
    assert rows == [[(8, False), (8, True)], [(8, True), (8, False)], [(8, False)], [(8, False)]]


def test_drawing_candidates_moves_no_statistics():
    model = counting_model()
    model.policy.set_training_mode(True)
    before = weights_of(model)
    with th.no_grad():
        model.policy.score_candidates(th.randn(50, 3), 8)
        model.policy.score_candidates(th.randn(50, 3), 8, of="target")
    assert same_weights(before, weights_of(model))
    assert model.actor.training
    assert model.critic.training
    assert not model.actor_target.training
    assert not model.critic_target.training


def test_targets_stay_in_evaluation_mode_and_copy_running_statistics():
    model = counting_model().learn(20)
    for online, target in ((model.actor, model.actor_target), (model.critic, model.critic_target)):
        assert not target.training
        online_norm, target_norm = online.features_extractor.layers[2], target.features_extractor.layers[2]
        assert online_norm.running_mean.any()
        assert th.equal(online_norm.running_mean, target_norm.running_mean)
        assert th.equal(online_norm.running_var, target_norm.running_var)


def test_batch_norm_learns_in_updates_only():
    """Updates move bias and running mean of all four networks; collecting alone moves nothing at all."""
    for gradient_steps in (0, 1):
        model = counting_model(gradient_steps)
        before = weights_of(model)
        changed = changed_names(before, weights_of(model.learn(20)))
        norm = "features_extractor.layers.2"
        expected = {
            f"{network}.{norm}.{name}"
            for network in ("actor", "critic", "actor_target", "critic_target")
            for name in ("bias", "running_mean")
        }
        assert expected <= changed if gradient_steps else not changed


def test_predictions_apply_no_dropout_and_move_no_statistics():
    model = counting_model().learn(10)
    before = weights_of(model)
    assert model.policy.training  # after an update: predict() must switch it off
    obs = np.full((4, 3), 0.5, np.float32)
    actions = [model.predict(obs, deterministic=True)[0] for _ in range(6)]
    assert all(np.array_equal(actions[0], each) for each in actions)
    model.predict(obs)
    assert same_weights(before, weights_of(model))


def test_a_shared_features_extractor_is_trained_by_the_actor_and_moves_once():
    model = counting_model(share_features_extractor=True).learn(10)
    extractor, target = model.actor.features_extractor, model.actor_target.features_extractor
    shared = {id(parameter) for parameter in extractor.parameters()}
    in_optimizers = [
        {id(p) for group in optimizer.param_groups for p in group["params"]} & shared
        for optimizer in (model.actor.optimizer, model.critic.optimizer)
    ]
    assert in_optimizers == [shared, set()]
    old_target = target.layers[1].weight.clone()
    model.policy.update_targets(0.25)
    th.testing.assert_close(target.layers[1].weight, 0.75 * old_target + 0.25 * extractor.layers[1].weight)
    separate = counting_model()
    assert separate.actor.features_extractor is not separate.critic.features_extractor


def test_normalize_images_and_extractor_arguments_are_alive():
    def actions(**policy_kwargs):
        model = SMALL_MODELS["image"](policy_kwargs=dict(net_arch=[8], **policy_kwargs))
        return model.predict(sampled_observations(model.observation_space, 3), deterministic=True)[0]

    plain = actions()
    assert np.array_equal(plain, actions())
    assert not np.array_equal(plain, actions(normalize_images=False))
    assert not np.array_equal(plain, actions(features_extractor_kwargs=dict(features_dim=32)))


# Arguments


def test_n_critics_and_net_arch():
    policy_kwargs = dict(net_arch=dict(pi=[5], qf=[6, 7]), n_critics=3)
    model = tiny_qvpo(policy_kwargs=policy_kwargs)
    assert [layer.out_features for layer in model.critic.q_networks[2] if isinstance(layer, th.nn.Linear)] == [6, 7, 1]
    assert len(model.critic.q_networks) == 3
    assert model.actor.noise_predictor.first_layer.out_features == 5
    defaults = QVPO("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")  # Table 2: two layers of 256, Mish
    layers = [*defaults.actor.noise_predictor.later_layers, *defaults.critic.q_networks[0]]
    assert [type(layer).__name__ for layer in layers] == ["Mish", "Linear"] * 2 + ["Linear", "Mish"] * 2 + ["Linear"]
    assert {layer.in_features for layer in layers if isinstance(layer, th.nn.Linear)} == {4, 256}


NORMALIZED = dict(normalize_features=True, net_arch=[8])


@pytest.mark.parametrize("build", [tiny_qvpo, tiny_sdac, tiny_diffusion_ql, tiny_dtql])
def test_features_are_normalised_by_what_has_been_learnt_from(build, tmp_path):
    """In actor and critics. Targets and files have the same statistics; drawing, valuing and predicting move none."""
    model = build(policy_kwargs=NORMALIZED, learning_starts=40).learn(41)
    model.train(60, 16)
    statistics = {name: value.clone() for name, value in weights_of(model).items() if "running_" in name}
    counts = {name.split(".")[0]: value.item() for name, value in statistics.items() if name.endswith("running_count")}
    assert min(counts.values()) >= 30
    mean = model.replay_buffer.observations[: model.replay_buffer.size(), 0].mean(axis=0)
    np.testing.assert_allclose(statistics["actor.features_extractor.norm.running_mean"], mean, atol=0.5)
    model.policy.update_targets(0.1)
    for name in ("actor", "critic"):
        norm, target = (getattr(model.policy, f"{name}{suffix}").features_extractor.norm for suffix in ("", "_target"))
        assert same_weights(norm.state_dict(), target.state_dict())
    observation = np.full((6, 3), 0.3, np.float32)
    model.predict(observation), model.predict(observation, deterministic=True)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    for other in (model, loaded):
        found = weights_of(other)
        assert all(th.equal(found[name], value) for name, value in statistics.items() if "target" not in name)
    np.testing.assert_array_equal(*(m.predict(observation, deterministic=True)[0] for m in (model, loaded)))


@pytest.mark.parametrize("critic_type", ["twin", "crossq"])
def test_normalised_features_are_normalised_observations(critic_type):
    """The losses of observations are those that another model has of normalised ones."""
    model, plain = (
        tiny_qvpo(critic_type=critic_type, policy_kwargs=dict(net_arch=[8], normalize_features=flag)) for flag in (True, False)
    )
    plain.policy.load_state_dict(
        {name: value for name, value in weights_of(model).items() if "features_extractor.norm" not in name}
    )
    rows = th.randn(64, 3) * th.tensor([1.0, 50.0, 0.1]) + 3
    scaled = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-8).sqrt()
    actions, timesteps, noise = th.rand(64, 2, 1) * 2 - 1, th.randint(3, (64, 2)), th.randn(64, 2, 1)
    losses = [m.actor.denoising_loss(seen, actions, timesteps, noise) for m, seen in ((model, rows), (plain, scaled))]
    np.testing.assert_allclose(*(loss.detach() for loss in losses), rtol=1e-4, atol=1e-5)
    values = [m.critic(seen, actions[:, 0]) for m, seen in ((model, rows), (plain, scaled))]
    np.testing.assert_allclose(*(th.stack(value).detach() for value in values), rtol=1e-4, atol=1e-5)


def test_images_dictionaries_and_shared_extractors_can_be_normalised():
    """What is normalised are the extractor's features, once where it is shared."""
    model = tiny_qvpo(DictEnv(), "MultiInputPolicy", policy_kwargs={**NORMALIZED, "share_features_extractor": True}).learn(30)
    assert model.actor.features_extractor is model.critic.features_extractor
    assert model.actor.features_extractor.norm.running_count == model._n_updates
    assert model.actor.features_extractor.features_dim == model.actor.features_extractor.norm.running_mean.numel()
    env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)
    image = tiny_qvpo(env, "CnnPolicy", policy_kwargs={**NORMALIZED, "features_extractor_kwargs": dict(features_dim=4)})
    assert image.learn(25).actor.features_extractor.norm.running_count > 0


POLICY_ALIVE = {
    "net_arch": [5],
    "activation_fn": th.nn.ReLU,
    "features_extractor_kwargs": None,  # FlattenExtractor takes none: covered with images above
    "features_extractor_class": None,  # above
    "normalize_images": None,  # above
    "share_features_extractor": None,  # above
    "optimizer_class": th.optim.SGD,
    "optimizer_kwargs": dict(eps=1e-1),
    "n_critics": 3,
    "noise_schedule": "vp",
    "n_sampling_steps": 2,
    "sampling_eta": 0.5,
    "sampler": "dpm++",
    "prediction": "v",
    "critic_activation_fn": th.nn.ReLU,
    "n_quantiles": 7,
    "top_quantiles_to_drop_per_net": 0,
    "time_embedding_dim": 8,
    "time_hidden_dim": 5,
    "initialization": "torch",
    "normalize_features": True,
    "renorm_start": 0,
    "pessimism": 0,
    "noise_bank_seed": 1,
}


@pytest.mark.parametrize("name", [name for name, value in POLICY_ALIVE.items() if value is not None])
def test_policy_argument_is_alive(name):
    observe = prediction(deterministic=True) if name == "noise_bank_seed" else trained_weights
    changed = {**TINY["policy_kwargs"], name: POLICY_ALIVE[name]}
    critic_type, _ = CRITIC_OPTIONS.get(name, ("twin", None))
    first, second = (tiny_qvpo(critic_type=critic_type, policy_kwargs=each) for each in (TINY["policy_kwargs"], changed))
    assert differ(observe(first), observe(second))


def test_every_policy_argument_is_covered():
    given_by_sb3_or_qvpo = {
        *("observation_space", "action_space", "lr_schedule", "normalized_observations"),
        *("n_diffusion_steps", "n_behavior_candidates", "n_eval_candidates", "critic_type", "eval_noise_scale"),
    }
    assert set(inspect.signature(DiffusionPolicy).parameters) == POLICY_ALIVE.keys() | given_by_sb3_or_qvpo


@pytest.mark.parametrize("optimizer_kwargs", [None, dict(weight_decay=0.5)])
def test_optimizer_arguments(optimizer_kwargs):
    policy_kwargs = dict(net_arch=[8], optimizer_class=th.optim.AdamW, optimizer_kwargs=optimizer_kwargs)
    model = tiny_qvpo(policy_kwargs=policy_kwargs).learn(8)
    for network in (model.actor, model.critic):
        assert type(network.optimizer) is th.optim.AdamW
        assert network.optimizer.param_groups[0]["weight_decay"] == (0.5 if optimizer_kwargs else 0.01)


def test_memory_of_large_draws_has_a_bound(monkeypatch):
    """States go through in parts, each with noise of its own; what is drawn is what the parts would draw alone."""
    observations, width = th.randn(10, 3), 9
    sizes, sample = [], FastActor.sample_candidates

    def watched(self, features, *args):
        sizes.append(len(features))
        return sample(self, features, *args)

    monkeypatch.setattr(FastActor, "sample_candidates", watched)
    model = tiny_qvpo(n_train_candidates=6, policy_kwargs=dict(net_arch=dict(pi=[8], qf=[width])))
    policy = model.policy
    assert policy.states_at_once(6) > 10
    monkeypatch.setattr(policies, "LARGEST_DRAW", 4 * 6 * width + 1)
    assert policy.states_at_once(6) == 4 and policy.states_at_once(1000) == 1
    th.manual_seed(0)
    scored = policy.score_candidates(observations, 6)
    assert sizes == [4, 4, 2] and scored.candidates.shape == (10, 6, 1) and scored.scores.shape == (10, 6)
    th.manual_seed(0)
    parts = [policy.score_candidates(part, 6) for part in th.split(observations, 4)]
    for i, whole in enumerate(scored):
        th.testing.assert_close(th.cat([part[i] for part in parts]), whole)
    policy.score_candidates(observations, model.actor.draw_noise(10, 6))
    assert sizes[-1] == 10, "the caller's noise has its size already"
    assert model._draw_actor_noise(10).chain == 6 and model._draw_actor_noise(4).chain.shape == (3, 4, 6, 1)
    sizes.clear()
    model.learn(7)
    assert sizes[-3:] == [8, 4, 4], "the target's candidates are two, the policy step's six"
    long_noise = tiny_qvpo(n_diffusion_steps=50).policy
    assert long_noise.states_at_once(1) == (4 * 6 * width + 1) // 50
