"""class_n_diff.py: who learns from which step, the loss by hand, the joint head, resuming."""
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import classifier
import data
import ddpm
from engine import config as configuration
from engine.run import Run
from engine.training import seeded
from extras import class_n_diff, networks
from extras.class_n_diff import Head, JointUNet
from guidance import synthesise
from unet import UNet

HERE = Path(__file__).parents[1]
TINY = HERE / "configs/tiny.yaml"
SCHEDULE = ddpm.Schedule(20)
IMAGES = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3


def together(joint=False, unet_seed=1, guide_seed=1):
    unet = seeded(unet_seed, JointUNet if joint else UNet, 8, 3, 2, 16, (1, 2), 1, 4, 1)
    with torch.no_grad():       # a last layer of zeros would pass no gradient on
        for p in unet.head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    guide = seeded(guide_seed, classifier.ResNet, 3, (1,), 8, "small", SCHEDULE.T)
    return nn.ModuleDict({"unet": unet} if joint else {"unet": unet, "guide": guide})


def train(networks, steps=45, probability=0.5, weight=0.5, batch=6, **more):
    given = dict(lr=1e-2, ema_decay=0.5, prediction="v", drop=0.3, jitter=0.3, seed=5)
    return class_n_diff.train(
        networks, SCHEDULE, IMAGES, LABELS, LABELS % 2, torch.ones(40), steps=steps, batch=batch,
        classifier_weight=weight, classifier_probability=probability, **given | more)


def one_step(networks, number=30, **more):
    """Step `number` of a training that stands still, the last one: its loss. Each parameter's
    gradient, cut to length by network, is left in it."""
    rest = {"network": networks.state_dict(), "history": [], "step": number,
            "optimizer": torch.optim.AdamW(networks.parameters(), fused=True).state_dict(),
            "ema": {"shadow": networks["unet"].state_dict(), "updates": number}}
    return train(networks, number + 1, lr=0.0, state=rest, **more)[0]


def moved(network):
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in network.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(),
                                                 other.state_dict().values()))


# ---- who learns from which step -----------------------------------------------------------------

def test_both_learn_from_the_estimate_the_diffusion_model_by_its_weight():
    """A finite difference of the loss in one weight of the guide, and in one pixel."""
    guide = seeded(0, Guide).double()
    g = torch.Generator().manual_seed(2)
    x0_hat = (0.5 * torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64)).requires_grad_()
    t, y = torch.tensor([0, 3, 5, 9, 14, 19]), torch.tensor([0, 1, 2, -1, 0, 1])

    def value(weight=0.25):
        return class_n_diff.taught(guide, SCHEDULE, weight, t, x0_hat, y)
    knob, wanted = guide.fc.weight, []
    slopes = torch.autograd.grad(value(), (knob, x0_hat))
    for place, at in ((knob, (1, 2)), (x0_hat, (1, 0, 3, 3))):
        found = []
        for shift in (1e-4, -1e-4):
            with torch.no_grad():
                place[at] += shift
                found.append(value().item())
                place[at] -= shift
        wanted.append((found[0] - found[1]) / 2e-4)
    assert slopes[0][1, 2].item() == pytest.approx(wanted[0], rel=1e-4)
    assert slopes[1][1, 0, 3, 3].item() == pytest.approx(0.25 * wanted[1], rel=1e-4)
    assert value(0.0).item() == value(3.0).item()


def test_in_a_gated_step_both_move_and_at_weight_0_only_the_guide_by_it():
    networks = together()
    one_step(networks, probability=1.0)
    assert all(moved(networks["guide"]))
    with_guide = networks["unet"].stem.weight.grad.clone()
    one_step(networks, probability=1.0, weight=0.0)
    assert all(moved(networks["guide"]))
    assert not torch.equal(networks["unet"].stem.weight.grad, with_guide)


