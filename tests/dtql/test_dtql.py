"""Whole calls of ``DTQL.train()`` against the float64 reference; closed forms of its losses; acting, saving, exporting."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import reference
import torch as th
from helpers import (
    BOX,
    IMAGE,
    TOLERANCE,
    AnySpacesEnv,
    CountdownEnv,
    DictEnv,
    actor_parameters,
    actor_to_numpy,
    four_gaussians,
    layers_to_numpy,
    same_weights,
    shares_of_places,
    tiny_dtql,
    to_double,
    weights_of,
)
from torch import nn
from torch.export.pt2_archive._package import load_pt2

from sb3_qvpo.dtql import DTQL
from sb3_qvpo.dtql.losses import expectile_loss, squashed_log_density


def normed_layers(network):
    """The layers of a network with layer norms, in the reference's form."""
    rows = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            rows.append([layer.weight, layer.bias])
        elif isinstance(layer, nn.LayerNorm):
            rows[-1] += [layer.weight, layer.bias]
    return [tuple(to_double(parameter.detach()) for parameter in row) for row in rows]


def close(parameters, arrays):
    """
    Gradients, compared with the largest number of each tensor, because single ones cancel. Where actions are at the edge of
    the box the policy's gradients are small, and float32 has few digits of 1 - tanh^2.
    """
    for parameter, array in zip(parameters, arrays, strict=True):
        scale = max(1e-2, np.abs(array).max())
        np.testing.assert_allclose(parameter / scale, array / scale, rtol=0, atol=2e-4)


SETTINGS = {
    "paper": dict(),
    "authors' code": dict(value_target="online", n_pretraining_updates=1),
    "likelihood": dict(log_prob_coef=1.0, alpha=5.0, expectile=0.9),
    "n-step, clipped gradients": dict(n_steps=3, max_grad_norm=0.05),
}


