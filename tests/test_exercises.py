"""exercises/: as shipped every check is red, with the solution green, with a common mistake red."""
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpm
import guidance
from ddpm import Schedule
from guidance import Drawn

HERE = Path(__file__).parents[1] / "exercises"
NAMES = [path.stem for path in sorted(HERE.glob("ex_*.py"))]


def x0_loss(schedule, t, x0, x0_hat):
    abar = schedule.abar(t, x0)
    return ((x0 - x0_hat).square() * abar / (1 - abar)).mean()


def coat(network, schedule, y, g):
    return lambda x_t, t: schedule.predict_eps(x_t, t, network(x_t, t, y, g))


def strip(abar, x0, eps, count):
    kept = abar[torch.linspace(0, len(abar) - 1, count).long()].view(-1, 1, 1, 1).to(x0)
    return kept.sqrt() * x0 + (1 - kept).sqrt() * eps


# The project is the solution of most; the others stand in exercises/solutions.
OURS = {
    "ex_01_noise": Schedule, "ex_02_posterior": Schedule, "ex_03_ddim": ddpm,
    "ex_04_schedule": SimpleNamespace(cosine=lambda T: Schedule(T).alphas_cumprod, strip=strip),
    "ex_05_x0_prediction": SimpleNamespace(x0_as_eps_model=coat, loss_in_eps=x0_loss),
    "ex_06_classifier_guidance": guidance, "ex_08_dpm_solver": ddpm}
SOLUTIONS = {name: OURS.get(name) or SimpleNamespace(**vars(importlib.import_module(
    f"solutions.{name}"))) for name in NAMES}


def checks(name):
    """The checks of an exercise's marker, by name."""
    marker = importlib.import_module(name.replace("ex_", "test_", 1))
    return {key: value for key, value in vars(marker).items() if key.startswith("check_")}


CHECKS = [(name, check) for name in NAMES for check in checks(name)]


def test_there_are_twelve_and_each_says_what_it_takes():
    assert [int(name[3:5]) for name in NAMES] == list(range(1, 13))
    for name in NAMES:
        about = importlib.import_module(name).__doc__
        assert f"python -m pytest exercises/{name.replace('ex_', 'test_', 1)}.py" in about
        for words in ("Difficulty ", "/5 - Importance ", " minutes", "Predict first",
                      "What you should see", "Where the answer stands"):
            assert words in about, (name, words)


@pytest.mark.parametrize("name, check", CHECKS)
def test_the_blank_is_red(name, check):
    with pytest.raises(NotImplementedError):
        checks(name)[check](importlib.import_module(name))


@pytest.mark.parametrize("name, check", CHECKS)
def test_the_solution_is_green(name, check):
    checks(name)[check](SOLUTIONS[name])


# ---- a common mistake in each is seen --------------------------------------------------------

def off_by_one(schedule, x_t, t, t_next, eps):
    return ddpm.ddim_step(schedule, x_t, t, (t_next - 1).clamp(min=-1), eps)


def no_last(schedule, x0, x_t, t, t_prev):
    mean, variance = Schedule.posterior(schedule, x0, x_t, t, t_prev)
    return mean, 1 - schedule.abar(t, x_t) / schedule.abar(t_prev, x_t)     # beta for beta-tilde


def downhill(model, schedule, terms):
    return guidance.guided_eps(model, schedule, [(-scale, term) for scale, term in terms])


def through_the_batch(objective, schedule, x_t, t, eps):
    return guidance.gradient(objective, schedule, x_t, t, eps) / len(x_t)


def weak(threshold):
    """Sees the planted leak and not the hidden one: two test sets that differ little."""
    assert threshold(np.linspace(0, 1, 50), np.linspace(0, 1, 9)) == threshold(
        np.linspace(0, 1, 50), np.linspace(0, 1, 40))


def better(labels, arms, seeds, rng):
    odds = SOLUTIONS["ex_10_arm"].null_probs(labels, arms, seeds, rng)
    odds["guided"] = odds["guided"] * np.exp(np.eye(4)[labels])
    return {arm: of / of.sum(-1, keepdims=True) for arm, of in odds.items()}


def fresh_noise(network, schedule, x0, classes, times, generator):
    """Every class with noise of its own."""
    one = SOLUTIONS["ex_11_diffusion_classifier"].classify
    errors = []
    for label in range(classes):
        def told(x_t, t, y, g, label=label):
            return network(x_t, t, torch.full_like(y, label), g)
        errors.append(one(told, schedule, x0, 1, times, generator))
    return torch.stack(errors).argmin(0)


WRONG = [
    ("ex_01_noise", "check_forward", "q_sample", lambda s, x, t, e: Schedule.q_sample(s, x, t, -e)),
    ("ex_01_noise", "check_x0", "predict_x0", lambda s, x, t, e: x - (1 - s.abar(t, x)).sqrt() * e),
    ("ex_01_noise", "check_eps", "predict_eps", lambda s, x, t, x0: x - s.abar(t, x).sqrt() * x0),
    ("ex_02_posterior", "check_neighbours_and_strides", "posterior", no_last),
    ("ex_03_ddim", "check_a_step_is_eq_12", "ddim_step", off_by_one),
    ("ex_03_ddim", "check_the_latent_is_the_exact_one", "invert_ddim", lambda m, s, x, times: x),
    ("ex_04_schedule", "check_literal_values", "cosine",
     lambda T: Schedule(T, "linear").alphas_cumprod),
    ("ex_04_schedule", "check_the_noise_of_the_strip", "strip",
     lambda a, x, e, n: strip(a, x, torch.randn(n, *e.shape), n)),
    ("ex_05_x0_prediction", "check_every_sampler", "x0_as_eps_model",
     lambda n, s, y, g: lambda x, t: n(x, t, y, g)),
    ("ex_05_x0_prediction", "check_the_loss", "loss_in_eps",
     lambda s, t, x0, x0_hat: (x0 - x0_hat).square().mean()),
    ("ex_06_classifier_guidance", "check_an_independent_judge", "guided_eps", downhill),
    ("ex_06_classifier_guidance", "check_the_gradient_by_finite_differences", "gradient",
     through_the_batch),
    ("ex_07_classifier_free", "check_two_scales_are_the_gradient", "classifier_free",
     lambda n, y, g, a, b: SOLUTIONS["ex_07_classifier_free"].classifier_free(n, y, g, a, a)),
    ("ex_08_dpm_solver", "check_fourfold_per_halving", "sample_dpm", ddpm.sample_ddim),
    ("ex_09_leak", "check_split", "test_split", lambda split: None),
    ("ex_09_leak", "check_threshold", "test_threshold", weak),
    ("ex_10_arm", "check_the_arm", "mirrored", lambda kit, p, *_: Drawn(p.images)),
    ("ex_10_arm", "check_the_null_is_one", "null_probs", better),
    ("ex_11_diffusion_classifier", "check_every_class_sees_the_same_noise", "classify",
     fresh_noise),
    ("ex_12_heun", "check_fourfold_per_halving", "sample_heun", ddpm.sample_ddim)]


@pytest.mark.parametrize("name, check, function, mistake", WRONG,
                         ids=[f"{name}-{check}" for name, check, *_ in WRONG])
def test_a_mistake_is_red(name, check, function, mistake):
    mine = SimpleNamespace(**{**vars(SOLUTIONS[name]), function: mistake})
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        checks(name)[check](mine)
