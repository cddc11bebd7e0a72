"""Noise schedules are those of the float64 reference, and end in noise."""

import numpy as np
import pytest
import reference
import torch as th

from sb3_qvpo.common.noise_schedules import NOISE_SCHEDULES, linear_betas, make_betas


def karras_betas(n_steps):
    return reference.betas_of_levels(reference.karras_levels(n_steps))


SCHEDULES = {
    "cosine": reference.cosine_betas,
    "vp": reference.vp_betas,
    "linear": reference.linear_betas,
    "karras": karras_betas,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 20, 100, 1000])
def test_noise_schedules(name, n_steps):
    betas = make_betas(name, n_steps)
    assert betas.dtype == th.float64
    np.testing.assert_allclose(betas.numpy(), SCHEDULES[name](n_steps), rtol=1e-9, atol=1e-12)
    assert NOISE_SCHEDULES.keys() == SCHEDULES.keys()


def test_every_schedule_ends_in_noise_from_few_to_many_steps():
    """The chain starts from pure noise, so little of the action may be left in x_T."""
    for name in ("cosine", "vp", "linear"):
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


def test_noise_levels_as_a_list():
    """sigma_t is noise over signal; the names and the list say the same."""
    levels = reference.karras_levels(5)
    betas = make_betas(levels, 5)
    th.testing.assert_close(betas, make_betas("karras", 5))
    for given in (tuple(levels), np.array(levels), th.tensor(levels, dtype=th.float64)):
        th.testing.assert_close(make_betas(given, 5), betas)
    for t in range(5):
        bar = reference.alpha_bar(betas.numpy(), t)
        assert np.sqrt((1 - bar) / bar) == pytest.approx(levels[t])
    # The default range leaves a tenth of the action's variance in x_T, which is why it ends at 3
    assert reference.alpha_bar(betas.numpy(), 4) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0.1, 0.5, 0.4], "ascending"),
        ([0.0, 0.5, 1.0], "above 0"),
        ([-0.1, 0.5, 1.0], "above 0"),
        ([0.1, 0.5, float("nan")], "ascending"),
        ([], "ascending"),
        ([[0.1], [0.2], [0.3]], "ascending"),
        ([0.1, 0.5], "n_diffusion_steps = 3"),
    ],
)
def test_bad_noise_levels(levels, message):
    with pytest.raises(ValueError, match=f"noise_schedule.*{message}"):
        make_betas(levels, 3)
