"""class_n_diff.py: who learns from which step, the loss by hand, the joint head, resuming."""
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import class_n_diff
import classifier
from engine import config as configuration
import ddpm
import loop
from engine.run import RunFolder
from engine.training import seeded
from unet import UNet

HERE = Path(__file__).parents[1]
TINY = HERE / "configs/tiny.yaml"
SCHEDULE = ddpm.Schedule(20)
IMAGES = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3


def together(joint=False, unet_seed=1, guide_seed=1):
    unet = seeded(unet_seed, lambda: UNet(8, 3, 2, 16, (1, 2), 1, 4, 1, joint))
    with torch.no_grad():       # a last layer of zeros would pass no gradient on
        for p in unet.head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    if joint:
        return nn.ModuleDict({"unet": unet})
    return nn.ModuleDict({"unet": unet, "guide": seeded(
        guide_seed, lambda: classifier.ResNet(3, (1,), 8, "small", SCHEDULE.T))})


def train(networks, steps=45, probability=0.5, weight=0.5, prediction="v", batch=6, **progress):
    return class_n_diff.train(
        networks, SCHEDULE, IMAGES, LABELS, LABELS % 2, torch.ones(40), steps=steps, batch=batch,
        lr=1e-2, ema_decay=0.5, prediction=prediction, drop=0.3, jitter=0.3,
        classifier_weight=weight, classifier_probability=probability, seed=5, **progress)


@pytest.fixture
def one_step(monkeypatch):
    """one_step(networks, step, ...) -> the function that computes that step's loss of some rows."""
    def made(networks, step, **arguments):
        caught = {}

        def fit(networks, pick, loss_fn, *, ema, **_):
            ema.updates = step
            caught.update(pick=pick, loss_fn=loss_fn)
        monkeypatch.setattr(class_n_diff, "fit", fit)
        train(networks, **arguments)

        def loss(seed=0, part=slice(None)):
            generator = torch.Generator().manual_seed(seed)
            index = caught["pick"](generator)
            return caught["loss_fn"](index, generator, part)
        return loss
    return made


def moved(network):
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in network.parameters()]


# ---- who learns from which step -----------------------------------------------------------------

def test_the_gradient_of_a_taught_step_reaches_the_diffusion_model_alone(one_step):
    networks = together()
    before = {k: v.clone() for k, v in networks["guide"].state_dict().items()}
    one_step(networks, 30, probability=1.0)().backward()
    assert all(p.grad is None for p in networks["guide"].parameters())
    assert all(torch.equal(before[k], v) for k, v in networks["guide"].state_dict().items())
    with_teacher = networks["unet"].stem.weight.grad.clone()
    networks.zero_grad()
    one_step(networks, 30, probability=1.0, weight=0.0)().backward()
    assert not torch.equal(networks["unet"].stem.weight.grad, with_teacher)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(),
                                                 other.state_dict().values()))


def test_in_any_other_step_neither_learns_from_the_other():
    """Not even by a gradient cut to length: another diffusion model leaves the guide as it is to
    the bit, another guide the diffusion model; where it teaches, it does not."""
    def trained(probability, **seeds):
        networks, start = together(**seeds), together(**seeds)
        train(networks, 8, probability)
        assert not any(same(networks[name], start[name]) for name in networks)
        return networks
    for probability in (0.0, 0.5):
        a, b, c = (trained(probability, **seeds) for seeds in (
            {}, {"unet_seed": 2}, {"guide_seed": 2}))
        assert same(a["guide"], b["guide"]) and not same(a["unet"], b["unet"])
        assert same(a["unet"], c["unet"]) == (probability == 0)


