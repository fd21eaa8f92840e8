"""The config's networks: published weights, what the generator learns from, the jitter of val."""
from pathlib import Path

import re

import numpy as np
import pytest
import torch

import classifier
import loop
from conftest import new, set_to
from engine.config import ConfigError
from engine.run import Run
from engine.training import seeded
from extras import estimate, networks
from extras.class_n_diff import JointUNet
from test_classifier import normal, plain, published
from unet import UNet


def weights(name):
    """A state dict of the published form, drawn at random."""
    drawn = {key: normal(*shape, seed=i).div(max(1, np.prod(shape[1:])) ** 0.5)
             for i, (key, shape) in enumerate(published(name).items())}
    return {key: value.abs() + 0.5 if key.endswith("var") else value
            for key, value in drawn.items()}


@pytest.mark.parametrize("name, levels", [("resnet18", 50), ("resnet50", 0)])
def test_published_weights_are_loaded_and_compute_what_they_should(tmp_path, name, levels):
    given = {key: value for key, value in weights(name).items() if not key.endswith("tracked")}
    torch.save(given, tmp_path / "w.pth")                    # older files have no counters
    network = seeded(1, classifier.build, name, 32, 4, levels, published=True).eval()
    last = network.fc.weight.clone()
    networks.load_published(network, str(tmp_path / "w.pth"))
    state = network.state_dict()
    assert all(torch.equal(state[key], given[key]) for key in given if not key.startswith("fc"))
    assert torch.equal(network.fc.weight, last) and len(last) == 4
    x, t = normal(2, 3, 32, 32).clamp(-1, 1), torch.tensor([3, 40]) if levels else None
    rgb = (x + 1) / 2                                        # the published networks' inputs
    rgb = torch.stack([(rgb[:, 0] - 0.485) / 0.229, (rgb[:, 1] - 0.456) / 0.224,
                       (rgb[:, 2] - 0.406) / 0.225], 1)
    found, wanted = network(x, t), plain(state, rgb, t, levels, pool=True)
    assert wanted.std() > 0.1 and torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("content, words", [
    (b"no pickle", "w.pth is no state dict"), ({"epoch": 3}, "w.pth is no state dict"),
    (Path("x"), "w.pth is no state dict"), (None, "No such file"),
    ({"conv1.weight": torch.zeros(64, 3, 3, 3)},
     r"100 keys differ .* conv1.weight is \(64, 3, 3, 3\), wanted \(64, 3, 7, 7\); is "
     r"classifier.network the right one"), ("resnet34", "80 keys differ .* layer1.2.conv1.weight")])
def test_a_wrong_file_of_weights_is_told_in_one_line(tmp_path, content, words):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(weights(content) if content == "resnet34" else content, path)
    with pytest.raises(ValueError, match=words) as error:
        networks.load_published(classifier.build("resnet18", 64, 4, published=True), str(path))
    assert "\n" not in str(error.value)


def test_published_weights_start_students_and_guide(run, splits, tmp_path, capsys):
    torch.save(weights("resnet18"), tmp_path / "w.pth")
    run = set_to(run, "data", size=32)
    given = set_to(run, "classifier", network="resnet18", weights=str(tmp_path / "w.pth"))
    x, train = torch.zeros(2, 3, 16, 16), splits["train"]
    guide = networks.new_resnet(given, train, 1, noise_levels=50)
    students = [networks.new_resnet(given, train, s) for s in (1, 2)]
    assert guide(x, torch.tensor([0, 9])).shape == students[0](x).shape == (2, 4)
    for network in (guide, *students):
        assert torch.equal(network.conv1.weight, weights("resnet18")["conv1.weight"])
    assert not torch.equal(students[0].fc.weight, students[1].fc.weight)
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="classifier.weights: .*w.pth"):
        networks.new_resnet(given, train, 1)
    new(tmp_path, "data.size=32", "classifier.network=resnet18",
        f"classifier.weights={tmp_path / 'w.pth'}", status=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loop.py")]
    assert len(said) == 1 and "classifier.weights" in said[0] and "w.pth" in said[0]


def test_the_same_seed_is_the_same_network_and_the_config_chooses_its_class(run, splits):
    train = splits["train"]
    first, again, other = (networks.new_unet(run, train, seed) for seed in (1, 1, 2))
    weight = [next(network.parameters()) for network in (first, again, other)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])
    assert type(first) is UNet
    joint = set_to(run, "ddpm", joint_head=True, classifier_weight=0.2)
    assert type(networks.new_unet(joint, train, 1)) is JointUNet
    t, y, g = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 3]), torch.tensor([-1, 5])
    assert first(torch.zeros(2, 3, 16, 16), t, y, g).shape == (2, 3, 16, 16)


