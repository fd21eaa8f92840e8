"""Exercise 1: noise, and back.

Difficulty 1/5 - Importance 5/5 - 15 minutes

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I): Ho et al. 2020, Eq. 4. With one draw eps of that
noise, x_t, x_0 and eps hang together: whoever knows two knows the third.

Predict first: at the noise level where abar = 0.01, how much does an error of 0.1 in eps move the
estimate of x_0? And at abar = 0.99?

Write the three functions. schedule.abar(t, x) is abar at the levels t (B,), shaped to meet x.

    python -m pytest exercises/test_01_noise.py

What you should see: 3 passed. The inverses return what they were given to 10 digits; 0.1
more in eps moves x_0 by 0.1 sqrt((1 - abar) / abar): 1.0 at abar = 0.01, 0.01 at abar = 0.99.
Where the answer stands: ddpm.Schedule.q_sample, predict_x0, predict_eps.
"""


def q_sample(schedule, x0, t, eps):
    """x0 (B, C, H, W) noised to the levels t (B,) with the noise eps, like x0."""
    raise NotImplementedError


def predict_x0(schedule, x_t, t, eps):
    """The x0 that x_t and eps imply."""
    raise NotImplementedError


def predict_eps(schedule, x_t, t, x0):
    """The eps that x_t and x0 imply."""
    raise NotImplementedError
