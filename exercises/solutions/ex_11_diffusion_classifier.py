"""A solution of exercise 11."""
import torch


def classify(network, schedule, x0, classes, times, generator):
    error = torch.zeros(len(x0), classes)
    for level in times:
        eps = torch.randn(x0.shape, generator=generator)        # the same for every class
        t = torch.full((len(x0),), level)
        x_t = schedule.q_sample(x0, t, eps)
        for label in range(classes):
            y = torch.full((len(x0),), label)
            found = network(x_t, t, y, torch.full_like(y, -1))
            error[:, label] += (found - eps).square().mean((1, 2, 3))
    return error.argmin(1)
