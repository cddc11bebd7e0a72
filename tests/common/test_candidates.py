"""Candidates, their values and the best of them against the float64 reference."""

import numpy as np
import pytest
import reference
import torch as th
from helpers import TOLERANCE, actor_to_numpy, critics_to_numpy, random_policy

from sb3_qvpo.common import candidates as cand
from sb3_qvpo.common.noise_schedules import make_betas

SCHEDULES = ["cosine", "vp", "linear"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(8))
def test_candidates_their_values_and_the_best(schedule, seed):
    """The reverse chain given its noise, the critics over candidates, best of K."""
    policy, observation, noise = random_policy(seed, schedule)
    with th.no_grad():
        _, candidates, q_values = policy.score_candidates(observation, noise)
        best = cand.best_candidate(candidates, q_values)
        plain = th.cat(policy.critic(observation, candidates[:, 0]), dim=1)
    actor, critics = actor_to_numpy(policy.actor), critics_to_numpy(policy.critic)
    betas = make_betas(schedule, policy.n_diffusion_steps).numpy()
    for i, state in enumerate(observation.numpy().astype(np.float64)):
        expected = reference.draw_candidates(actor, state, noise[:, i].numpy().astype(np.float64), betas)
        np.testing.assert_allclose(candidates[i], expected, **TOLERANCE)
        expected_values = [reference.q_values(critics, state, action) for action in expected]
        np.testing.assert_allclose(q_values[i], [min(values) for values in expected_values], **TOLERANCE)
        np.testing.assert_allclose(plain[i], expected_values[0], **TOLERANCE)
        np.testing.assert_allclose(best[i], reference.best_of_k(critics, state, expected)[0], **TOLERANCE)


def test_candidate_statistics():
    candidates, q_values = th.randn(3, 6, 2), th.randn(3, 6)
    spread = np.mean([[np.std(candidates[i, :, d].numpy()) for d in range(2)] for i in range(3)])
    assert float(cand.candidate_std(candidates)) == pytest.approx(spread, abs=1e-6)
    contrast = np.mean([max(row) - np.mean(row) for row in q_values.numpy()])
    assert float(cand.critic_contrast(q_values)) == pytest.approx(contrast, abs=1e-6)
    assert float(cand.candidate_std(candidates[:, :1].expand(3, 6, 2))) == pytest.approx(0, abs=1e-6)
    assert float(cand.candidate_std(candidates[:, :1])) == 0  # one candidate: 0, not NaN


class Hill:
    """Critics whose score falls with the distance from a top; states do not matter."""

    def __init__(self, top):
        self.top = th.as_tensor(top)

    def score(self, features, candidates):
        return -((candidates - self.top) ** 2).sum(dim=-1)

    def action_gradient(self, features, actions):
        return self.score(features, actions), -2 * (actions - self.top)


def test_improved_candidates_on_a_hill():
    """Each step goes the whole length straight to the top, from the best candidate, until it goes beyond or meets the box."""
    candidates = th.tensor([[[0.0, 0.0], [-0.9, -0.9]], [[0.5, 0.0], [0.6, 0.0]]])
    hill = Hill([0.3, 0.4])
    scored = cand.ScoredCandidates(th.zeros(2, 1), candidates, hill.score(None, candidates))
    features, actions, scores = cand.improve_best_candidate(scored, hill, 3, 0.2)
    assert th.equal(actions[:, :2], candidates) and th.equal(features, scored.features)
    th.testing.assert_close(actions[0, 2:], th.tensor([[0.12, 0.16], [0.24, 0.32], [0.36, 0.48]]))
    th.testing.assert_close(scores, hill.score(None, actions))
    outside = Hill([5.0, 0.0])
    _, actions, _ = cand.improve_best_candidate(scored._replace(scores=outside.score(None, candidates)), outside, 4, 0.3)
    assert actions[1, -1].tolist() == [1.0, 0.0] and actions.abs().max() <= 1
    # The score of a single candidate is not read
    alone = scored._replace(candidates=candidates[:, :1], scores=th.full((2, 1), 7.0))
    _, actions, scores = cand.improve_best_candidate(alone, hill, 2, 0.2)
    th.testing.assert_close(scores, hill.score(None, actions))
    # No steps change nothing, and a flat critic moves nothing
    assert th.equal(cand.improve_best_candidate(scored, hill, 0, 0.2).candidates, candidates)
    flat = Hill([0.0, 0.0])
    at_top = cand.ScoredCandidates(th.zeros(1, 1), th.zeros(1, 1, 2), th.zeros(1, 1))
    assert th.equal(cand.improve_best_candidate(at_top, flat, 2, 0.2).candidates, th.zeros(1, 3, 2))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_improved_candidates_of_networks(seed, fast, settings):
    """Against gradients by hand, with one to three critics of which the smallest decides."""
    settings.enabled = fast
    policy, observation, noise = random_policy(seed)
    critics = critics_to_numpy(policy.critic)
    with th.no_grad():
        scored = policy.score_candidates(observation, noise)
        improved = policy.improve_best(scored, 3, 0.1)
    assert improved.candidates.shape[1] == noise.shape[2] + 3 == improved.scores.shape[1]
    for i, state in enumerate(observation.numpy().astype(np.float64)):
        best = cand.best_candidate(scored.candidates, scored.scores)[i].numpy().astype(np.float64)
        expected = reference.improve(critics, state, best, 3, 0.1)
        np.testing.assert_allclose(improved.candidates[i, -3:], expected, atol=1e-4)
        values = [min(reference.q_values(critics, state, action)) for action in expected]
        np.testing.assert_allclose(improved.scores[i, -3:], values, atol=1e-4)
    assert all(parameter.grad is None for parameter in policy.parameters())
