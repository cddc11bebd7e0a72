"""What ``predict`` promises, saving and loading, train and evaluation modes, features extractors."""

import copy
import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import TINY, CountdownEnv, same_weights, tiny_qvpo, weights_of
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN

from sb3_qvpo import QVPO, DiffusionPolicy
from sb3_qvpo.common.candidates import best_candidate
from sb3_qvpo.common.policies import evaluation_mode


def observations(model, n=40, seed=0):
    model.observation_space.seed(seed)
    samples = [model.observation_space.sample() for _ in range(n)]
    if isinstance(model.observation_space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in model.observation_space.spaces}
    return np.stack(samples)


def row(obs, i):
    return {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]


MODELS = {
    "vector": lambda **kwargs: tiny_qvpo(n_eval_candidates=32, **kwargs),
    "image": lambda **kwargs: tiny_qvpo(
        FakeImageEnv(screen_height=36, screen_width=36, discrete=False), policy="CnnPolicy", **kwargs
    ),
    "dict": lambda **kwargs: tiny_qvpo(
        SimpleMultiObsEnv(discrete_actions=False), policy="MultiInputPolicy", **{**kwargs, "policy_kwargs": dict(net_arch=[8])}
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_deterministic_predictions_depend_on_weights_and_observation_only(kind, tmp_path):
    """Alone or anywhere in a batch, now or later, before and after saving: bit for bit the same action."""
    model = MODELS[kind]()
    for parameter in model.policy.parameters():
        parameter.data.add_(0.1 * th.randn_like(parameter))
    n = 40 if kind == "vector" else 6
    obs = observations(model, n)
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
    obs = observations(model)
    draws = []
    for seed in (1, 2, 1):
        th.manual_seed(seed)
        draws.append(model.predict(obs)[0])
    assert np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0], draws[1])
    th.manual_seed(1)
    with th.no_grad():
        candidates, q_values = model.policy.rank_candidates(th.as_tensor(obs), 3)
    np.testing.assert_allclose(draws[0], 2 * best_candidate(candidates, q_values), atol=1e-6)  # Pendulum: torque in [-2, 2]


def test_more_candidates_have_higher_values():
    """The K-efficient policy: the expected value of the chosen action grows with K."""
    model = tiny_qvpo()
    obs = th.as_tensor(observations(model, 200))
    with th.no_grad():
        values = [model.policy.rank_candidates(obs, k)[1].max(dim=1).values.mean().item() for k in (1, 2, 8, 64)]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_candidate_counts_can_be_changed_on_a_loaded_model(tmp_path):
    tiny_qvpo().save(tmp_path / "model")
    at_load = QVPO.load(tmp_path / "model", n_eval_candidates=9, n_behavior_candidates=2)
    later = QVPO.load(tmp_path / "model")
    obs = observations(later)
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


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_continues_where_it_stopped(kind, tmp_path):
    """Weights, targets, both optimisers, counters and schedules: the next updates are the same bit for bit."""
    model = MODELS[kind](learning_rate="lin_1e-3", ent_coef="lin_0.1").learn(20)
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


def test_the_file_holds_no_networks_twice_and_nothing_of_the_process(tmp_path):
    from stable_baselines3.common.save_util import load_from_zip_file

    model = tiny_qvpo(policy_kwargs=dict(TINY["policy_kwargs"])).learn(10)
    model.save(tmp_path / "model")
    data, parameters, _ = load_from_zip_file(tmp_path / "model")
    assert set(parameters) == {"policy", "actor.optimizer", "critic.optimizer"}
    forbidden = {"actor", "critic", "actor_target", "critic_target", "device", "_finite_guard", "_metric_sums", "_q_weighting"}
    assert not forbidden & set(data)
    assert data["policy_kwargs"] == TINY["policy_kwargs"]  # as the user gave them


def test_user_dictionaries_are_left_alone():
    policy_kwargs, replay_buffer_kwargs = dict(net_arch=[8]), dict(handle_timeout_termination=False)
    tiny_qvpo(policy_kwargs=policy_kwargs, replay_buffer_kwargs=replay_buffer_kwargs, n_steps=3)
    assert policy_kwargs == dict(net_arch=[8])
    assert replay_buffer_kwargs == dict(handle_timeout_termination=False)


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


