"""Exercise 3: DDIM, and an image back to its noise.

Difficulty 3/5 - Importance 5/5 - 30 minutes

Song et al. 2021, Eq. 12 with sigma = 0: estimate x_0, then noise it to the next level with the very
eps that was estimated. No dice, so the walk can be taken upwards: from an image to the noise that
decodes to it. That is how this program carries a lesion to another skin.

Predict first: if the model's eps did not depend on the level, would up and down cancel exactly? In
a real model they do not quite: what makes the difference smaller?

Write both functions. times runs from noise to the clean image and ends in -1, as of
ddpm.even_times; the clean image is no level a network was trained on, so ask for eps at level 0.
ddpm.pairs(times, x) gives each step's levels as tensors (t, t_next), (B,) each.

    python -m pytest exercises/test_03_ddim.py

What you should see: 3 passed. One step agrees with Eq. 12; on Gaussian data the way up and down
misses by an eighth when the steps are eight times as many.
Where the answer stands: ddpm.ddim_step, ddpm.invert_ddim.
"""


def ddim_step(schedule, x_t, t, t_next, eps):
    """From the level t to t_next, (B,) each, up or down, along eps."""
    raise NotImplementedError


def invert_ddim(eps_model, schedule, x0, times):
    """The latent at level times[0] that decodes to x0; every step takes eps_model(x, t) at the
    level that it leaves."""
    raise NotImplementedError