def test_in_any_other_step_neither_learns_from_the_other():
    """Not even by a gradient cut to length: while the gate is shut, another diffusion model leaves
    the guide as it is to the bit, another guide the diffusion model."""
    def trained(probability, **seeds):
        networks, start = together(**seeds), together(**seeds)
        train(networks, 8, probability)
        assert not any(same(networks[name], start[name]) for name in networks)
        return networks
    for probability in (0.0, 0.5):
        a, b, c = (trained(probability, **seeds) for seeds in (
            {}, {"unet_seed": 2}, {"guide_seed": 2}))
        assert same(a["guide"], b["guide"]) == same(a["unet"], c["unet"]) == (probability == 0)
        assert not same(a["unet"], b["unet"]) and not same(a["guide"], c["guide"])


def test_in_any_other_step_the_guide_learns_by_its_own_loss_and_half_of_it_clean():
    networks, levels = together(), []
    networks["guide"].register_forward_hook(lambda m, given, out: levels.append(given[1]))
    small, large = (one_step(networks, probability=0.0, weight=w, batch=60) for w in (0.1, 3.0))
    assert small == large
    assert 20 < (levels[0] == 0).sum() < 46             # 30 and a twentieth of the others
    assert all(moved(networks["guide"])) and any(moved(networks["unet"]))


class Line(nn.Module):
    """One number in place of the UNet; keeps it as it was before every step."""

    def __init__(self):
        super().__init__()
        self.slope, self.path = nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t, y, g):
        self.path.append(self.slope.item())
        return self.slope * x_t


class Guide(nn.Module):
    """One linear layer in place of the guide; keeps in every step whether it saw estimates."""

    def __init__(self):
        super().__init__()
        self.fc, self.taught = nn.Linear(3 * 8 * 8, 3), []

    def forward(self, x, t):
        self.taught.append(x.requires_grad)
        return self.fc(x.flatten(1))


def test_the_gate_opens_as_often_as_asked_and_never_in_the_first_tenth():
    """20 trainings of 50 steps, the first five of which see real images alone."""
    taught = []
    for seed in range(20):
        networks = nn.ModuleDict({"unet": Line(), "guide": seeded(0, Guide)})
        train(networks, 50, 0.4, batch=2, seed=seed)
        taught.append(networks["guide"].taught)
    taught = np.array(taught)                                    # (20, 50): once in every step
    assert taught.shape == (20, 50) and not taught[:, :5].any()
    for part in (taught[:, 5:28], taught[:, 28:]):
        assert abs(part.mean() - 0.4) < 5 * (0.4 * 0.6 / part.size) ** 0.5
    assert 0 < taught[:, 5].sum() < 20                           # from the very next step on


def test_a_head_teaches_in_every_step_and_never_by_the_guide_s_coin():
    never, always = together(joint=True), together(joint=True)
    assert train(never, 12, probability=0.0) == train(always, 12, probability=1.0)
    assert same(never, always)