def test_custom_weighting_and_schedule_survive_saving(tmp_path):
    model = tiny_qvpo(q_weighting=lambda q: q.softmax(dim=1), ent_coef=lambda progress: 0.1 * progress)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model")
    assert loaded._ent_coef_schedule(0.5) == pytest.approx(0.05)
    assert th.equal(loaded._q_weighting(th.zeros(1, 4)), th.full((1, 4), 0.25))


def test_a_policy_with_a_schedule_that_cannot_be_pickled_is_saved_alone(tmp_path):
    model = tiny_qvpo(policy_kwargs=dict(net_arch=[8], noise_schedule=lambda n: th.linspace(0.1, 0.7, n)))
    model.policy.save(tmp_path / "policy")
    loaded = DiffusionPolicy.load(tmp_path / "policy")
    obs = observations(model)
    for policy in (loaded, copy.deepcopy(loaded)):
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="n_diffusion_steps must be 3, the length of the saved schedule, got 4"):
        loaded._get_constructor_parameters()["noise_schedule"](4)


def test_actions_stay_within_tiny_and_uneven_bounds():
    env = CountdownEnv()
    low, high = np.array([-0.4, 0.1, -0.7], np.float32), np.array([0.4, 0.3, 0.1], np.float32)
    assert (low + 0.5 * (np.float32(1) + 1.0) * (high - low) > high).any()  # where SB3's formula goes beyond a bound
    env.action_space = spaces.Box(low, high)
    model = tiny_qvpo(env).learn(12)
    obs = observations(model, 100)
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


def counting_model(**policy_kwargs):
    return tiny_qvpo(
        policy_kwargs=dict(net_arch=[8], features_extractor_class=CountingExtractor, **policy_kwargs), n_behavior_candidates=7
    )


def test_each_state_is_encoded_once_for_all_its_candidates():
    model = counting_model()
    with th.no_grad():
        model.policy.rank_candidates(th.zeros(5, 3), 50)
    for network in (model.actor, model.critic):
        assert network.features_extractor.rows == [(5, False)]
    model = counting_model(share_features_extractor=True)
    with th.no_grad():
        model.policy.rank_candidates(th.zeros(5, 3), 50)
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
        model.policy.rank_candidates(th.randn(50, 3), 8)
        model.policy.rank_candidates(th.randn(50, 3), 8, target=True)
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


def test_evaluation_mode_restores_each_mode():
    first, second = th.nn.Dropout(), th.nn.Dropout().eval()

    def fail():
        with evaluation_mode(first, second):
            assert not first.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert first.training
    assert not second.training


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


def test_cnn_and_multi_input_policies_use_their_extractors():
    extractors = [type(MODELS[kind]().actor.features_extractor) for kind in MODELS]
    assert extractors == [FlattenExtractor, NatureCNN, CombinedExtractor]


def test_normalize_images_and_extractor_arguments_are_alive():
    def actions(**policy_kwargs):
        model = MODELS["image"](policy_kwargs=dict(net_arch=[8], **policy_kwargs))
        return model.predict(observations(model, 3), deterministic=True)[0]

    plain = actions()
    assert np.array_equal(plain, actions())
    assert not np.array_equal(plain, actions(normalize_images=False))
    assert not np.array_equal(plain, actions(features_extractor_kwargs=dict(features_dim=32)))


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


def test_the_actor_alone_is_a_policy():
    model = tiny_qvpo()
    action, _ = model.actor.predict(np.zeros(3, np.float32))
    assert model.action_space.contains(action)
    assert model.policy(th.zeros(2, 3)).shape == (2, 1)


def test_the_actor_is_saved_and_loaded_alone(tmp_path):
    model = tiny_qvpo()
    model.actor.save(tmp_path / "actor")
    loaded = type(model.actor).load(tmp_path / "actor")
    obs = th.zeros(4, 3)
    draws = []
    for actor in (model.actor, loaded):
        th.manual_seed(1)
        draws.append(actor(obs))
    assert th.equal(*draws)


def test_policies_take_their_arguments_in_sb3s_order():
    from stable_baselines3.td3 import policies as td3

    for name in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"):
        theirs, ours = (list(inspect.signature(cls).parameters) for cls in (getattr(td3, name), QVPO.policy_aliases[name]))
        assert ours[:6] == theirs[:6]


def test_gym_and_vec_env_mix_up_is_explained():
    with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
        tiny_qvpo().predict(gym.make("Pendulum-v1").reset())
