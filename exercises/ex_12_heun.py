"""Exercise 12, open-ended: Heun's sampler.

Difficulty 3/5 - Importance 3/5 - 45 minutes

In the variables x / alpha and s = sigma / alpha, alpha = sqrt(abar), sigma = sqrt(1 - abar), the
ODE that DDIM walks is d(x / alpha) / ds = eps: DDIM is Euler's rule. Heun's walks to the end, asks
again there, and goes with the mean of both: Karras et al. 2022 (arXiv 2206.00364), Algorithm 1.
The last step ends at s = 0, the clean image, where no network was trained: Euler there.

Predict first: with the same number of network evaluations, will Heun beat DDIM at 6? At 50?

Write the sampler; ddpm.pairs(times, x) gives each step's levels as tensors (t, t_next), (B,) each.
Then put it into ddpm.SAMPLERS as "heun" and draw with it from a finished run by examples/sample.py.
Compare with dpm at equal evaluations. Where should the strides be long?

    python -m pytest exercises/test_12_heun.py

What you should see: 3 passed: the error falls about fourfold when the steps are doubled.
Where the answer stands: exercises/solutions/ex_12_heun.py.
"""


def sample_heun(eps_model, schedule, x, times, noise=None, clip=1.0):
    """x at level times[0] taken along times to the last. clip: x0_hat is held to [-clip, clip], and
    eps made to agree with it, at both evaluations."""
    raise NotImplementedError
