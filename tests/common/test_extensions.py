"""Critics, diffusions and algorithms of others fit into the seams: those of ``docs/development.md`` and a few more."""

import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import ROOT, TINY, BanditEnv, same_weights, tiny_qvpo, weights_of
from torch import nn

from sb3_qvpo import QVPO, DiffusionPolicy
from sb3_qvpo.common.actor_critic import CandidateCritic, DiffusionActor
from sb3_qvpo.common.critics import QuantileCritic
from sb3_qvpo.common.off_policy_algorithm import DiffusionOffPolicyAlgorithm
from sb3_qvpo.common.speed.networks import FastActor, FastCritic

EXAMPLES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "development.md").read_text(), flags=re.S | re.M)


@pytest.fixture(scope="module")
def shown():
    """What the page defines, its models left out: ``test_documentation.py`` trains them."""
    names = {}
    for code in EXAMPLES:
        exec(re.sub(r"^model = .*$", "", code, flags=re.M), names)
    return names


def test_the_examples_are_short():
    """Under 30 lines each, without imports, blanks and the call that trains."""
    assert len(EXAMPLES) == 3
    for code in EXAMPLES:
        lines = [line for line in code.splitlines() if line.strip() and not re.match(r"(import|from|model =) ", line)]
        assert len(lines) < 30, lines[0]


class BatchNormCritic(CandidateCritic):
    """Batch normalisation before each linear layer."""

    def make_q_network(self, n_inputs, net_arch, activation_fn):
        layers = []
        for width_in, width_out in zip([n_inputs, *net_arch], [*net_arch, 1], strict=True):
            layers += [nn.BatchNorm1d(width_in), nn.Linear(width_in, width_out), activation_fn()]
        return nn.Sequential(*layers[:-1])


def perturb(model):
    """Away from the initial zeros of the biases, so that candidates and critics differ."""
    for parameter in model.policy.parameters():
        parameter.data.add_(0.1 * th.randn_like(parameter))


def with_speed(critic):
    """The same critic on top of the fast one."""
    return type(f"Fast{critic.__name__}", (critic, FastCritic), {})


@pytest.fixture(params=["quantile", "batch norm", "pessimistic", "quantile, fast", "batch norm, fast", "pessimistic, fast"])
def policy_class(request, shown):
    known = {"quantile": QuantileCritic, "batch norm": BatchNormCritic, "pessimistic": shown["PessimisticCritic"]}
    critic = known[request.param.split(",")[0]]
    return type("Policy", (DiffusionPolicy,), {"critic_class": with_speed(critic) if "fast" in request.param else critic})


LARGE = dict(n_train_candidates=64, batch_size=64, policy_kwargs=dict(net_arch=[64, 64]))


def test_own_critics_train_and_give_the_same_numbers_with_and_without_speed(policy_class, settings):
    """Small and large batches; weights after training, candidates, scores and their shapes."""
    settings.candidate_dtype = "float32"
    for kwargs in ({}, LARGE):
        results = []
        for enabled in (True, False):
            settings.enabled = enabled
            model = tiny_qvpo(policy=policy_class, **kwargs).learn(12)
            results.append(weights_of(model))
        for name, value in results[0].items():
            np.testing.assert_allclose(value, results[1][name], atol=1e-4, err_msg=name)
        assert not same_weights(results[1], weights_of(tiny_qvpo(policy=policy_class, **kwargs))), "it has learnt"
        perturb(model)
        for n_states, n_candidates in ((1, 4), (3, 2), (64, 64)):
            observation, noise = th.randn(n_states, 3), model.actor.draw_noise(n_states, n_candidates)
            scored = []
            for enabled in (True, False):
                settings.enabled = enabled
                with th.no_grad():
                    scored.append(model.policy.score_candidates(observation, noise))
            assert scored[0].candidates.shape == (n_states, n_candidates, 1)
            assert scored[0].scores.shape == (n_states, n_candidates)
            for fast, eager in zip(*scored, strict=True):
                np.testing.assert_allclose(fast, eager, atol=2e-5)


def test_own_critics_value_what_their_networks_value(policy_class):
    """Candidates of a state in one call, or one by one through SB3's ``forward``."""
    model = tiny_qvpo(policy=policy_class).learn(12)
    perturb(model)
    critic, observation, candidates = model.critic.eval(), th.randn(5, 3), th.rand(5, 7, 1)
    with th.no_grad():
        predictions = critic.value_candidates(critic.features(observation), candidates)
        scores = critic.score(critic.features(observation), candidates)
        for k in range(7):
            one_by_one = th.stack(critic(observation, candidates[:, k]))
            np.testing.assert_allclose(predictions[:, :, k], one_by_one, atol=1e-5)
            np.testing.assert_allclose(scores[:, k], critic.aggregate(one_by_one), atol=1e-5)


def test_own_critics_are_saved_and_exported(policy_class, tmp_path):
    """A loaded model decides the same, trains on, and its file decides as ``predict`` does."""
    sys.modules[__name__].Policy = policy_class  # pickles look for it here
    policy_class.__module__ = __name__
    model = tiny_qvpo(policy=policy_class).learn(12)
    perturb(model)
    model.save(tmp_path / "model")
    loaded = QVPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert type(loaded.critic) is policy_class.critic_class
    assert same_weights(weights_of(model), weights_of(loaded))
    observation = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    actions = model.predict(observation, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], actions)
    is_known = issubclass(policy_class.critic_class, FastCritic | QuantileCritic)
    assert not loaded.policy.compile_actions() or is_known
    model.export(tmp_path / "policy.pt2")
    exported = th.export.load(tmp_path / "policy.pt2").module()
    np.testing.assert_allclose(exported(th.as_tensor(observation)), actions, atol=1e-5)
    loaded.learn(10, reset_num_timesteps=False)


