"""Noise schedules are those of the float64 reference, and end in noise."""

import numpy as np
import pytest
import reference
import torch as th

from sb3_qvpo.common.noise_schedules import NOISE_SCHEDULES, linear_betas, make_betas

SCHEDULES = {"cosine": reference.cosine_betas, "vp": reference.vp_betas, "linear": reference.linear_betas}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 20, 100, 1000])
def test_noise_schedules(name, n_steps):
    betas = make_betas(name, n_steps)
    assert betas.dtype == th.float64
    np.testing.assert_allclose(betas.numpy(), SCHEDULES[name](n_steps), rtol=1e-9, atol=1e-12)
    assert NOISE_SCHEDULES.keys() == SCHEDULES.keys()


def test_every_schedule_ends_in_noise_from_few_to_many_steps():
    """The chain starts from pure noise, so little of the action may be left in x_T."""
    for name in SCHEDULES:
        for n_steps in (5, 20, 100, 1000):
            assert reference.alpha_bar(make_betas(name, n_steps).numpy(), n_steps - 1) < 0.01
    # The constants of DDPM without re-spacing would leave 82 % of the variance after 20 steps
    unscaled = make_betas(lambda n_steps: th.linspace(1e-4, 2e-2, n_steps), 20).numpy()
    assert reference.alpha_bar(unscaled, 19) == pytest.approx(0.817, abs=1e-3)


def test_linear_schedule_above_its_own_length():
    """Beyond 1000 steps the same amount of noise is spread over more steps."""
    for n_steps in (1001, 2000):
        betas = linear_betas(n_steps).numpy()
        assert betas.shape == (n_steps,) and (np.diff(betas) > 0).all()
        assert reference.alpha_bar(betas, n_steps - 1) == pytest.approx(4.0e-5, rel=0.05)