def test_images_whose_class_nobody_is_sure_of_teach_the_model_and_not_the_guide(run, splits,
                                                                               tmp_path):
    """Other labels of the images seen beyond train change nothing; their pixels change the model
    and not the guide."""
    run = set_to(set_to(run, "ddpm", steps=3), "classifier", guide_steps=3)
    train, beyond = (splits["train"].subset(np.arange(*ends)) for ends in ((60,), (60, 160)))
    even = classifier.balanced_weights(train.labels)

    def trained(number, **values):
        place = tmp_path / str(number)
        place.mkdir()
        seen = train.extend(loop.replace(beyond, **values))
        g = networks.train_generator(Run(place, run.config), train, seen, even)
        assert not g.unet.training and not g.guide.training
        assert g.prediction == "v" and g.schedule.T == 200
        return [torch.cat([w.flatten().float() for w in network.state_dict().values()])
                for network in (g.unet, g.guide)]
    plain, relabelled, redrawn = (trained(i, **values) for i, values in enumerate(
        [{}, {"labels": 3 - beyond.labels}, {"images": 255 - beyond.images}]))
    assert torch.equal(plain[0], relabelled[0]) and torch.equal(plain[1], relabelled[1])
    assert not torch.equal(plain[0], redrawn[0]) and torch.equal(plain[1], redrawn[1])


def test_val_chooses_the_jitter_and_a_single_one_needs_no_choice(run, splits, capsys):
    asked, val, train = [], splits["val"], splits["train"]

    def student(run, name, images, weights, seed, jitter):
        assert images is train and np.isclose(weights.sum(), 1)
        asked.append((name, seed))
        return jitter

    def predict(run, one, images):              # 0.6 is right about all, the others about none
        assert images is val.images
        return np.eye(4, dtype=np.float32)[(val.labels + (one != 0.6)) % 4]
    several = set_to(run, "classifier", jitter=[0.3, 0.6, 1.0])
    chosen, scores = networks.choose_jitter(several, splits, student, predict)
    assert chosen == 0.6 and scores == {"0.3": 0, "0.6": 1, "1": 0}
    assert len({seed for _, seed in asked}) == 1 and len({name for name, _ in asked}) == 3
    assert "chosen 0.6" in capsys.readouterr().out
    assert networks.choose_jitter(run, splits, None, None) == (0.3, {})


def test_the_estimate_grows_with_what_is_asked(run, splits, capsys):
    """The line that is printed, in seconds."""
    def seconds(given, drawing, names):
        estimate.tell(given, splits["train"], {n: loop.ARMS[n] for n in names}, drawing)
        said = capsys.readouterr().out
        hours, number, unit = re.search(r"about (?:(\d+) h )?(\d+) (s|min) on", said).groups()
        return 3600 * int(hours or 0) + int(number) * {"s": 1, "min": 60}[unit]
    slow = set_to(run, "classifier", steps=20_000)
    alone = seconds(set_to(slow, "loop", seeds=1), [], ("real",))
    many = seconds(set_to(slow, "loop", seeds=40), [], ("real",))
    assert 30 < alone and many > 3 * alone      # 5 and 44 students
    long = set_to(run, "ddpm", steps=10 ** 6)
    assert seconds(long, ["guided"], ("guided",)) > 20 * seconds(long, [], ("guided",))