class NormBehindCritic(CandidateCritic):
    """Batch normalisation in the place of an activation."""

    def make_q_network(self, n_inputs, net_arch, activation_fn):
        return nn.Sequential(nn.Linear(n_inputs, 16), nn.Sequential(nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 1))


@pytest.mark.parametrize("n_candidates", [4, 16])
def test_layers_get_rows_with_and_without_speed(n_candidates, settings):
    policy = type("Policy", (DiffusionPolicy,), {"critic_class": with_speed(NormBehindCritic)})
    model = tiny_qvpo(policy=policy).learn(12)
    critic, features, candidates = model.critic.eval(), th.randn(5, 3), th.rand(5, n_candidates, 1)
    with th.no_grad():
        fast = critic.score(features, candidates)
        settings.enabled = False
        np.testing.assert_allclose(fast, critic.score(features, candidates), atol=1e-5)


def test_a_policy_that_scores_in_its_own_way_has_no_program():
    class Contrary(DiffusionPolicy):
        def score_candidates(self, *args, **kwargs):
            scored = super().score_candidates(*args, **kwargs)
            return scored._replace(scores=-scored.scores)

    model = tiny_qvpo(policy=Contrary)
    perturb(model)
    action = model.predict(np.ones(3, np.float32), deterministic=True)[0]
    assert not model.policy.compile_actions() and model.policy.programs.tried_counts() == ([], [])
    np.testing.assert_array_equal(model.predict(np.ones(3, np.float32), deterministic=True)[0], action)


def test_running_statistics_of_a_critic_move_in_updates_only(shown):
    policy = type("Policy", (DiffusionPolicy,), {"critic_class": BatchNormCritic})
    model = tiny_qvpo(policy=policy).learn(12)
    mean = model.critic.q_networks[0][0].running_mean.clone()
    assert mean.any() and th.equal(model.critic_target.q_networks[0][0].running_mean, mean)
    model.policy.set_training_mode(True)
    model.policy.score_candidates(th.randn(8, 3), 4)
    assert th.equal(model.critic.q_networks[0][0].running_mean, mean)
    model.train(1, 8)
    assert not th.equal(model.critic.q_networks[0][0].running_mean, mean)


@pytest.mark.parametrize("actor_class", [DiffusionActor, FastActor])
def test_a_process_of_another_kind(actor_class, shown, tmp_path):
    """It learns to return an action that it is trained on, and is saved, exported and deterministic as any other."""
    own = {"make_diffusion": shown["StraightActor"].make_diffusion}
    policy = type("Policy", (DiffusionPolicy,), {"actor_class": type("Actor", (actor_class,), own)})
    model = tiny_qvpo(BanditEnv(action_dim=2), policy=policy, n_diffusion_steps=5, policy_kwargs=dict(net_arch=[32]))
    assert model.policy.noise_bank(4).shape == (1, 1, 4, 2)
    target, observation = th.tensor([0.4, -0.7]), th.zeros(64, 2)
    optimizer = th.optim.Adam(model.actor.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        model.actor.denoising_loss(observation, target.expand(64, 1, 2)).mean().backward()
        optimizer.step()
    with th.no_grad():
        samples = model.actor(observation)
    np.testing.assert_allclose(samples.mean(0), target, atol=0.05)
    assert samples.std(0).max() < 0.1
    model.learn(12)
    model.export(tmp_path / "policy.pt2")
    exported = th.export.load(tmp_path / "policy.pt2").module()
    observation = np.zeros((3, 2), np.float32)
    actions = model.predict(observation, deterministic=True)[0]
    np.testing.assert_allclose(exported(th.as_tensor(observation)), actions, atol=1e-5)


def test_an_algorithm_of_its_own(shown, tmp_path):
    """What comes with the base: saving, loading, resuming, export, learning rates, and metrics in the log."""
    algorithm = shown["SoftmaxRegression"]
    assert issubclass(algorithm, DiffusionOffPolicyAlgorithm)
    small = {name: value for name, value in TINY.items() if name not in ("n_train_candidates", "n_uniform_actions")}
    model = algorithm("MlpPolicy", "Pendulum-v1", **small).learn(20)
    assert model._n_updates == 15 and {"train/critic_loss", "train/actor_loss"} <= model.logger.name_to_value.keys()
    model.save(tmp_path / "model")
    model.save_checkpoint(tmp_path / "run")
    observation = np.ones(3, np.float32)
    for other in (
        algorithm.load(tmp_path / "model", env=gym.make("Pendulum-v1")),
        algorithm.resume(tmp_path / "run", gym.make("Pendulum-v1")),
    ):
        assert same_weights(weights_of(model), weights_of(other))
        np.testing.assert_array_equal(
            other.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
        )
        other.learn(10, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="n_eval_candidates must be a whole number of at least 1, got 0"):
        algorithm("MlpPolicy", "Pendulum-v1", n_eval_candidates=0)