def test_in_any_other_step_the_guide_learns_by_its_own_loss_and_half_of_it_clean(one_step):
    networks, levels = together(), []
    networks["guide"].register_forward_hook(lambda m, given, out: levels.append(given[1]))
    small, large = (one_step(networks, 30, probability=0.0, weight=w, batch=60)()
                    for w in (0.1, 3.0))
    assert torch.equal(small, large)
    assert 20 < (levels[0] == 0).sum() < 46             # 30 and a twentieth of the others
    large.backward()
    assert all(moved(networks["guide"])) and any(moved(networks["unet"]))


def test_the_guide_teaches_as_often_as_asked_and_never_while_warming_up(one_step, monkeypatch):
    taught = []
    monkeypatch.setattr(class_n_diff, "taught", lambda *_: taught.append(1) or torch.zeros(()))
    for step, low, high in ((0, 0, 0), (4, 0, 0), (5, 12, 36), (49, 12, 36)):       # of 50
        taught.clear()
        loss = one_step(together(), step, steps=50, probability=0.4, batch=2)
        for seed in range(60):
            loss(seed)
        assert low <= len(taught) <= high, step
    taught.clear()
    one_step(together(joint=True), 30, probability=1.0)()
    assert not taught


def test_the_diffusion_model_s_averaged_weights_stay(monkeypatch):
    networks, update, steps = together(), class_n_diff.UnetEMA.update, iter(range(1, 13))
    mean = {k: v.clone() for k, v in networks["unet"].state_dict().items()}

    def spied(self, networks):
        update(self, networks)
        n = next(steps)
        decay = min(0.5, (1 + n) / (10 + n))
        for key, value in networks["unet"].state_dict().items():
            mean[key] = decay * mean[key] + (1 - decay) * value
    monkeypatch.setattr(class_n_diff.UnetEMA, "update", spied)
    train(networks, 12)
    for key, value in networks["unet"].state_dict().items():
        assert torch.allclose(value, mean[key], atol=1e-6), key


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
    zero = found(also=lambda *given: 0 * class_n_diff.taught(guide, SCHEDULE, *given))
    assert len(plain) > 20 and all(torch.equal(a, b) for a, b in zip(plain, zero))


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_loss_of_a_taught_step_by_hand(prediction, one_step):
    networks, seen = together(), {}
    for name, network in networks.items():
        network.register_forward_hook(lambda m, given, out, name=name: seen.update(
            {name: [a.detach().double() for a in (*given, out)]}))
    loss = one_step(networks, 30, probability=1.0, prediction=prediction, batch=30)
    found, plain = loss(), one_step(networks, 30, probability=1.0, prediction=prediction,
                                    batch=30, weight=0.0)()
    x_t, t, y, _, output = seen["unet"]
    abar = SCHEDULE.alphas_cumprod[t.long()][:, None, None, None]
    x0_hat = (abar.sqrt() * x_t - (1 - abar).sqrt() * output if prediction == "v" else
              (x_t - (1 - abar).sqrt() * output) / abar.sqrt())
    shown, level, logits = seen["guide"]
    assert torch.allclose(shown, x0_hat.clamp(-1, 1), atol=1e-3) and not level.any()
    told = y >= 0
    assert 0 < told.sum() < 30              # a withheld class is not asked for
    error = -logits.log_softmax(1)[torch.arange(30), y.long().clamp(min=0)]
    wanted = 0.5 * (abar.flatten() * error)[told].sum() / 30
    assert (found - plain).item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_parts_of_a_batch_add_up(joint, one_step):
    """What training.fit does where memory does not hold a batch, 7 rows in parts of 3, 2 and 2."""
    loss = one_step(together(joint), 30, probability=1.0, batch=7)
    parts = sum(n / 7 * loss(part=slice(k, None, 3)) for k, n in enumerate((3, 2, 2)))
    assert parts.item() == pytest.approx(loss().item(), rel=1e-5)


