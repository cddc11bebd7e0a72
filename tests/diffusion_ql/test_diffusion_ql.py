"""Whole calls of ``DiffusionQL.train()`` against the float64 reference; closed forms of its losses; saving and acting."""

import numpy as np
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
    assert_gradients_close,
    critics_to_numpy,
    four_gaussians,
    same_weights,
    shares_of_places,
    tiny_diffusion_ql,
    to_double,
    weights_of,
)

from sb3_qvpo.common.candidates import softmax_choice
from sb3_qvpo.common.speed.settings import settings as speed_settings
from sb3_qvpo.diffusion_ql import DiffusionQL
from sb3_qvpo.diffusion_ql.losses import max_q_target, q_term

SETTINGS = {
    "authors' code": dict(),
    "paper": dict(q_normalization="data", target_actor_interval=1, target_actor_start=0),
    "max-Q backup": dict(max_q_backup=True, eta=2.5, target_actor_start=0, target_actor_interval=2),
    "behaviour cloning": dict(eta=0.0),
    "n-step, clipped gradients": dict(n_steps=3, max_grad_norm=0.05),
}


# A task that ends and has other bounds on each side: once is enough for most
STEPS = [(name, "Pendulum-v1") for name in SETTINGS]
STEPS += [pytest.param(name, "countdown", marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(SETTINGS)]


@pytest.mark.parametrize(("name", "env"), STEPS)
def test_train_step_by_step(name, env):
    """Two updates in a row on real transitions: gradients through the chain, weights, targets, what is logged."""
    defaults = dict(eta=1.0, q_normalization="policy", target_actor_interval=5, target_actor_start=1_000, max_grad_norm=None)
    settings = {**defaults, **SETTINGS[name]}
    policy_kwargs = dict(net_arch=[4], time_embedding_dim=4, optimizer_kwargs=dict(eps=1e-5))
    environment = env if env == "Pendulum-v1" else CountdownEnv()
    model = tiny_diffusion_ql(
        environment, learning_starts=30, tau=0.1, n_diffusion_steps=3, policy_kwargs=policy_kwargs, **settings
    ).learn(30)
    for parameter in model.policy.parameters():  # targets that differ from the online networks, biases that are not 0
        parameter.data.add_(0.2 * th.randn_like(parameter))
    records = {"batch": [], "target": [], "actor": []}
    for kind, owner, method_name in (
        ("batch", model.replay_buffer, "sample"),
        ("target", model.actor_target, "draw_noise"),
        ("actor", model, "_draw_actor_noise"),
    ):
        method = getattr(owner, method_name)

        def recorder(*args, _method=method, _kind=kind, **kwargs):
            records[_kind].append(_method(*args, **kwargs))
            return records[_kind][-1]

        setattr(owner, method_name, recorder)
    learner = reference.QLLearner(
        *(actor_to_numpy(actor) for actor in (model.actor, model.actor_target)),
        *(critics_to_numpy(critic) for critic in (model.critic, model.critic_target)),
        dict(
            betas=reference.vp_betas(3), tau=0.1, gamma=model.gamma, actor_learning_rate=3e-4, critic_learning_rate=3e-4,
            adam_epsilon=1e-5, **settings,
        ),
    )  # fmt: skip
    for _ in range(2):
        for results in records.values():
            results.clear()
        model._metric_sums.clear()
        model.train(gradient_steps=1, batch_size=4)
        batch = {field: to_double(value) for field, value in records["batch"][0]._asdict().items()}
        batch["rewards"], batch["dones"] = batch["rewards"][:, 0], batch["dones"][:, 0]
        batch["discounts"] = None if batch["discounts"] is None else batch["discounts"][:, 0]
        noise = {field: to_double(value) for field, value in records["actor"][0]._asdict().items()}
        noise["timesteps"] = records["actor"][0].timesteps.numpy()
        critic_gradients, actor_gradients = learner.update(batch, to_double(records["target"][0]), noise)
        assert records["target"][0].shape[2] == (3 if settings.get("max_q_backup") else 1)
        assert_gradients_close(model.critic.parameters(), critic_gradients)
        assert_gradients_close(actor_parameters(model.actor), actor_gradients)
        for parameters, arrays in [
            (model.critic.parameters(), learner.critic_arrays()),
            (actor_parameters(model.actor), learner.actor_arrays(learner.actor)),
            (actor_parameters(model.actor_target), learner.actor_arrays(learner.actor_target)),
            (
                model.critic_target.parameters(),
                [array for layers in learner.critics_target for array in reference.flatten(layers)],
            ),
        ]:
            for parameter, array in zip(parameters, arrays, strict=True):
                np.testing.assert_allclose(parameter.detach(), array, **TOLERANCE)
        for metric in ("critic_loss", "actor_loss"):
            logged = model.logger.name_to_value[f"train/{metric}"]
            np.testing.assert_allclose(logged, learner.metrics[metric], err_msg=metric, rtol=1e-4, atol=1e-5)


def test_the_critics_term():
    """Scaling all values changes no gradient, adding to them does; the coin chooses the critic, the other one the unit."""
    values = th.tensor([[1.0, 2.0, 6.0], [2.0, 4.0, 0.0]], requires_grad=True)
    assert q_term(values, th.tensor(0.2)).item() == pytest.approx(-3 / 2)
    assert q_term(values, th.tensor(0.7)).item() == pytest.approx(-2 / 3)
    assert q_term(values, th.tensor(0.2), th.tensor([[10.0, -10.0, 10.0], [1.0, 1.0, 1.0]])).item() == pytest.approx(-0.3)
    (plain,) = th.autograd.grad(q_term(values, th.tensor(0.2)), values)
    np.testing.assert_allclose(plain, [[-1 / 6] * 3, [0] * 3], atol=1e-7)
    one = th.tensor([[2.0, 4.0]])
    assert q_term(one, th.tensor(0.9)).item() == pytest.approx(-1), "a single critic is its own unit"


def test_largest_draw_of_each_critic_then_the_smallest_critic():
    """Not the other way round, which would give 2."""
    values = th.tensor([[[1.0, 5.0]], [[3.0, 2.0]]])
    assert max_q_target(values).tolist() == [[3.0]]
    assert max_q_target(values[:, :, :1]).tolist() == [[1.0]]


def test_a_candidate_is_drawn_by_the_softmax_of_its_value():
    values = th.tensor([[0.0, 1.0, 2.0]]).expand(40_000, -1)
    drawn = softmax_choice(values, 0.5, th.rand(values.shape, generator=th.Generator().manual_seed(0)))
    shares = np.bincount(drawn, minlength=3) / 40_000
    expected = np.exp([0, 2, 4]) / np.exp([0, 2, 4]).sum()
    np.testing.assert_allclose(shares, expected, atol=0.01)
    assert (softmax_choice(values[:9], 1e-4, th.zeros(9, 3)) == 2).all()


def test_stochastic_predictions_follow_the_softmax_and_deterministic_ones_the_best(tmp_path):
    model = tiny_diffusion_ql(selection_temperature=1e-6, n_behavior_candidates=200)
    observation = np.ones(3, np.float32)
    with th.no_grad():
        for parameter in model.critic_target.parameters():
            parameter.zero_()
        for network in model.critic_target.q_networks:  # the value is 10 times the action
            network[0].weight[0, 3], network[2].weight[0, 0], network[4].weight[0, 0] = 1, 1, 10
            network[0].weight[1, 3], network[2].weight[1, 1], network[4].weight[0, 1] = -1, 1, -10
    greedy = np.mean([model.predict(observation)[0] for _ in range(20)])
    model.selection_temperature = 1e6
    assert greedy > 1.5 > np.mean([model.predict(observation)[0] for _ in range(20)])
    model.selection_temperature = 0.25
    model.save(tmp_path / "model.zip")
    again = DiffusionQL.load(tmp_path / "model.zip")
    assert again.policy.selection_temperature == again.selection_temperature == 0.25
    assert again.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(eta=-1.0), "eta must be"),
        (dict(q_normalization="both"), "q_normalization must be"),
        (dict(selection_temperature=0.0), "selection_temperature must be"),
        (dict(target_actor_interval=0), "target_actor_interval must be"),
        (dict(target_actor_start=-1), "target_actor_start must be"),
        (dict(n_target_candidates=0), "n_target_candidates must be"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_diffusion_ql(**kwargs)


def test_it_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = tiny_diffusion_ql(target_actor_start=5).learn(40)
    first = tiny_diffusion_ql(target_actor_start=5).learn(40)
    first.save_checkpoint(tmp_path / "run.zip")
    resumed = DiffusionQL.resume(tmp_path / "run.zip", "Pendulum-v1")
    assert same_weights(weights_of(whole), weights_of(resumed))
    assert resumed.learn(10, reset_num_timesteps=False)._n_updates == whole._n_updates + 10


def test_an_exported_file_decides_as_predict_does(tmp_path):
    model = tiny_diffusion_ql().learn(20)
    observations = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    model.export(tmp_path / "policy.onnx")
    (actions,) = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx")).run(None, {"observation": observations})
    np.testing.assert_allclose(actions, model.predict(observations, deterministic=True)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "env", "policy_kwargs"),
    [
        ("CnnPolicy", lambda: AnySpacesEnv(IMAGE, BOX), dict(features_extractor_kwargs=dict(features_dim=8))),
        ("MultiInputPolicy", DictEnv, dict()),
        ("MlpPolicy", lambda: AnySpacesEnv(BOX, BOX), dict(share_features_extractor=True, n_critics=3)),
        ("MlpPolicy", lambda: AnySpacesEnv(BOX, BOX), dict(prediction="v", sampler="dpm++", n_sampling_steps=2)),
    ],
)
def test_observations_and_chains_of_all_kinds(policy, env, policy_kwargs):
    model = tiny_diffusion_ql(env(), policy, policy_kwargs=dict(net_arch=[8], **policy_kwargs))
    before = weights_of(model)
    model.learn(16)
    after = weights_of(model)
    for part in ("actor.", "critic."):
        assert any(not before[name].equal(after[name]) for name in before if name.startswith(part)), part
    assert model.action_space.contains(model.predict(model.observation_space.sample())[0])


