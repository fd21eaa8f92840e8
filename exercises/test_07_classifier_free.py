"""Marks exercise 7."""
import ex_07_classifier_free
import pytest
import torch
from mixture import Mixture, draw

from ddpm import Schedule, eps_model

SCHEDULE = Schedule(200)
X_T, Y, G = draw(40, torch.Generator().manual_seed(0))
X_T, T = X_T.double() + 0.1, 20 + 3 * torch.arange(40)


def check_one_scale_is_the_programs(mine):
    network = Mixture(SCHEDULE)
    for scale in (0.0, 1.0, 2.5):
        wanted = eps_model(network, SCHEDULE, Y, G, prediction="eps", scale=scale)(X_T, T)
        assert torch.allclose(mine.classifier_free(network, Y, G, scale, scale)(X_T, T), wanted)


def check_two_scales_are_the_gradient(mine):
    def log_p(x):
        """log p(x) + 2 log p(y | x) + 0.5 log p(g | x, y), (40,)."""
        parts, i = Mixture(SCHEDULE).log_parts(x, T)[0], torch.arange(40)
        every, of_class, both = (parts.logsumexp((1, 2)), parts[i, Y].logsumexp(1), parts[i, Y, G])
        return every + 2 * (of_class - every) + 0.5 * (both - of_class)
    grad = torch.zeros_like(X_T)
    for i in range(2):
        step = torch.zeros_like(X_T)
        step[:, i] = 1e-5
        grad[:, i, 0, 0] = (log_p(X_T + step) - log_p(X_T - step)) / 2e-5
    wanted = -(1 - SCHEDULE.abar(T, X_T)).sqrt() * grad         # eps is the score's other sign
    found = mine.classifier_free(Mixture(SCHEDULE), Y, G, 2.0, 0.5)(X_T, T)
    assert torch.allclose(found, wanted, atol=1e-6)


def check_who_is_told_what(mine):
    asked = []

    def network(x_t, t, y, g):
        asked.append(((y >= 0).all().item(), (g >= 0).all().item()))
        return x_t
    mine.classifier_free(network, Y, G, 2.0, 0.5)(X_T, T)
    assert set(asked) == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("check", [
    check_one_scale_is_the_programs, check_two_scales_are_the_gradient, check_who_is_told_what])
def test_yours(check):
    check(ex_07_classifier_free)
