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
