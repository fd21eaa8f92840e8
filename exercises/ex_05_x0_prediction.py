"""Exercise 5: a network that predicts x_0.

Difficulty 2/5 - Importance 4/5 - 25 minutes

eps, v and x_0 say the same of an image: given x_t, each follows from each. So a network that
predicts x_0 needs no sampler of its own, only a coat that makes an eps_model of it. What differs is
the training: an error of the same size in x_0 and in eps is not the same error.

Predict first: at which noise levels does mean squared error of x_0 weigh an image more than that
of eps does, the noisy or the clean ones? Which ones decide what a lesion looks like?

Write the coat, and the loss of an x_0 network measured in eps, which is the x_0 error times
abar / (1 - abar).

    python -m pytest exercises/test_05_x0_prediction.py

What you should see: 3 passed. Every sampler draws the same points from the exact E[x_0 | x_t] as
from the exact eps.
Where the answer stands: ddpm.Schedule.predict_eps, and the comment on v in ddpm.loss.
"""


def x0_as_eps_model(network, schedule, y, g):
    """eps_model(x_t, t) of a network(x_t, t, y, g) that predicts x_0."""
    raise NotImplementedError


def loss_in_eps(schedule, t, x0, x0_hat):
    """The mean over (B, C, H, W) of (eps - eps_hat)^2, from x0 and the estimate x0_hat alone."""
    raise NotImplementedError