def test_the_diffusion_model_s_averaged_weights_stay_and_the_guide_s_last():
    """Their mean by hand. At decay 0 what is left is the last step's weights themselves."""
    found = {}
    for decay in (0.5, 0.0):
        found[decay] = nn.ModuleDict({"unet": Line(), "guide": seeded(0, Guide)})
        train(found[decay], 12, ema_decay=decay)
    path = [*found[0.5]["unet"].path, found[0.0]["unet"].slope.item()]
    assert path[:-1] == found[0.0]["unet"].path and len(path) == 13
    mean = path[0]
    for n, slope in enumerate(path[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * slope
    assert found[0.5]["unet"].slope.item() == pytest.approx(mean, abs=1e-6)
    assert abs(mean - path[-1]) > 1e-4 and same(found[0.5]["guide"], found[0.0]["guide"])


# ---- the loss -----------------------------------------------------------------------------------

def test_without_a_classifier_the_loss_is_the_plain_one_to_the_bit():
    def found(**also):
        networks = together()
        loss = ddpm.loss(networks["unet"], SCHEDULE, IMAGES[:6] / 127.5 - 1, LABELS[:6],
                         LABELS[:6], torch.Generator().manual_seed(3), **also)
        loss.backward()
        return [loss, *(p.grad for p in networks["unet"].parameters() if p.grad is not None)]
    plain = found()
    guide = together()["guide"].eval()
    zero = found(also=lambda *given: 0 * class_n_diff.taught(guide, SCHEDULE, 1.0, *given))
    assert len(plain) > 20 and all(torch.equal(a, b) for a, b in zip(plain, zero))


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_loss_of_a_taught_step_by_hand(prediction):
    networks, seen = together(), {}
    for name, network in networks.items():
        network.register_forward_hook(lambda m, given, out, name=name: seen.update(
            {name: [a.detach().double() for a in (*given, out)]}))
    found = one_step(networks, probability=1.0, prediction=prediction, batch=30)
    logits = seen["guide"][-1]
    with torch.no_grad():               # all classes alike: log 3 for each
        for p in networks["guide"].fc.parameters():
            p.zero_()
    even = one_step(networks, probability=1.0, prediction=prediction, batch=30)
    x_t, t, y, _, output = seen["unet"]
    abar = SCHEDULE.alphas_cumprod[t.long()][:, None, None, None]
    x0_hat = (abar.sqrt() * x_t - (1 - abar).sqrt() * output if prediction == "v" else
              (x_t - (1 - abar).sqrt() * output) / abar.sqrt())
    shown, level, _ = seen["guide"]
    assert torch.allclose(shown, x0_hat.clamp(-1, 1), atol=1e-3) and not level.any()
    told = y >= 0
    assert 0 < told.sum() < 30              # a withheld class is not asked for
    error = -logits.log_softmax(1)[torch.arange(30), y.long().clamp(min=0)]
    wanted = (abar.flatten() * (error - np.log(3)))[told].sum() / 30
    assert found - even == pytest.approx(wanted.item(), rel=1e-3)


def test_noised_images_are_q_sample_and_some_stay_clean():
    x0 = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    x_t, t = class_n_diff.half_noised(SCHEDULE, x0, torch.Generator().manual_seed(0))
    same = (x_t == x0).flatten(1).all(1)
    assert abs(same.sum() - 2000) < 160 and not t[same].any() and not t.min()
    counts = np.bincount(t[~same], minlength=20)
    assert abs(counts - 100).max() < 5 * 100 ** 0.5
    abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
    eps = ((x_t - abar.sqrt() * x0) / (1 - abar).sqrt())[~same]
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.03
    assert not (SCHEDULE.noised(x0, torch.Generator().manual_seed(0))[0] == x0).any()


# ---- the joint head -----------------------------------------------------------------------------

def test_a_head_changes_no_eps():
    with_head, without = (seeded(1, kind, 16, 3, 2, 16, (1, 2)) for kind in (JointUNet, UNet))
    for key, value in without.state_dict().items():
        assert torch.equal(value, with_head.state_dict()[key]), key
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, other in zip(without.parameters(), with_head.parameters()):
            one.add_(0.1 * torch.randn(one.shape, generator=generator))
            other.copy_(one)
        for p in with_head.diagnosis.parameters():
            p.normal_()
    x, t = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 7, 999])
    y, g = torch.tensor([0, 2, -1]), torch.tensor([1, -1, 0])
    eps = with_head(x, t, y, g)
    assert eps.abs().max() > 0.01 and torch.equal(eps, without(x, t, y, g))

    # the logits by hand, from what the bottleneck gives if nothing is told
    middle = []
    with_head.middle[-1].register_forward_hook(lambda m, i, out: middle.append(out))
    with_head(x, t, y * 0 - 1, g * 0 - 1)
    norm, _, _, _, last = with_head.diagnosis
    h = middle[0].reshape(3, norm.num_groups, -1)
    h = ((h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt())
    h = h.view_as(middle[0]) * norm.weight[:, None, None] + norm.bias[:, None, None]
    wanted = (h * h.sigmoid()).mean((2, 3)) @ last.weight.T + last.bias
    assert torch.allclose(Head(with_head)(x, t), wanted, atol=1e-4)


def test_a_head_learns_by_its_weight_and_the_shared_half_with_it():
    networks, seen = together(joint=True), []
    nn.init.normal_(networks["unet"].diagnosis[-1].weight)
    networks["unet"].diagnosis.register_forward_hook(lambda m, i, out: seen.append(out))
    losses = [one_step(networks, weight=w) for w in (0.0, 0.5, 1.0)]
    assert torch.equal(seen[0], seen[2])
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)
    grads = []
    for weight in (0.0, 1.0):
        one_step(networks, weight=weight)
        grads.append((networks["unet"].stem.weight.grad.clone(), moved(networks["unet"].diagnosis)))
    assert not torch.equal(grads[0][0], grads[1][0])
    assert not any(grads[0][1]) and all(grads[1][1])