def test_noised_images_are_q_sample_and_some_stay_clean():
    x0 = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    x_t, t = SCHEDULE.noised(x0, torch.Generator().manual_seed(0), clean=0.25)
    same = (x_t == x0).flatten(1).all(1)
    assert abs(same.sum() - 1000) < 150 and not t[same].any() and not t.min()
    counts = np.bincount(t[~same], minlength=20)
    assert abs(counts - 150).max() < 5 * 150 ** 0.5
    abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
    eps = ((x_t - abar.sqrt() * x0) / (1 - abar).sqrt())[~same]
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.03
    assert not (SCHEDULE.noised(x0, torch.Generator().manual_seed(0))[0] == x0).any()


# ---- the joint head -----------------------------------------------------------------------------

def test_a_head_changes_no_eps():
    with_head, without = (seeded(1, lambda: UNet(16, 3, 2, 16, (1, 2), joint_head=head))
                          for head in (True, False))
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
    assert torch.allclose(class_n_diff.Head(with_head)(x, t), wanted, atol=1e-4)


def test_a_head_learns_by_its_weight_and_the_shared_half_with_it(one_step):
    networks, seen = together(joint=True), []
    nn.init.normal_(networks["unet"].diagnosis[-1].weight)
    networks["unet"].diagnosis.register_forward_hook(lambda m, i, out: seen.append(out))
    losses = [one_step(networks, 0, weight=w)() for w in (0.0, 0.5, 1.0)]
    assert torch.equal(seen[0], seen[2])
    assert (losses[2] - losses[0]).item() == pytest.approx(2 * (losses[1] - losses[0]).item(),
                                                           rel=1e-3)
    grads = []
    for weight in (0.0, 1.0):
        networks.zero_grad()
        one_step(networks, 0, weight=weight)().backward()
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
    history = train(networks, save=save, save_every=20)
    assert len(files) == 2
    for file in files:
        file.seek(0)
        again = together(joint, 2, 2)
        assert train(again, state=torch.load(file, weights_only=True)) == history
        for key, value in networks.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


def stage(folder, *overrides):
    """The generator's stage of a tiny run, and the run."""
    c = configuration.load(TINY, ["ddpm.steps=6", "classifier.guide_steps=3", "data.train=80",
                                  "data.val=60", "data.test=60", "guidance.steps=2", *overrides])
    folder.mkdir(exist_ok=True)
    e = loop.Experiment(c, RunFolder(folder))
    e.prepare()
    e.train_generator()
    return e


@pytest.mark.parametrize("joint", [False, True])
def test_a_run_trains_both_at_once_reads_them_back_and_is_guided_by_them(joint, tmp_path):
    overrides = ["ddpm.classifier_weight=0.3", f"unet.joint_head={str(joint).lower()}"]
    e = stage(tmp_path / "run", *overrides)
    assert {p.name for p in (tmp_path / "run/checkpoints").glob("*")} == {"ddpm.pt"}
    again = stage(tmp_path / "run", *overrides)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 3, 50, 199])
    assert torch.equal(e.guide(x, t), again.guide(x, t))
    e.students = [e.new_resnet(0).eval()]
    with torch.no_grad():       # a head of so few steps is all but even: make it matter
        (e.unet.diagnosis[-1] if joint else e.guide.fc).weight.normal_()
    parents, seeds = e.train.subset(np.arange(4)), np.arange(4)
    off, on = (e.synthesise(parents, parents.groups, seeds, start="noise", scales=(s, 0, 0))[0]
               for s in (0.0, 0.5))
    assert (off != on).reshape(4, -1).any(1).all()


def test_weight_0_is_plain_training_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(class_n_diff, "train", None)
    e, c = stage(tmp_path / "run"), configuration.load(TINY).ddpm
    plain = e.new_unet(e.seed("ddpm"))
    ddpm.train(plain, e.schedule, *(torch.tensor(a) for a in (
        e.train.images, e.train.labels, e.train.groups)), steps=6, batch=c.batch, lr=c.lr,
        ema_decay=c.ema, prediction=c.prediction, drop=c.drop, seed=e.seed("ddpm"), bf16=e.bf16)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, e.unet.state_dict()[key]), key