# A task that ends and has other bounds on each side: once is enough for most
STEPS = [(name, "Pendulum-v1") for name in SETTINGS]
STEPS += [pytest.param(name, "countdown", marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(SETTINGS)]


@pytest.mark.parametrize(("name", "env"), STEPS)
def test_train_step_by_step(name, env):
    """Three updates in a row on real transitions: all gradients, all weights, what is logged."""
    defaults = dict(alpha=1.0, expectile=0.7, log_prob_coef=0.0, n_pretraining_updates=0, value_target="target")
    settings = {**defaults, "max_grad_norm": None, **SETTINGS[name]}
    # Adam divides a gradient by its size: of one near 0 that would make a step of float32's rounding
    policy_kwargs = dict(net_arch=[4], time_embedding_dim=4, time_hidden_dim=6, optimizer_kwargs=dict(eps=1e-3))
    # At low noise levels losses are so large that differences of them have no digits left
    policy_kwargs["sigma_min"] = 0.1
    environment = env if env == "Pendulum-v1" else CountdownEnv()
    model = tiny_dtql(environment, learning_starts=30, tau=0.1, policy_kwargs=policy_kwargs, **settings).learn(30)
    with th.no_grad():
        for parameter in model.policy.parameters():  # targets that differ from the online networks, biases that are not 0
            parameter.add_(0.2 * th.randn_like(parameter))
    records = {"batch": [], "noise": [], "chain": []}
    for kind, owner, method_name in (
        ("batch", model.replay_buffer, "sample"),
        ("noise", model, "_draw_noise"),
        ("chain", model.actor, "draw_noise"),
    ):
        method = getattr(owner, method_name)

        def recorder(*args, _method=method, _kind=kind, **kwargs):
            records[_kind].append(_method(*args, **kwargs))
            return records[_kind][-1]

        setattr(owner, method_name, recorder)
    policy = model.policy
    learner = reference.TrustedLearner(
        layers_to_numpy(model.actor.noise_predictor), actor_to_numpy(policy.cloned),
        *([normed_layers(network) for network in critic.q_networks] for critic in (model.critic, model.critic_target)),
        layers_to_numpy(model.critic.value_network),
        dict(
            tau=0.1, gamma=model.gamma, learning_rate=3e-4, critic_learning_rate=3e-4, adam_epsilon=1e-3, sigma_data=0.5,
            **settings,
        ),
    )  # fmt: skip
    critic_parameters = [*(p for network in model.critic.q_networks for p in network.parameters())]
    critic_parameters += [*model.critic.value_network.parameters()]
    parameters = {
        "critic": critic_parameters,
        "cloned": actor_parameters(policy.cloned),
        "actor": [*model.actor.noise_predictor.parameters()],
    }
    for update in range(3):
        for results in records.values():
            results.clear()
        model._metric_sums.clear()
        learner.gradients.clear()
        model.train(gradient_steps=1, batch_size=4)
        batch = {field: to_double(value) for field, value in records["batch"][0]._asdict().items()}
        batch["rewards"], batch["dones"] = batch["rewards"][:, 0], batch["dones"][:, 0]
        batch["discounts"] = None if batch["discounts"] is None else batch["discounts"][:, 0]
        noises = [{field: to_double(value) for field, value in each._asdict().items()} for each in records["noise"]]
        if records["chain"]:
            noises[1]["chain"] = to_double(records["chain"][0])[0, :, 0]
        learner.update(batch, noises[0], noises[-1])
        assert ("actor" in learner.gradients) == (update >= settings["n_pretraining_updates"]) == bool(records["chain"])
        for kind, gradients in learner.gradients.items():
            close([parameter.grad for parameter in parameters[kind]], gradients)
        for kind, arrays in learner.arrays.items():
            for parameter, array in zip(parameters[kind], arrays, strict=True):
                np.testing.assert_allclose(parameter.detach(), array, **TOLERANCE)
                # The next update begins with the same numbers: a last bit decides on which side of its kink a ReLU is
                array[...] = parameter.detach()
        targets = [array for layers in learner.critics_target for array in reference.flatten(layers)]
        own = [p for network in model.critic_target.q_networks for p in network.parameters()]
        for parameter, array in zip(own, targets, strict=True):
            np.testing.assert_allclose(parameter.detach(), array, **TOLERANCE)
        logged = model.logger.name_to_value
        if records["chain"]:
            np.testing.assert_allclose(logged["train/actor_loss"], learner.metrics["actor_loss"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logged["train/bc_loss"], learner.metrics["cloned_loss"], rtol=1e-4, atol=1e-5)
        total = logged["train/critic_loss"] + logged["train/value_loss"]
        np.testing.assert_allclose(total, learner.metrics["critic_loss"], rtol=1e-4, atol=1e-5)


def test_the_expectile_loss():
    """Too low costs more; with 1/2 it is half of the squared error."""
    errors = th.tensor([2.0, -2.0])
    assert expectile_loss(errors, 0.5).item() == pytest.approx(2.0)
    assert expectile_loss(errors[:1], 0.9).item() == pytest.approx(3.6)
    assert expectile_loss(errors[1:], 0.9).item() == pytest.approx(0.4)
    samples = th.linspace(0, 1, 10_001)  # the 0.8 expectile of a uniform variable is 2/3: 0.8 (1-e)^2 = 0.2 e^2
    guesses = th.linspace(0.6, 0.75, 151)
    losses = th.stack([expectile_loss(samples - guess, 0.8) for guess in guesses])
    assert guesses[losses.argmin()].item() == pytest.approx(2 / 3, abs=2e-3)


def test_the_density_of_the_gaussian_policy():
    actions = th.tensor([[0.5, -0.2]], dtype=th.float64)
    mean, log_std = th.tensor([[0.1, 0.0]], dtype=th.float64), th.tensor([[-0.3, 0.2]], dtype=th.float64)
    expected = sum(
        -((math.atanh(a / 1.001) - m) ** 2) / (2 * math.exp(2 * s)) - s - math.log(2 * math.pi) / 2
        for a, m, s in zip(*(x[0].tolist() for x in (actions, mean, log_std)), strict=True)
    )
    assert squashed_log_density(actions, mean, log_std).item() == pytest.approx(expected)
    at_edge = squashed_log_density(th.tensor([[1.0, -1.0]]), th.zeros(1, 2), th.zeros(1, 2))
    assert at_edge.isfinite().all(), "data on the edge have a density"


@pytest.mark.parametrize("kind", ["gaussian", "implicit"])
def test_one_pass_makes_an_action(kind):
    """The first deterministic candidate is the policy's centre; with one candidate no critic is asked."""
    model = tiny_dtql(n_eval_candidates=1, policy_kwargs=dict(net_arch=[8], one_step_policy=kind)).learn(12)
    observation = th.as_tensor([[0.1, 0.2, 0.3]])
    network = model.actor.noise_predictor
    with th.no_grad():
        centre = network(th.zeros(1, 1, 1), 0, network.condition(observation))
        if kind == "gaussian":
            mean, _ = network.condition(observation)
            np.testing.assert_allclose(centre, mean.tanh())
        else:
            whole = network.later_layers(network.first_layer(th.cat([th.zeros(1, 1), observation], dim=1)))
            np.testing.assert_allclose(centre[:, 0], whole.tanh(), rtol=1e-5)
    action, _ = model.predict(observation[0].numpy(), deterministic=True)
    np.testing.assert_allclose(action, 2 * centre.flatten(), rtol=1e-5)
    stochastic = {model.predict(observation[0].numpy())[0].item() for _ in range(5)}
    assert len(stochastic) == 5


def test_noise_widens_a_gaussian_by_its_deviation():
    model = tiny_dtql()
    network = model.actor.noise_predictor
    with th.no_grad():
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.copy_(th.tensor([0.3, math.log(0.1)]))
    noise = th.randn(1, 1, 50_000, 1)
    actions = model.actor.sample_candidates(th.zeros(1, 3), noise)
    before_tanh = actions.detach().atanh()
    assert before_tanh.mean().item() == pytest.approx(0.3, abs=5e-3)
    assert before_tanh.std().item() == pytest.approx(0.1, rel=0.02)


def test_acting_follows_the_softmax_of_the_target_critics():
    model = tiny_dtql(selection_temperature=1e-6, n_behavior_candidates=200)
    with th.no_grad():
        for network in model.critic.q_networks:  # only the targets may count
            network[-1].bias.add_(100.0)
    observation = np.ones(3, np.float32)
    features = th.as_tensor(observation[None])
    noise = th.randn(1, 1, 4_000, 1)
    with th.no_grad():
        scores = model.critic_target.score(features, model.actor.sample_candidates(features, noise))
    spread = (scores.max() - scores.min()).item()

    def value():
        action = th.as_tensor(model.predict(observation)[0] / 2)[None, None]
        return model.critic_target.score(features, action).item()

    greedy = np.mean([value() for _ in range(20)])
    model.selection_temperature = 1e6
    assert greedy > np.mean([value() for _ in range(20)]) + 0.2 * spread


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(alpha=-1.0), "alpha must be"),
        (dict(expectile=1.0), "expectile must be"),
        (dict(expectile=0.0), "expectile must be"),
        (dict(log_prob_coef=-1.0), "log_prob_coef must be"),
        (dict(value_target="both"), "value_target must be"),
        (dict(n_pretraining_updates=-1), "n_pretraining_updates must be"),
        (dict(selection_temperature=0.0), "selection_temperature must be"),
        (dict(policy_kwargs=dict(one_step_policy="flow")), "one_step_policy must be"),
        (dict(policy_kwargs=dict(sampler="ddim")), "sampler must be left out"),
        (dict(policy_kwargs=dict(share_features_extractor=True)), "share_features_extractor must be False"),
        (dict(policy_kwargs=dict(sigma_min=-1.0)), "sigma_min"),
        (dict(policy_kwargs=dict(one_step_policy="implicit"), log_prob_coef=1.0), "log_prob_coef must be 0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_dtql(**kwargs)


@pytest.mark.parametrize("kind", ["gaussian", "implicit"])
def test_files_hold_all_of_it(tmp_path, kind):
    model = tiny_dtql(policy_kwargs=dict(net_arch=[8], one_step_policy=kind, sigma_data=0.4)).learn(20)
    model.n_eval_candidates, model.selection_temperature = 3, 0.3
    observation = np.ones(3, np.float32)
    model.save(tmp_path / "model.zip")
    again = DTQL.load(tmp_path / "model.zip")
    assert same_weights(weights_of(model), weights_of(again))
    assert (again.n_eval_candidates, again.selection_temperature, again.policy.selection_temperature) == (3, 0.3, 0.3)
    assert again.policy.cloned.diffusion.sigma_data == 0.4
    assert again.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    moments = [model.get_parameters()["cloned.optimizer"], again.get_parameters()["cloned.optimizer"]]
    assert moments[0]["state"][0]["exp_avg"].equal(moments[1]["state"][0]["exp_avg"])
    model.policy.save(tmp_path / "policy.pth")
    policy = type(model.policy).load(tmp_path / "policy.pth")
    assert policy.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    with pytest.raises(RuntimeError, match="sigma_data"):
        tiny_dtql(policy_kwargs=dict(net_arch=[8], one_step_policy=kind)).set_parameters(model.get_parameters())


def test_it_goes_on_as_if_it_had_never_stopped(tmp_path):
    from sb3_qvpo import ResumableCheckpointCallback

    whole = tiny_dtql().learn(60)
    tiny_dtql().learn(60, callback=ResumableCheckpointCallback(save_freq=30, save_path=str(tmp_path / "run.zip")))
    resumed = DTQL.resume(tmp_path / "run.zip", "Pendulum-v1")
    if resumed.remaining_timesteps:
        resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    assert same_weights(weights_of(whole), weights_of(resumed))


@pytest.mark.parametrize(
    ("policy", "env", "policy_kwargs"),
    [
        ("CnnPolicy", lambda: AnySpacesEnv(IMAGE, BOX), dict(features_extractor_kwargs=dict(features_dim=8))),
        ("MultiInputPolicy", DictEnv, dict()),
        ("MlpPolicy", lambda: AnySpacesEnv(BOX, BOX), dict(n_critics=3, initialization="normal")),
    ],
)
def test_observations_of_all_kinds(policy, env, policy_kwargs):
    model = tiny_dtql(env(), policy, policy_kwargs=dict(net_arch=[8], **policy_kwargs))
    before = weights_of(model)
    model.learn(16)
    after = weights_of(model)
    for part in ("actor.", "cloned.", "critic."):
        assert any(not before[name].equal(after[name]) for name in before if name.startswith(part)), part
    assert model.action_space.contains(model.predict(model.observation_space.sample(), deterministic=True)[0])


def test_the_policy_waits_while_the_others_learn():
    model = tiny_dtql(n_pretraining_updates=10)
    before = weights_of(model)
    model.learn(14)
    after = weights_of(model)
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert (model._n_updates, changed) == (9, {"cloned", "critic", "critic_target"})
    model.learn(4, reset_num_timesteps=False)
    assert not weights_of(model)["actor.noise_predictor.layers.0.weight"].equal(
        before["actor.noise_predictor.layers.0.weight"]
    )


def test_the_networks_are_those_of_the_authors_code():
    """Three layers of 256 each: ReLU in the policy, Mish elsewhere, layer norms in the critics but not in V."""
    model = DTQL("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")

    def kinds(network):
        return [type(layer).__name__ for layer in network.modules() if not list(layer.children())]

    assert kinds(model.actor.noise_predictor) == ["Linear", "ReLU"] * 3 + ["Linear"]
    assert kinds(model.critic.qf0) == ["Linear", "LayerNorm", "Mish"] * 3 + ["Linear"]
    assert kinds(model.critic.value_network) == ["Linear", "Mish"] * 3 + ["Linear"]
    predictor = model.cloned.noise_predictor
    assert [layer.out_features for layer in predictor.modules() if isinstance(layer, nn.Linear)] == [32, 16, 256, 256, 256, 1]
    weight = model.actor.noise_predictor.layers[2].weight
    np.testing.assert_allclose(weight.detach() @ weight.detach().T, np.eye(256), atol=1e-4)
    diffusion = model.cloned.diffusion
    assert (diffusion.sigma_min, diffusion.sigma_max, diffusion.sigma_data) == (0.002, 80.0, 0.5)
    assert (model.n_behavior_candidates, model.n_pretraining_updates, model.expectile) == (1024, 50_000, 0.7)


def test_there_is_no_moving_average_of_the_policy():
    model = tiny_dtql()
    assert model.actor_target is model.actor
    assert not any(name.startswith("actor_target") for name in model.policy.state_dict())


def test_learning_rates_follow_their_schedules():
    """A cosine to 0 for policy and diffusion model; the critics have their own."""
    model = tiny_dtql(learning_rate="cos_1e-3", n_pretraining_updates=0).learn(40)
    for optimizer in (model.actor.optimizer, model.cloned.optimizer):
        assert float(optimizer.param_groups[0]["lr"]) < 1e-5
    assert float(model.critic.optimizer.param_groups[0]["lr"]) == pytest.approx(3e-4)


def test_short_runs_say_that_the_policy_is_not_trained():
    with pytest.warns(UserWarning, match="n_pretraining_updates is 50: the policy will not be trained in the 20"):
        tiny_dtql(n_pretraining_updates=50).learn(20)


def test_a_single_candidate_asks_no_critic():
    """With values that are no numbers the action is the same."""
    model = tiny_dtql(n_eval_candidates=1)
    observation = np.ones(3, np.float32)
    action, _ = model.predict(observation, deterministic=True)
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.mul_(float("nan"))
    assert model.predict(observation, deterministic=True)[0] == action


def test_what_the_log_says_of_alpha():
    """The gradients that the two terms have at an action: from their ratio a user finds alpha."""
    model = tiny_dtql(n_pretraining_updates=0, alpha=3.0, policy_kwargs=dict(net_arch=[8])).learn(20)
    model._metric_sums.clear()
    model.train(1, 8)
    logged = model.logger.name_to_value
    assert logged["train/trust_region_gradient"] > 0 and logged["train/q_value_gradient"] > 0
    assert {"train/trust_region_loss", "train/value_loss", "train/state_value", "train/bc_loss"} <= logged.keys()


@pytest.mark.parametrize(
    ("kind", "n_candidates"),
    [("gaussian", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("implicit", 1), ("gaussian", 5)))],
)
def test_an_exported_file_decides_as_predict_does(tmp_path, kind, n_candidates):
    """With one candidate it holds the one-step policy alone."""
    model = tiny_dtql(n_eval_candidates=n_candidates, policy_kwargs=dict(net_arch=[32, 32], one_step_policy=kind)).learn(20)
    observations = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    model.export(tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    np.testing.assert_allclose(session.run(None, {"observation": observations})[0], expected, rtol=1e-4, atol=1e-5)
    noise = np.random.default_rng(1).normal(size=(1, 3, 1, 1)).astype(np.float32)
    (given,) = session.run(None, {"observation": observations, "noise": noise})
    with th.no_grad():
        features = model.actor.features(th.as_tensor(observations))
        from_noise = 2 * model.actor.sample_candidates(features, th.as_tensor(noise))[:, 0]
    np.testing.assert_allclose(given, from_noise, rtol=1e-4, atol=1e-5)
    sizes = {name: sum(p.numel() for p in getattr(model.policy, name).parameters()) for name in ("actor", "critic")}
    held = sum(int(np.prod(each.dims)) for each in onnx.load(tmp_path / "policy.onnx").graph.initializer)
    assert (held < sizes["actor"] + 20) == (n_candidates == 1)
    assert n_candidates == 1 or held > sizes["critic"] / 2, "the value function is not asked either"
    if kind == "implicit":
        return
    model.export(tmp_path / "policy.pt2")
    program = load_pt2(str(tmp_path / "policy.pt2")).exported_programs["model"].module()
    np.testing.assert_allclose(program(th.as_tensor(observations)), expected, rtol=1e-4, atol=1e-5)
    assert model.policy.critic is model.critic, "the policy itself is as it was"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_bandit_of_four_gaussians():
    """The diffusion model clones all four places. The policy goes to the best one, and stays on the data."""
    data, env = four_gaussians()
    settings = dict(n_pretraining_updates=1_000, learning_rate=1e-3, n_behavior_candidates=1, n_eval_candidates=1)
    model = DTQL("MlpPolicy", env, buffer_size=10_000, seed=0, device="cpu", **settings)
    model.learn_offline(data, 3_000)
    with th.no_grad():
        cloned = model.policy.cloned.sample_candidates(th.zeros(1, 1), th.randn(1, 1, 1_000, 2))[0].numpy()
    of_clone = shares_of_places(cloned)
    of_policy = shares_of_places(model.predict(np.zeros((1_000, 1), np.float32))[0])
    print(of_clone, of_policy)
    assert (of_clone > 0.15).all() and of_clone.sum() > 0.85
    assert of_policy[3] > 0.9
