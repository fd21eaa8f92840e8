"""Exercise 2: one step back.

Difficulty 3/5 - Importance 4/5 - 30 minutes

If x_0 were known, how would x_t come to the level before it? q(x_s | x_t, x_0), s < t, is a product
of two Gaussians in x_s: q(x_t | x_s) = N(sqrt(alpha) x_s, 1 - alpha) with alpha = abar_t / abar_s,
and q(x_s | x_0). Bayes multiplies them: precisions add, means weigh by them. Ho et al. 2020, Eq. 7.
At s = -1 one precision is infinite: multiply the fractions out before you write them down.

Predict first: for s = -1, the clean image (abar = 1), what are mean and variance? No algebra.

Write the function; schedule.abar(t, like) is abar_t in the shape of images, 1 at t = -1. The test
multiplies the two densities on a grid of 200,001 points and takes mean and variance of the product:
no formula of the paper is in it.

    python -m pytest exercises/test_02_posterior.py

What you should see: 3 passed. Mean and variance agree with the grid to 8 digits, for neighbours
and for longer strides.
Where the answer stands: ddpm.Schedule.posterior.
"""


def posterior(schedule, x0, x_t, t, t_prev):
    """Mean (like x_t) and variance (B, 1, 1, 1) of q(x_{t_prev} | x_t, x_0); t, t_prev: (B,)."""
    raise NotImplementedError
