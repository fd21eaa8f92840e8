"""Exercise 6: classifier guidance.

Difficulty 3/5 - Importance 5/5 - 40 minutes

A guide says log p(y | x_t); its gradient says how x_t should change to look more like y. Dhariwal &
Nichol 2021, Algorithm 2, adds it to what the model predicts:

    eps <- eps - scale * sqrt(1 - abar_t) * d log p(y | x_t) / d x_t

This program does so with two changes: an objective may also look at x0_hat (predicted with eps held
fixed, clipped to [-1, 1]), and each image's gradient is first set to root mean square sqrt(abar_t).

Predict first: the sign. If the guide wants more of something, should eps become larger or smaller
there? And why must one image's gradient never depend on its neighbours in the batch?

Write both functions; guidance.normalise(grad) sets every image's gradient to root mean square 1.
An objective is a function (x_t, t, x0_hat) -> (B,), larger is better.

    python -m pytest exercises/test_06_classifier_guidance.py

What you should see: 4 passed. The gradient agrees with finite differences; of points drawn without
a class 25 % are where class 2 lives, judged by their nearest neighbours, and guided 80 % or more.
Where the answer stands: guidance.gradient, guidance.guided_eps.
"""


def gradient(objective, schedule, x_t, t, eps):
    """d objective / d x_t, like x_t: of the whole x_t -> x0_hat -> objective, with eps fixed."""
    raise NotImplementedError


def guided_eps(model, schedule, terms):
    """An eps_model that climbs the terms [(scale, objective), ...]; without any, the very model."""
    raise NotImplementedError