# ---- a run --------------------------------------------------------------------------------------

@pytest.mark.parametrize("joint", [False, True])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(joint):
    files = []

    def save(state):
        files.append(io.BytesIO())
        torch.save(state, files[-1])
    networks = together(joint)
    history = train(networks, save=save)
    assert len(files) == 2
    files[0].seek(0)
    again = together(joint, 2, 2)
    assert train(again, state=torch.load(files[0], weights_only=True)) == history
    for key, value in networks.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def made(folder, *overrides):
    """The run, the training images and the generator of a tiny run."""
    c = configuration.load(TINY, ["ddpm.steps=6", "classifier.guide_steps=3", "data.train=80",
                                  "guidance.steps=2", *overrides])
    folder.mkdir(exist_ok=True)
    run, images = Run(folder, c), data.load_phantom(c.data, "train", 80)
    return run, images, networks.train_generator(run, images, images, np.ones(80))


@pytest.mark.parametrize("joint", [False, True])
def test_a_run_trains_both_at_once_reads_them_back_and_is_guided_by_them(joint, tmp_path):
    overrides = ["ddpm.classifier_weight=0.3", f"ddpm.joint_head={str(joint).lower()}"]
    run, images, generator = made(tmp_path / "run", *overrides)
    assert {p.name for p in run.checkpoints.iterdir()} == {"ddpm.pt"}
    assert isinstance(generator.guide, Head) == joint and not generator.guide.training
    again = made(tmp_path / "run", *overrides)[2]
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 3, 50, 199])
    assert torch.equal(generator.guide(x, t), again.guide(x, t))
    with torch.no_grad():       # a head of so few steps is all but even: make it matter
        (generator.unet.diagnosis[-1] if joint else generator.guide.fc).weight.normal_()
    parents = images.subset(np.arange(4))
    off, on = (synthesise(generator, [], parents, parents.groups, np.arange(4),
                          run.config.guidance, start="noise",
                          objectives={"class_evidence": s}).images for s in (0.0, 0.5))
    assert (off != on).reshape(4, -1).any(1).all()


def test_weight_0_is_plain_training_to_the_bit(tmp_path):
    run, images, generator = made(tmp_path / "run")
    assert {p.name for p in run.checkpoints.iterdir()} == {"ddpm.pt", "guide.pt"}
    c, plain = run.config.ddpm, networks.new_unet(run, images, run.seed("ddpm"))
    assert type(plain) is UNet
    ddpm.train(plain, generator.schedule, *map(run.tensor, (
        images.images, images.labels, images.groups)), steps=6, batch=c.batch, lr=c.lr,
        ema_decay=c.ema, prediction=c.prediction, drop=c.drop, seed=run.seed("ddpm"),
        bf16=run.bf16)
    assert same(plain, generator.unet)