def test_fast_code_changes_nothing(monkeypatch):
    """The chain with gradients and the critics at its end, wide enough for the fast paths."""
    weights = []
    for fast in (True, False):
        monkeypatch.setattr(speed_settings, "enabled", fast)
        model = tiny_diffusion_ql(batch_size=64, policy_kwargs=dict(net_arch=[256, 256]), target_actor_start=0).learn(12)
        weights.append(weights_of(model))
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], rtol=1e-3, atol=3e-5, err_msg=name)


# What the table of deviations says of the authors' code and of the paper


def test_the_networks_are_those_of_the_authors_code():
    """Three layers of 256, Mish; a time network 16, 32, 16 wide; torch's initial weights."""
    model = DiffusionQL("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    predictor = model.actor.noise_predictor
    linear = [layer for layer in predictor.modules() if isinstance(layer, th.nn.Linear)]
    assert [layer.out_features for layer in linear] == [32, 16, 256, 256, 256, 1]
    assert [layer.out_features for layer in model.critic.qf0 if isinstance(layer, th.nn.Linear)] == [256, 256, 256, 1]
    assert isinstance(predictor.later_layers[0], th.nn.Mish) and isinstance(model.critic.qf0[1], th.nn.Mish)
    assert predictor.first_layer.bias.abs().max() > 0
    np.testing.assert_allclose(model.actor.diffusion.sqrt_alpha_bars**2, [0.8041, 0.4352, 0.1585, 0.0389, 0.00641], rtol=2e-3)


PAPERS = dict(target_actor_interval=1, target_actor_start=0)


@pytest.mark.parametrize(("arguments", "moves"), [(dict(target_actor_start=3), [5]), (PAPERS, [2, 3, 4, 5, 6])])
def test_when_the_target_actor_moves(arguments, moves):
    """In the code every fifth update from update 1 000 on, here from 3; in the paper always."""
    model = tiny_diffusion_ql(**arguments).learn(6)
    seen = []
    for update in range(2, 7):
        before = weights_of(model)
        model.train(1, 8)
        if any(not before[name].equal(value) for name, value in weights_of(model).items() if name.startswith("actor_target")):
            seen.append(update)
    assert seen == moves
    assert DiffusionQL("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").target_actor_start == 1_000


def test_one_sample_acts_as_in_the_paper_if_asked_for():
    """No critic is asked: with values of NaN the action is the same."""
    model = tiny_diffusion_ql(n_behavior_candidates=1)
    observation = np.ones(3, np.float32)
    th.manual_seed(0)
    action, _ = model.predict(observation)
    with th.no_grad():
        for parameter in model.critic_target.parameters():
            parameter.mul_(float("nan"))
    th.manual_seed(0)
    assert model.predict(observation)[0] == action


def test_the_learning_rate_is_constant_unless_it_is_a_schedule():
    """The code's decay leaves 0.999 of it; a real cosine is a string."""
    rates = {}
    for rate in (1e-3, "cos_1e-3"):
        model = tiny_diffusion_ql(learning_rate=rate)
        model.learn(20)
        rates[rate] = model.actor.optimizer.param_groups[0]["lr"]
        assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(3e-4)
    assert float(rates[1e-3]) == pytest.approx(1e-3) and float(rates["cos_1e-3"]) < 2e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("eta", [0.0, 2.5])
def test_the_bandit_of_four_gaussians(eta):
    """
    Cloning keeps all four places. With the critics the policy itself goes to the best one, and stays on the data. It needs the
    wide networks: with 64 units cloning learns a single Gaussian in as many updates.
    """
    data, env = four_gaussians()
    settings = dict(n_diffusion_steps=20, batch_size=100, learning_rate=1e-3, target_actor_start=0, n_behavior_candidates=1)
    model = DiffusionQL("MlpPolicy", env, eta=eta, buffer_size=10_000, seed=0, device="cpu", **settings)
    model.learn_offline(data, 2_000)
    shares = shares_of_places(model.predict(np.zeros((1_000, 1), np.float32))[0])
    print(eta, shares)
    assert ((shares > 0.15).all() and shares.sum() > 0.85) if eta == 0 else shares[3] > 0.9
