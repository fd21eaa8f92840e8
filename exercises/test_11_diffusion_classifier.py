"""Marks exercise 11."""
import ex_11_diffusion_classifier
import pytest
import torch
from mixture import SPREAD, Mixture, draw

from ddpm import Schedule

SCHEDULE = Schedule(200)


def check_it_agrees_with_bayes(mine):
    """Points four times as spread as the spots, so that some lie between two classes."""
    generator = torch.Generator().manual_seed(0)
    x0, _, _ = draw(300, generator)
    x0 = x0 + 4 * SPREAD * torch.randn(x0.shape, generator=generator)
    wanted = Mixture(SCHEDULE).log_class(x0, torch.zeros(300, dtype=torch.int64)).argmax(1)
    found = mine.classify(Mixture(SCHEDULE), SCHEDULE, x0, 4, range(10, 190, 2), generator)
    assert found.dtype == torch.int64 and (found == wanted).float().mean() >= 0.95


def check_every_class_sees_the_same_noise(mine):
    seen = {}

    def network(x_t, t, y, g):
        assert (g == -1).all()
        for x, level, label in zip(x_t, t, y):
            seen.setdefault(int(label), []).append((int(level), *x.flatten().tolist()))
        return x_t
    mine.classify(network, SCHEDULE, draw(5, torch.Generator().manual_seed(0))[0], 3, [20, 90],
                  torch.Generator().manual_seed(0))
    assert {label: len(of) for label, of in seen.items()} == {0: 10, 1: 10, 2: 10}
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(seen[2])


@pytest.mark.parametrize("check", [check_it_agrees_with_bayes,
                                   check_every_class_sees_the_same_noise])
def test_yours(check):
    check(ex_11_diffusion_classifier)
